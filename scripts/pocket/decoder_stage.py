"""The second stage: the VAE's decoder alone learns fine corners, and to change from frame to frame as the picture does.

Each latent frame becomes four frames in four ways, so that still pictures flicker in a rhythm, most where one latent
frame follows another. A small star is three latents wide and soon a disc: half of what is learned are parts of pictures
around objects, small stars above all, and what counts beside their colours is where their outline runs. Latents stay as
they are.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import SPATIAL_STRIDE, TEMPORAL_STRIDE
from pocket.autoencoder import Autoencoder, error_of, near_objects
from pocket.captions import Scene, draw_scene
from pocket.clips import Story, as_pixels, draw_frames, draw_story, smaller
from pocket.masters import Masters
from pocket.training import Training, steps
from pocket.world import HEIGHT, MARGIN, WIDTH, Start
from workers.models.vae import to_rgb8

FRAMES, STILL_FRAMES = 17, 37
SETTLED = 20
"""Changes at the beginning of a clip that do not count: the decoder has little past there and is not steady yet."""
CHANGE_WEIGHT = 60.0
OBJECT_WEIGHT = 12.0
"""As in `pocket.autoencoder`, where it is 3."""
OUTLINE_WEIGHT = 1.0
OUTLINE, SOFT = 0.1, 0.08
"""Where the brightest channel, of pixels in -1 to 1, tells an object from its ground, and how softly."""
SMALL_SHARE = 0.7
"""Clips whose objects are made small, those apart whose size is their motion."""
STAR_SHARE = 0.5
"""Small ones among them that are made stars."""
PART, MARGIN_CELLS = 8, 1
"""Latents a side of a part of a picture around objects; those at its rim lack their surroundings and do not count."""
BALANCE_WEIGHT = 0.3
LEAST_CHANGE = 1e-6
STEERING = 0.04
"""How fast what is asked for follows what is measured, at every MEASURED_EVERY steps."""
MEASURED_EVERY = 20


def train_decoder(run: Training, begin: Path | None = None) -> None:
    """The decoder on latents of the trained encoder; writes decoder.safetensors.

    A step takes `batch` parts around objects and a quarter as many whole pictures of scenes that stand still.
    """
    phase = run.recipe.decoder
    torch.manual_seed(run.seed + 20)
    model = Autoencoder(run.config.model.vae)
    model.load_file_tensors(load_file(begin or run.file("vae.safetensors")))
    model.to(run.device, torch.bfloat16)
    model.encoder.requires_grad_(False)
    masters = Masters({"decoder": model.decoder}, phase.rate, warm_up=20, decay=0.995)
    rng, half = np.random.default_rng((run.seed, 20)), run.recipe.decoder_clips // 2
    clips, latents = _clips(run, model, half, FRAMES, lambda: draw_story(rng, 3, 0.5))
    still_clips, still_latents = _clips(run, model, half, STILL_FRAMES, lambda: _still(rng))
    _, measured_latents = _clips(run, model, max(1, half // 5), STILL_FRAMES, lambda: _still(rng))
    asked, ratio = 0.0, 1.0
    for step, progress in steps(run, "decoder", phase, masters):
        chosen = torch.randint(half, (phase.batch,), device=clips.device)
        pixels, codes = around_objects(as_pixels(clips[chosen]), latents[chosen])
        made = model.decode(codes + 0.05 * torch.randn_like(codes)).float()
        made, pixels = (_inside(part) for part in (made, pixels))
        error, edges = error_of(made, pixels, OBJECT_WEIGHT)
        outline = outline_error(made, pixels)
        (error + 0.5 * edges + OUTLINE_WEIGHT * outline).backward()
        chosen = torch.randint(half, (max(1, phase.batch // 4),), device=clips.device)
        pixels = as_pixels(still_clips[chosen])
        made = model.decode(still_latents[chosen]).float()  # noise would be one more change where latent frames meet
        calm, calm_edges = error_of(made, pixels, OBJECT_WEIGHT)
        at_edges, elsewhere = changes(made, pixels)
        change = (at_edges + 3 * elsewhere).mean()
        uneven = (((at_edges + LEAST_CHANGE) / (elsewhere + LEAST_CHANGE)).log() - asked).square().mean()
        (calm + 0.5 * calm_edges + CHANGE_WEIGHT * change + BALANCE_WEIGHT * uneven).backward()
        masters.step(progress)
        if step % MEASURED_EVERY == 0:
            masters.show_average()
            ratio = edge_ratio(model, measured_latents)
            masters.show_masters()
            asked -= STEERING * math.log(ratio)
        if step % run.recipe.look == 0:
            numbers = {"error": error, "outline": outline, "calm": calm, "change": change, "uneven": uneven}
            said = {name: float(value.detach()) for name, value in numbers.items()}
            run.log("decoder", step=step, **said, ratio=ratio, asked=asked)
            masters.show_average()
            _save(model, run.file("decoder_so_far.safetensors"))
            masters.show_masters()
    masters.show_average()
    _save(model, run.file("decoder.safetensors"))


def _save(model: Autoencoder, path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in model.file_tensors().items()}, path)


def around_objects(pixels: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each clip with most of its objects in it.

    Args:
        pixels: [B, F, 3, H, W] in -1 to 1.
        latents: [B, f, 16, H / 8, W / 8].

    Returns:
        The same with a height and width of PART latents.
    """
    bright = near_objects(pixels).mean(dim=(1, 2))
    cells = F.avg_pool2d(bright.float()[:, None], SPATIAL_STRIDE)
    parts = F.avg_pool2d(cells, PART, stride=1)[:, 0]
    places = parts.flatten(1).argmax(dim=1).tolist()
    columns = parts.shape[2]
    cut_pixels, cut_latents = [], []
    for clip, codes, place in zip(pixels, latents, places, strict=True):
        top, left = place // columns, place % columns
        cut_latents.append(codes[..., top : top + PART, left : left + PART])
        rows, across = (slice(at * SPATIAL_STRIDE, (at + PART) * SPATIAL_STRIDE) for at in (top, left))
        cut_pixels.append(clip[..., rows, across])
    return torch.stack(cut_pixels), torch.stack(cut_latents)


