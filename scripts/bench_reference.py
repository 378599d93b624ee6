"""One round of the straightforward pipeline for `orchestrator bench reference`: a single process, the VAE in line.

Prints JSON: milliseconds of each block, whole and by stage. No graphs, LoRA beside the weights, a rolled KV cache with
clones, `conv3d` (`baseline.py`, `baseline_vae.py`); the window is full before anything is measured. What follows the
VAE in the runtime follows here too: the frames are brought to the host and hashed.
"""

import argparse
import hashlib
import json
import time
from collections import defaultdict

import torch
from baseline import BaselinePasses, load_baseline
from bench_block import PROMPT_TOKENS, straightforward_vae

from configs.load import load_config
from configs.schema import RuntimeConfig
from workers.models.denoise import Rollout
from workers.models.noise import DrawnNoise
from workers.models.vae import to_rgb8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--blocks", type=int, default=24, help="blocks measured")
    parser.add_argument("--warmup", type=int, default=8, help="blocks before")
    given = parser.parse_args()
    config = load_config(given.config, given.set)
    torch.set_num_threads(config.stage("denoiser").threads)
    print(json.dumps({"ms": measure(config, given.blocks, given.warmup)}))  # noqa: T201


@torch.inference_mode()
def measure(config: RuntimeConfig, blocks: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of each block after the warm-up."""
    device = torch.device(config.stage("denoiser").device or "cpu")
    model = load_baseline(config.model, device)
    rollout = Rollout(model, config.stream, config.video, passes=BaselinePasses(model, config.stream, config.video))
    decoder = straightforward_vae(config, device)
    generator = torch.Generator().manual_seed(0)
    rollout.switch(torch.randn(1, PROMPT_TOKENS, config.model.transformer.text_dim, generator=generator))
    noise, digest = DrawnNoise(config.seed, rollout.shape), hashlib.sha256()
    times: defaultdict[str, list[float]] = defaultdict(list)
    for block in range(warmup + blocks):
        began = _now(device)
        latents = rollout.denoise_block(noise)[0]
        denoised = _now(device)
        if block < warmup - 1:
            continue  # the VAE's past is two latent frames, and it is the slow one
        for latent in latents:
            digest.update(to_rgb8(decoder.decode(latent[None])).cpu().numpy().tobytes())
        ended = _now(device)
        if block >= warmup:
            spans = {"denoiser": denoised - began, "vae_decoder": ended - denoised, "block": ended - began}
            for name, seconds in spans.items():
                times[name].append(1000 * seconds)
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


if __name__ == "__main__":
    main()
