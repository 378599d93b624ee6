"""`scripts/bench count`: kernels launched, bytes moved and operations of a block at full size, counted on no device.

    scripts/bench count --config longlive-1.3b

Models lie on torch's meta device, so that every operation is dispatched and none is computed, and `counting.py` counts;
what `kernels.py` and `vae_kernels.py` name is one kernel each on the fast path, as on a GPU. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from baseline import BaselinePasses
from baseline_vae import BaselineVae
from counting import AttentionCounted, Counted
from rich.console import Console
from rich.table import Table
from torch import Tensor

from configs.load import load_config
from configs.schema import LATENT_CHANNELS, RuntimeConfig
from workers.models.attention import Attention, attend_sdpa
from workers.models.checkpoint import vae_dtype
from workers.models.kernels import TORCH, Kernels, LinearInputs
from workers.models.kv_cache import CacheLayout
from workers.models.lora import add_lora, lora_shapes
from workers.models.noise import DrawnNoise
from workers.models.passes import PlainPasses
from workers.models.static import Shape
from workers.models.static_passes import StaticPasses
from workers.models.static_vae import StaticVae
from workers.models.transformer import CausalWanTransformer
from workers.models.vae import VaeDecoder
from workers.models.vae_kernels import TORCH as VAE_TORCH
from workers.models.vae_kernels import VaeKernels

FLOPS_PER_S, BYTES_PER_S = 790e12, 4.3e12
"""Of an H200: bfloat16 products and copies as measured on one (an 8192-cubed product, a copy of 8.6 GB)."""
PROMPT_TOKENS = 64
META = torch.device("meta")


def new_count() -> Counted:
    """At the rates of an H200."""
    return Counted(FLOPS_PER_S, BYTES_PER_S)


def fused_kernels(counted: Counted) -> Kernels:
    """The operations of `kernels.py`, each as one kernel."""

    def write_qkv(qkv: Tensor, weights: Any, eps: float, turn: Any, kv: Any, slots: Tensor, sinks: int) -> Tensor:
        with counted.as_one():
            q = TORCH.write_qkv(qkv, weights, eps, turn, kv, slots, sinks)
        written = q.nbytes + 2 * q.numel() * kv.k.element_size() + sinks * kv.k[0].nbytes
        counted.add(0.0, qkv.nbytes + sum(table.nbytes for table in turn) + written)
        return q

    plain, fp8 = (LinearInputs(*(counted.fused(f) for f in vars(of).values())) for of in (TORCH.plain, TORCH.fp8))
    plain = replace(plain, rows=TORCH.plain.rows)  # which does nothing

    def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with counted.as_one():
            out = TORCH.linear_gelu(x, weight, bias)
        counted.add(2.0 * x.numel() * len(weight), x.nbytes + weight.nbytes + bias.nbytes + out.nbytes)
        return out

    return Kernels(
        "counted", plain, fp8, linear_gelu, counted.fused(TORCH.rms_norm), write_qkv, counted.fused(TORCH.turn_sink)
    )


def fused_vae_kernels(counted: Counted) -> VaeKernels:
    """The operations of `vae_kernels.py`, each as one kernel."""
    operations = {name: counted.fused(f) for name, f in vars(VAE_TORCH).items() if name != "name"}
    return replace(VAE_TORCH, **operations)


@dataclass(frozen=True)
class Row:
    """What a block takes one way."""

    way: str
    counted: Counted


def denoiser_rows(config: RuntimeConfig) -> list[Row]:
    """A block with a full window: straightforward with its LoRA unmerged, plain, and on the fast path."""
    stream, video = config.stream, config.video
    layout, block = CacheLayout(stream), stream.window_blocks + 1
    embeds = torch.zeros(1, PROMPT_TOKENS, config.model.transformer.text_dim, device=META)

    def counted(build: Callable[[CausalWanTransformer], Any], *, unmerged: bool) -> Counted:
        model = meta_transformer(config, unmerged=unmerged)
        passes, tally = build(model), new_count()
        noise = DrawnNoise(0, (stream.frames_per_block, LATENT_CHANNELS, video.latent_height, video.latent_width))
        with torch.inference_mode(), AttentionCounted(tally):
            passes.take_prompt(embeds)
            if isinstance(passes, BaselinePasses):
                passes.cache.blocks = [0, *range(2, block)]
            plan = layout.denoise(block, 0)
            with tally:
                clean = passes.denoise(plan, block, noise)
                passes.remember(plan, clean)
        return tally

    def static() -> Counted:
        tally = new_count()
        passes = StaticPasses(meta_transformer(config, unmerged=False), stream, video, kernels=fused_kernels(tally))
        shape = Shape(1, stream.window_blocks, 0, passes.static.text.lengths[2])
        with torch.inference_mode(), AttentionCounted(tally), tally:
            for step in range(len(stream.steps)):
                passes.static.step(step, shape)
            passes.static.remember(shape)
        return tally

    return [
        Row("denoiser, straightforward", counted(lambda m: BaselinePasses(m, stream, video), unmerged=True)),
        Row("denoiser, plain", counted(lambda m: PlainPasses(m, stream, video), unmerged=False)),
        Row("denoiser", static()),
    ]


def meta_transformer(config: RuntimeConfig, *, unmerged: bool) -> CausalWanTransformer:
    """The transformer without memory; its LoRA beside its weights or in them."""
    with META:
        model = CausalWanTransformer(config.model.transformer).to(getattr(torch, config.model.dtype))
    model.attention = Attention("sdpa", attend_sdpa)
    lora = config.model.lora
    if unmerged and lora is not None:
        shapes = lora_shapes(model, lora.rank)
        for index, layer in enumerate(model.blocks):
            stem = f"base_model.model.blocks.{index}."
            mine = {name.removeprefix(stem): shape for name, shape in shapes.items() if name.startswith(stem)}
            add_lora(layer, lora, {n: torch.empty(s, device=META, dtype=model.dtype) for n, s in mine.items()})
    return model.eval().requires_grad_(False)


def vae_rows(config: RuntimeConfig) -> list[Row]:
    """The decoder's work on a block that is not the first: by `conv3d`, and on the fast path."""
    size = (LATENT_CHANNELS, config.video.latent_height, config.video.latent_width)
    latent, rows = torch.empty(size, device=META), []
    for way in ("VAE, straightforward", "VAE"):
        tally = new_count()
        with META:
            decoder = VaeDecoder(config.model.vae).to(vae_dtype(config.model, META))
        if way == "VAE":
            vae = StaticVae(decoder, *size[1:], kernels=fused_vae_kernels(tally))
            decode = lambda vae=vae: vae.frames(latent, first=False)  # noqa: E731
        else:
            straight = BaselineVae(decoder)
            decode = lambda straight=straight: straight.decode(latent[None])  # noqa: E731
            with torch.inference_mode(), AttentionCounted(new_count()):
                decode()
        with torch.inference_mode(), AttentionCounted(tally), tally:
            for _ in range(config.stream.frames_per_block):
                decode()
        rows.append(Row(way, tally))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench count", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="longlive-1.3b")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    given = parser.parse_args()
    settings = ["model.path=null", "model.random_weights=true"] if given.config == "longlive-1.3b" else []
    config = load_config(given.config, [*settings, *given.set])
    rows = [*denoiser_rows(config), *vae_rows(config)]
    rates = f"{FLOPS_PER_S / 1e12:.0f} TFLOP/s and {BYTES_PER_S / 1e12:.1f} TB/s"
    table = Table("a block", "kernels", "GB", "TFLOP", "ms", title=f"{config.name}, counted; ms at {rates}")
    for row in rows:
        c = row.counted
        table.add_row(
            row.way, f"{c.kernels:,}", f"{c.bytes / 1e9:.1f}", f"{c.flops / 1e12:.1f}", f"{1000 * c.seconds:.0f}"
        )
    Console().print(table)
    names = ("kernels", "bytes", "flops", "seconds")
    print(json.dumps({row.way: {name: getattr(row.counted, name) for name in names} for row in rows}))  # noqa: T201


if __name__ == "__main__":
    main()
