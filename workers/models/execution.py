"""Which way of computing a configuration asks for, and a device allows."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch

from configs.schema import KernelsKind, RuntimeConfig, TransformerConfig
from workers.models.attention import Attend, Attention, AttentionSize, choose_attention
from workers.models.audit import Audit
from workers.models.checkpoint import load_tiny_vae, load_vae_decoder, vae_dtype
from workers.models.fp8 import Fp8Linears, choose_multiply, scaled_mm
from workers.models.fp8_attention import choose_fp8_attention
from workers.models.frame_stream import FrameDecoder, FrameStream
from workers.models.graphs import CudaGraphs, Recorder, run_directly
from workers.models.kernels import TORCH, Kernels
from workers.models.kv_store import StoreKind
from workers.models.native import Native, NotCompiled, compiled
from workers.models.passes import AfterPass, Passes, PlainPasses, go_on
from workers.models.static import StaticTransformer
from workers.models.static_passes import StaticPasses
from workers.models.static_vae import StaticVae
from workers.models.tiny_vae import StaticTinyVae
from workers.models.transformer import CausalWanTransformer
from workers.models.vae_kernels import TORCH as VAE_TORCH
from workers.models.vae_kernels import VaeKernels

Say = Callable[[str], None]
"""Takes what the log says of a choice."""


def unheard(line: str) -> None:
    """For who does not want to know."""


def fallback(asked: str, needs: str, found: object, instead: str) -> str:
    """The line of a warning: a setting was asked for by name and is not to be had here."""
    return f"execution.{asked} needs {needs}, found {found}; used instead: {instead}"


def choose_passes(
    config: RuntimeConfig,
    model: CausalWanTransformer,
    on_pass: AfterPass = go_on,
    say: Say = unheard,
    *,
    own: bool = False,
    warn: Say = unheard,
    beside: Sequence[Passes] = (),
    record: Recorder | None = None,
    attention: Attention | None = None,
) -> Passes:
    """The denoiser's passes as `model.attention` and `execution` say; graphs only where the model lies on a GPU.

    Args:
        say: told what was chosen and what of it is not exact.
        own: whether the model serves these passes alone; its weights that lie in 8 bits are then given up.
        warn: told what was asked for, is not to be had here, and is done in another way.
        beside: other passes of the model, of which one runs at a time; their memory is used where it is of the kind.
        record: as of `StaticPasses`; by `execution.graphs` if not given.
        attention: by `model.attention` if not given; else it was tried before.

    Raises:
        ConfigError: what is asked for does not run here.
    """
    size = attention_size(config, model.config)
    model.attention = attention or choose_attention(config.model.attention, model.device, model.dtype, size)
    say(model.attention.note)
    execution = config.execution
    if execution.denoiser == "plain":
        return PlainPasses(model, config.stream, config.video, on_pass)
    record = record or choose_recorder(config, model.device, warn)
    if execution.audit:
        record = Audit(record, model.device)
    kernels = choose_kernels(execution.kernels, model.device, say, warn)
    compiled = execution.compile and can_compile(model.device, warn)
    attend_fp8 = choose_attend_fp8(model, size, say, warn) if execution.attend == "fp8" else None
    shared = _of_kind(beside, execution.kv if attend_fp8 is None else "attended")
    streamed = partial(StaticPasses, model, config.stream, config.video, on_pass, record, execution.kv)
    build = partial(streamed, beside=shared, attend_fp8=attend_fp8)
    if execution.linears == "model":
        return build(kernels=kernels, compiled=compiled)
    tokens = config.stream.frames_per_block * config.video.frame_tokens
    multiply, by = choose_multiply(linear_shapes(model.config), tokens, model.device, model.dtype)
    if model.device.type != "cuda" or multiply is not scaled_mm:
        instead = f"{by}, as inexact and not faster"
        warn(fallback("linears: fp8", "a GPU of compute capability 8.9 or more", model.device, instead))
    linears = Fp8Linears(execution.fp8_keep, multiply)
    passes = build(linears, kernels, compiled)
    say(f"{linears.weighs}, by {by}")
    if own:
        linears.release(model)
    return passes


def choose_attend_fp8(
    model: CausalWanTransformer, size: AttentionSize, say: Say = unheard, warn: Say = unheard
) -> Attend | None:
    """What attends to keys and values in e4m3; None where `attend: model` is better, on a GPU without the kernel."""
    chosen = choose_fp8_attention(model.attention.attend, model.device, model.dtype, size)
    if chosen.lack is not None:
        needs = "FlashAttention-3 (flash_attn_interface or fa3-fwd) on a GPU of compute capability 9.x"
        widened = f"values of e4m3 attended by {model.attention.name}, as inexact and not faster"
        warn(fallback("attend: fp8", needs, chosen.lack, "attend: model" if chosen.attend is None else widened))
    say(chosen.note)
    return chosen.attend


def _of_kind(passes: Sequence[Passes], kept: StoreKind) -> StaticTransformer | None:
    """The first that keeps keys and values that way."""
    static = (each.static for each in passes if isinstance(each, StaticPasses))
    return next((each for each in static if each.kept == kept), None)


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


def choose_kernels(kind: KernelsKind, device: torch.device, say: Say = unheard, warn: Say = unheard) -> Kernels:
    """What computes the small operations: Triton where it is wanted and runs, else PyTorch."""
    lack = None
    if device.type != "cuda":
        lack = "a CUDA device", str(device)
    elif importlib.util.find_spec("triton") is None:
        lack = "the package triton", "none"
    if kind == "torch" or lack:
        if kind == "triton" and lack:
            warn(fallback("kernels: triton", *lack, "torch"))
        say(f"kernels by {TORCH.name}")
        return TORCH
    from workers.models.triton_kernels import TRITON

    say(f"kernels by {TRITON.name}")
    return TRITON


def can_compile(device: torch.device, warn: Say = unheard) -> bool:
    """Whether torch.compile makes code for a device, which takes a compiler there; it is tried on a sum."""
    try:
        # In this process, as a pool of compilers would be left when it ends; what lies in a cache shows no compiler.
        with torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False):
            torch.compile(_sum, fullgraph=True, dynamic=False)(torch.ones(8, device=device))
    except RuntimeError as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        warn(fallback("compile: true", f"a compiler for {device.type}", lines[0][:200], "the operations one by one"))
        return False
    return True


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x + x


def choose_frame_stream(
    config: RuntimeConfig, device: torch.device, say: Say = unheard, warn: Say = unheard
) -> FrameStream:
    """The decoder of latents on a device, as `model.decoder` says. Raises CheckpointError, ConfigError.

    Args:
        say, warn: as of `choose_passes`.
    """
    size = (config.video.latent_height, config.video.latent_width)
    native = choose_native(config, device, warn)
    kernels = choose_vae_kernels(config, device, warn)
    decoder: FrameDecoder
    if config.model.decoder == "tiny":
        say(f"the tiny decoder, what lies between convolutions by {kernels.name}")
        decoder = StaticTinyVae(load_tiny_vae(config.model, device), *size, kernels)
    else:
        dtype = str(vae_dtype(config.model, device)).removeprefix("torch.")
        say(f"{dtype}, what lies between convolutions by {'code compiled here' if native else kernels.name}")
        decoder = StaticVae(load_vae_decoder(config.model, device, "plain"), *size, native, kernels)
    return FrameStream(decoder, config.video, device, choose_recorder(config, device, warn))


def choose_vae_kernels(config: RuntimeConfig, device: torch.device, warn: Say = unheard) -> VaeKernels:
    """As `choose_kernels`, for the VAE's decoder; presets that the denoiser changes between are not its matter."""
    kind = "auto" if config.adaptive.is_on else config.execution.kernels
    if choose_kernels(kind, device, warn=warn) is TORCH:
        return VAE_TORCH
    from workers.models.triton_vae import TRITON

    return TRITON


def choose_native(config: RuntimeConfig, device: torch.device, warn: Say = unheard) -> Native | None:
    """Compiled operations for the full decoder in a single thread of a CPU, unless `execution.native` says no."""
    wanted = config.execution.native
    if not wanted:
        return None
    lack = None
    if config.model.decoder != "full":
        lack = "model.decoder: full", config.model.decoder
    elif device.type != "cpu":
        lack = "a CPU", str(device)
    elif torch.get_num_threads() != 1:
        lack = "stages.vae_decoder.threads: 1", str(torch.get_num_threads())
    try:
        if lack is None:
            return compiled()
    except NotCompiled as error:
        lack = error.needs, error.found
    if wanted is True:
        warn(fallback("native: true", *lack, "PyTorch's operations"))
    return None


def choose_recorder(config: RuntimeConfig, device: torch.device, warn: Say = unheard) -> Recorder:
    """CUDA graphs on a GPU, unless `execution.graphs` says no."""
    wanted = config.execution.graphs
    if wanted and device.type == "cuda":
        return CudaGraphs(device)
    if wanted is True:
        warn(fallback("graphs: true", "a CUDA device", device, "every operation launched by itself"))
    return run_directly
