"""The first stage: the VAE, learned from pixels."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocket.autoencoder import Autoencoder, loss_of, psnr, statistics
from pocket.clips import as_pixels, draw_frames, draw_story
from pocket.masters import Masters
from pocket.training import Training, steps

PICTURE_FRAMES = 33
"""Frames of a clip of which the VAE sees parts."""


def train_vae(run: Training, begin: Path | None = None) -> None:
    """Encoder and decoder; writes vae.safetensors and statistics.json."""
    phase, device = run.recipe.vae, run.device
    torch.manual_seed(run.seed)
    model = Autoencoder(run.config.model.vae)
    if begin is not None:
        model.load_file_tensors(load_file(begin))
    model.to(device, torch.bfloat16)
    masters = Masters({"vae": model}, phase.rate, decay=0.998)
    pictures = _pictures(run, run.recipe.pictures, run.seed, held_out=False)
    held_out = _pictures(run, max(4, run.recipe.pictures // 50), run.seed + 1, held_out=True)
    for step, progress in steps(run, "vae", phase, masters):
        pixels = _crop(pictures, phase.batch, run.recipe.picture_frames, small=begin is None and progress < 0.35)
        loss, parts = loss_of(model, pixels.to(torch.bfloat16))
        loss.backward()
        norm = masters.step(progress)
        if step % run.recipe.look == 0:
            masters.show_average()
            quality = _quality(model, held_out)
            masters.show_masters()
            run.log(
                "vae", step=step, **{k: float(v.detach()) for k, v in parts.items()}, norm=float(norm), psnr=quality
            )
    masters.show_average()
    with torch.no_grad():
        batches = [pictures[i : i + 8] for i in range(0, min(400, len(pictures)), 8)]
        mean, std = statistics(model, batches)
    run.file("statistics.json").write_text(json.dumps({"mean": mean, "std": std}), encoding="utf-8")
    save_file({n: t.contiguous().cpu() for n, t in model.file_tensors().items()}, run.file("vae.safetensors"))
    run.log("vae", step=-1, psnr=_quality(model, held_out))


def _pictures(run: Training, count: int, seed: int, held_out: bool) -> Tensor:
    rng = np.random.default_rng(seed)
    stories = [draw_story(rng, 4, 0.5, held_out) for _ in range(count)]
    return torch.stack([draw_frames(story, PICTURE_FRAMES, run.device) for story in stories])


def _crop(pictures: Tensor, batch: int, frames: int, small: bool) -> Tensor:
    """Random parts of clips as pixels: first many small ones, later fewer whole ones."""
    count, frames = (batch * 8, 5) if small else (batch, frames)
    chosen = torch.randint(len(pictures), (count,), device=pictures.device)
    begin = int(torch.randint(PICTURE_FRAMES - frames + 1, ()))
    clips = pictures[chosen, begin : begin + frames]
    if small:
        top, left = int(torch.randint(9, ())) * 6, int(torch.randint(17, ())) * 7
        clips = clips[:, :, top : top + 48, left : left + 48]
    return as_pixels(clips)


@torch.no_grad()
def _quality(model: Autoencoder, pictures: Tensor) -> float:
    out = []
    for clips in pictures.split(8):
        pixels = as_pixels(clips)
        mean, _ = model.moments(pixels.to(torch.bfloat16))
        out.append(psnr(model.decode(mean.to(torch.bfloat16)).float(), pixels))
    return float(torch.cat(out).mean())


def load_autoencoder(run: Training) -> tuple[Autoencoder, tuple[list[float], list[float]]]:
    """The trained VAE and its statistics."""
    model = Autoencoder(run.config.model.vae)
    model.load_file_tensors(load_file(run.file("vae.safetensors")))
    found = json.loads(run.file("statistics.json").read_text(encoding="utf-8"))
    return model.to(run.device, torch.bfloat16), (found["mean"], found["std"])
