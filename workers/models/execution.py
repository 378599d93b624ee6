"""Which way of computing a configuration asks for, and a device allows."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from configs.schema import KernelsKind, RuntimeConfig, TransformerConfig
from workers.models.attention import AttentionSize, choose_attention
from workers.models.audit import Audit
from workers.models.checkpoint import load_tiny_vae, load_vae_decoder
from workers.models.fp8 import Fp8Linears, choose_multiply
from workers.models.frame_stream import FrameDecoder, FrameStream
from workers.models.graphs import CudaGraphs, Recorder, run_directly
from workers.models.kernels import TORCH, Kernels
from workers.models.native import Native, compiled
from workers.models.passes import AfterPass, Passes, PlainPasses, go_on
from workers.models.static_passes import StaticPasses
from workers.models.static_vae import StaticVae
from workers.models.tiny_vae import StaticTinyVae
from workers.models.transformer import CausalWanTransformer

Say = Callable[[str], None]
"""Takes what the log says of a choice."""


def choose_passes(
    config: RuntimeConfig,
    model: CausalWanTransformer,
    on_pass: AfterPass = go_on,
    say: Say = lambda line: None,
    *,
    own: bool = False,
) -> Passes:
    """The denoiser's passes as `model.attention` and `execution` say; graphs only where the model lies on a GPU.

    Args:
        say: told what was chosen and what of it is not exact.
        own: whether the model serves these passes alone; its weights that lie in 8 bits are then given up.

    Raises:
        ConfigError: what is asked for does not run here.
    """
    size = attention_size(config, model.config)
    model.attention = choose_attention(config.model.attention, model.device, model.dtype, size)
    say(model.attention.note)
    execution = config.execution
    if execution.denoiser == "plain":
        return PlainPasses(model, config.stream, config.video, on_pass)
    record = choose_recorder(config, model.device)
    if execution.audit:
        record = Audit(record, model.device)
    kernels = choose_kernels(execution.kernels, model.device, say)
    build = partial(StaticPasses, model, config.stream, config.video, on_pass, record, execution.kv)
    if execution.linears == "model":
        return build(kernels=kernels, compiled=execution.compile)
    tokens = config.stream.frames_per_block * config.video.frame_tokens
    multiply, by = choose_multiply(linear_shapes(model.config), tokens, model.device, model.dtype)
    linears = Fp8Linears(execution.fp8_keep, multiply)
    passes = build(linears, kernels, execution.compile)
    say(f"{linears.weighs}, by {by}")
    if own:
        linears.release(model)
    return passes


def attention_size(config: RuntimeConfig, transformer: TransformerConfig) -> AttentionSize:
    """Of a block's self-attention once the window is full."""
    frame, stream = config.video.frame_tokens, config.stream
    return AttentionSize(
        stream.frames_per_block * frame, stream.window * frame, transformer.num_heads, transformer.head_dim
    )


def linear_shapes(transformer: TransformerConfig) -> set[tuple[int, int]]:
    """Out and in of the linears in `configs.schema.LAYER_LINEARS`."""
    dim, wide = transformer.dim, transformer.ffn_dim
    return {(3 * dim, dim), (dim, dim), (wide, dim), (dim, wide)}


def choose_kernels(kind: KernelsKind, device: torch.device, say: Say = lambda line: None) -> Kernels:
    """What computes the small operations: Triton where it is wanted and runs, else PyTorch."""
    lack = ""
    if device.type != "cuda":
        lack = f"needs a CUDA device, found {device.type}"
    elif importlib.util.find_spec("triton") is None:
        lack = "is not installed"
    if kind == "torch" or lack:
        say(f"kernels by torch: triton {lack}" if kind == "triton" else "kernels by torch")
        return TORCH
    from workers.models.triton_kernels import TRITON

    say("kernels by triton")
    return TRITON


def choose_frame_stream(config: RuntimeConfig, device: torch.device) -> FrameStream:
    """The decoder of latents on a device, as `model.decoder` says. Raises CheckpointError, ConfigError."""
    size = (config.video.latent_height, config.video.latent_width)
    decoder: FrameDecoder
    if config.model.decoder == "tiny":
        decoder = StaticTinyVae(load_tiny_vae(config.model, device), *size)
    else:
        decoder = StaticVae(load_vae_decoder(config.model, device, "plain"), *size, choose_native(config, device))
    return FrameStream(decoder, config.video, device, choose_recorder(config, device))


def choose_native(config: RuntimeConfig, device: torch.device) -> Native | None:
    """Compiled operations for a single thread of a CPU, unless `execution.native` says no."""
    wanted = config.execution.native and device.type == "cpu" and torch.get_num_threads() == 1
    return compiled() if wanted else None


def choose_recorder(config: RuntimeConfig, device: torch.device) -> Recorder:
    """CUDA graphs on a GPU, unless `execution.graphs` says no."""
    return CudaGraphs(device) if config.execution.graphs and device.type == "cuda" else run_directly
