"""The stories of a run as latents: drawn, rendered and encoded once, then kept in the run's folder."""

import time

import torch

from pocket.pool import Pool, draw_stories, encode
from pocket.training import Training
from pocket.vae_stage import load_autoencoder


def pool(run: Training, name: str) -> Pool:
    """Stories to learn from (`openings`, `short`, `long`) or to look at (`held_out`), as latents; made once."""
    path = run.file(f"pool_{name}.pt")
    if name not in run.pools and path.exists():
        run.pools[name] = Pool(**torch.load(path, map_location=run.device, weights_only=True))
    if name not in run.pools:
        recipe = run.recipe
        count, blocks, seed, switching = {
            "openings": (recipe.openings, 1, 13, 0.0),
            "short": (recipe.clips, recipe.blocks, 10, 0.6),
            "long": (recipe.long_clips, recipe.long_blocks, 11, 0.8),
            "held_out": (max(4, recipe.clips // 100), recipe.blocks, 12, 0.0),
        }[name]
        began = time.monotonic()
        model, measured = load_autoencoder(run)
        stories = draw_stories(count, blocks, run.seed * 100 + seed, switching, run.workers if count > 500 else 1)
        drawn = time.monotonic() - began
        at_once = 48 if run.device.type == "cuda" else 4
        run.pools[name] = encode(stories, model, measured, run.device, at_once, lambda done: None)
        torch.save(vars(run.pools[name]), path)
        run.log("latents", clips=count, blocks=blocks, draw_s=drawn, all_s=time.monotonic() - began)
    return run.pools[name]
