"""`scripts/bench block`: the fast path against the straightforward pipeline, block by block in turn, in one process.

    scripts/bench block --config pocket --blocks 24

Both make the same stream with the same threads and dtypes; the window is full before anything is measured. Prints a
table, and as last line JSON with `block_speedup` and `vae_speedup`: the medians' ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from baseline import BaselinePasses, load_baseline
from baseline_vae import BaselineVae
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from configs.load import load_config
from configs.schema import LATENT_CHANNELS, RuntimeConfig
from workers.models.checkpoint import load_transformer, load_vae_decoder, vae_dtype
from workers.models.denoise import Rollout
from workers.models.execution import choose_frame_stream, choose_passes
from workers.models.noise import DrawnNoise
from workers.models.passes import Passes, PlainPasses
from workers.models.transformer import CausalWanTransformer
from workers.models.vae import to_rgb8

PROMPT_TOKENS = 24
"""Of the prompt that is measured under; its embeddings are random, which costs the same."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench block", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--blocks", type=int, default=24, help="blocks measured of each way")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = load_config(given.config, given.set)
    chosen: list[str] = []
    block = in_turn(denoisers(config, chosen.append), given.blocks)
    vae = in_turn(decoders(config), given.blocks)
    device = config.stage("denoiser").device
    computed_in = str(vae_dtype(config.model, torch.device(config.stage("vae_decoder").device or "cpu")))[
        len("torch.") :
    ]
    title = f"{config.name} on {device}, {config.model.dtype}, VAE {computed_in}, {given.threads} thread(s)"
    table = Table("ms a block", "median", "least", "times as fast", title=title)
    for name, times in (*block.items(), *vae.items()):
        first = next(iter((block if name in block else vae).values()))
        median = statistics.median(times)
        table.add_row(name, f"{median:.1f}", f"{min(times):.1f}", f"{statistics.median(first) / median:.2f}")
    Console().print(table)
    print(  # noqa: T201
        json.dumps(
            {
                "block_speedup": round(_ratio(block, "denoiser, straightforward", "denoiser"), 3),
                "vae_speedup": round(_ratio(vae, "VAE, straightforward", "VAE"), 3),
                "ms": {name: round(statistics.median(times), 2) for name, times in (*block.items(), *vae.items())},
                "chosen": chosen,
                "config": config.name,
                "device": device,
                "dtype": config.model.dtype,
                "vae_dtype": computed_in,
                "threads": given.threads,
                "torch": torch.__version__,
            }
        )
    )


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, one call of each after the other, so that a slow moment strikes all."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            _wait()
            began = time.monotonic()
            run()
            _wait()
            times[name].append(1000 * (time.monotonic() - began))
    return times


def denoisers(config: RuntimeConfig, say: Callable[[str], None]) -> dict[str, Callable[[], object]]:
    """Streams with a full window by what computes them, each a call that makes the next block."""
    device = torch.device(config.stage("denoiser").device or "cpu")
    model, beside = load_transformer(config.model, device), load_baseline(config.model, device)
    return {
        "denoiser, straightforward": block_stream(config, beside, BaselinePasses(beside, config.stream, config.video)),
        "denoiser, plain": block_stream(config, model, PlainPasses(model, config.stream, config.video)),
        "denoiser": block_stream(config, model, choose_passes(config, model, say=say)),
    }


def block_stream(config: RuntimeConfig, model: CausalWanTransformer, passes: Passes) -> Callable[[], object]:
    """A stream with a full window, as a call that makes its next block."""
    rollout = Rollout(model, config.stream, config.video, passes=passes)
    passes.record_all()
    generator = torch.Generator().manual_seed(0)
    rollout.switch(torch.randn(1, PROMPT_TOKENS, config.model.transformer.text_dim, generator=generator))
    noise = DrawnNoise(config.seed, rollout.shape)
    for _ in range(config.stream.window_blocks + 1):
        rollout.denoise_block(noise)
    return lambda: rollout.denoise_block(noise)


def decoders(config: RuntimeConfig) -> dict[str, Callable[[], object]]:
    """The VAE's decoder as it is run and the straightforward way, each a call that decodes a block."""
    device = torch.device(config.stage("vae_decoder").device or "cpu")
    straightforward, stream = straightforward_vae(config, device), choose_frame_stream(config, device)
    stream.record_all()
    return {
        "VAE, straightforward": block_decoder(
            config, lambda latent: to_rgb8(straightforward.decode(latent[None])), device
        ),
        "VAE": block_decoder(config, stream.decode, device),
    }


def straightforward_vae(config: RuntimeConfig, device: torch.device) -> BaselineVae:
    """The VAE as it is usually run, over weights laid out as its file has them."""
    decoder = load_vae_decoder(config.model, device, "plain")
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.contiguous_format)
    return BaselineVae(decoder)


def block_decoder(
    config: RuntimeConfig, decode_latent: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[], object]:
    """A call that decodes a block's worth of one latent frame, once past the stream's first."""
    shape = (LATENT_CHANNELS, config.video.latent_height, config.video.latent_width)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.inference_mode()
    def decode() -> None:
        for _ in range(config.stream.frames_per_block):
            decode_latent(latent)

    decode()
    decode()
    return decode


def _ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(times[slow]) / statistics.median(times[fast])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