def _inside(part: Tensor) -> Tensor:
    rim = MARGIN_CELLS * SPATIAL_STRIDE
    return part[..., rim:-rim, rim:-rim]


def outline_error(made: Tensor, pixels: Tensor) -> Tensor:
    """Share of pixels near objects that are on the wrong side of OUTLINE, softly; [B, F, 3, H, W] in -1 to 1."""
    near = near_objects(pixels)
    sides = [torch.sigmoid((part.amax(dim=2, keepdim=True) - OUTLINE) / SOFT) for part in (made, pixels)]
    return (near * (sides[0] - sides[1]).abs()).sum() / near.sum().clamp(min=1)


def changes(made: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Each clip's mean squared error of the change from frame to frame, where a latent frame begins and elsewhere: [B].

    Args:
        made, pixels: [B, 1 + 4k, 3, H, W], or with their channels last.
    """
    off = (made - pixels).diff(dim=1).square().mean(dim=(2, 3, 4))[:, SETTLED:]
    edge = torch.arange(SETTLED, SETTLED + off.shape[1], device=off.device) % TEMPORAL_STRIDE == 0
    return off[:, edge].mean(dim=1), off[:, ~edge].mean(dim=1)


@torch.no_grad()
def edge_ratio(model: Autoencoder, latents: Tensor) -> float:
    """`changes` at edges over those elsewhere, of stills as they are seen: decoded in float32, shown in 8 bits.

    Args:
        latents: [N, 1 + k, 16, h, w] of scenes that stand still.
    """
    exact = deepcopy(model).float()
    seen = []
    for part in latents.split(4):
        made = to_rgb8(exact.decode(part.float())).float()
        seen.append(torch.stack(changes(made, made[:, :1]), dim=1))
    at_edges, elsewhere = torch.cat(seen).mean(dim=0).tolist()
    return (at_edges + LEAST_CHANGE) / (elsewhere + LEAST_CHANGE)


@torch.no_grad()
def _clips(
    run: Training, model: Autoencoder, count: int, length: int, draw: Callable[[], Story]
) -> tuple[Tensor, Tensor]:
    """Clips [N, F, H, W, 3] uint8 of stories, most of them with small objects, and their latents [N, f, 16, h, w]."""
    rng = np.random.default_rng((run.seed, 21))
    frames, latents = [], []
    for _ in range(count):
        story = draw()
        if rng.random() < SMALL_SHARE:
            star = rng.random() < STAR_SHARE
            story = replace(story, first=_small(story.first, star), second=_small(story.second, star))
        frames.append(draw_frames(story, length, run.device))
        pixels = as_pixels(frames[-1])[None].to(torch.bfloat16)
        latents.append(model.moments(pixels)[0][0].to(torch.bfloat16))
    return torch.stack(frames), torch.stack(latents)


def _small(scene: Scene, star: bool) -> Scene:
    return replace(smaller(scene), shape="star" if star else scene.shape)


def _still(rng: np.random.Generator) -> Story:
    while True:
        scene = draw_scene(rng, held_out=False)
        if scene.motion == "still":
            start = Start(rng.uniform(MARGIN, WIDTH - MARGIN), rng.uniform(MARGIN, HEIGHT - MARGIN))
            return Story(start, scene, "", scene, "", 0)
