"""Pictures of a run: loss curves and sheets of frames, as PNG."""

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from pocket.training import Training
from pocket.vae_stage import load_autoencoder

EVERY = 8
"""Frames from one picture of a sheet's row to the next."""


def save_sheet(run: Training, stage: str, made: Tensor, right: Tensor) -> None:
    """Frames of latents [B, T, 16, h, w]: every other row what was made, every other what was right."""
    model, (mean, std) = load_autoencoder(run)
    offset, scale = (torch.tensor(v, device=run.device)[:, None, None] for v in (mean, std))
    rows = []
    for ours, theirs in zip(made, right, strict=True):
        both = torch.stack([ours, theirs]) * scale + offset
        pixels = model.decode(both.to(torch.bfloat16)).float()
        frames = ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 1, 3, 4, 2)
        rows += [torch.cat(list(video[::EVERY]), dim=1) for video in frames]
    imsave(run.file(f"{stage}_sheet.png"), torch.cat(rows).cpu().numpy())


def save_curves(folder: Path) -> None:
    """One picture of all curves that stages have left in a folder: losses, and errors of held-out rollouts by block."""
    found = [path for path in sorted(folder.glob("*.jsonl")) if not path.stem.endswith("_end")]
    curves = {path.stem: _read(path) for path in found}
    curves = {name: lines for name, lines in curves.items() if len(lines) > 1 and "step" in lines[0]}
    if not curves:
        return
    figure = Figure(figsize=(9, 3 * len(curves)), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True):
        steps = [line["step"] for line in lines]
        for key in (key for key in lines[0] if key not in ("step", "block", "norm")):
            axes.plot(steps, [line.get(key) for line in lines], label=key, linewidth=1)
        axes.set_title(name)
        axes.set_yscale("log")
        axes.legend(fontsize="small", ncols=4)
    figure.savefig(folder / "curves.png", dpi=100)


def _read(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.get("step", 0) >= 0]
