"""Stories as latents, made once and kept on the device that learns from them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import SPATIAL_STRIDE, TEMPORAL_STRIDE
from pocket.autoencoder import Autoencoder, near_objects
from pocket.clips import Story, as_pixels, draw_story, frames_of
from pocket.forcing import Batch
from pocket.render import render
from pocket.world import tracks
from workers.models.prompt_text import clean, pocket_tokenizer

OBJECT_SHARE = 0.6
"""What errors near objects count for in a frame, however small the objects; their fine corners are few latents."""
SMALL_SHARE = 0.35
"""Stories whose objects are made small: these are the ones that are lost, or lose their corners."""
MOST_TOKENS = 40
"""Longer than any caption of the grammar."""


@dataclass(frozen=True)
class Pool:
    """Stories as tensors.

    Attributes:
        latents: [N, T, 16, h, w] bfloat16, normalised.
        near: [N, T, h, w] bool, where objects are.
        start: [N, 2] pixels.
        block: [N], where the scene changes.
        first, second: [N, MOST_TOKENS], token ids of the captions before and after.
    """

    latents: Tensor
    near: Tensor
    start: Tensor
    block: Tensor
    first: Tensor
    second: Tensor

    def to(self, device: torch.device) -> "Pool":
        return Pool(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def batch(self, chosen: Tensor, block: int = 0) -> Batch:
        """Some clips, of which all change scene at the same block."""
        latents, weight = self.latents[chosen].float(), shared_weight(self.near[chosen, :, None])
        return Batch(latents, weight, self.start[chosen], block, self.first[chosen], self.second[chosen])

    def chosen(self, count: int, generator: torch.Generator, block: int | None = None) -> Tensor:
        """Indices of random clips; with `block` only those that change there."""
        if block is None:
            return torch.randint(len(self.block), (count,), generator=generator).to(self.block.device)
        among = torch.nonzero(self.block == block)[:, 0]
        return among[torch.randint(len(among), (count,), generator=generator).to(among.device)]


def shared_weight(near: Tensor) -> Tensor:
    """[..., h, w] bool -> what an error in each latent counts: mean 1 in a frame, OBJECT_SHARE of it near objects."""
    part = near.float().mean(dim=(-2, -1), keepdim=True)
    both = (part > 0) & (part < 1)
    weight = torch.where(near, OBJECT_SHARE / part.clamp(min=1e-6), (1 - OBJECT_SHARE) / (1 - part).clamp(min=1e-6))
    return torch.where(both, weight, 1.0)


def token_ids(captions: Sequence[str]) -> Tensor:
    """[N, MOST_TOKENS] int64, 0 after a caption's end."""
    tokenizer = pocket_tokenizer()
    out = torch.zeros(len(captions), MOST_TOKENS, dtype=torch.int64)
    for row, caption in zip(out, captions, strict=True):
        ids = tokenizer.ids(clean(caption))
        row[: len(ids)] = torch.tensor(ids)
    return out


def draw_stories(count: int, blocks: int, seed: int, switching: float, workers: int) -> list[tuple[Story, np.ndarray]]:
    """Stories with their tracks, the same whatever the number of processes."""
    jobs = [(blocks, seed, number, switching) for number in range(count)]
    if workers < 2:
        return [_draw(job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
        return list(processes.map(_draw, jobs, chunksize=64))


def _draw(job: tuple[int, int, int, float]) -> tuple[Story, np.ndarray]:
    blocks, seed, number, switching = job
    story = draw_story(np.random.default_rng((seed, number)), blocks, switching, small=SMALL_SHARE)
    return story, tracks(story.scenes(), story.start, frames_of(blocks))


def cells_near_objects(pixels: Tensor) -> Tensor:
    """Which latents an object within a cell of them shapes: [B, 1 + 4k, 3, H, W] -> [B, 1 + k, H / 8, W / 8]."""
    bright = near_objects(pixels)[:, :, 0].float()
    cells = F.max_pool2d(bright, 3 * SPATIAL_STRIDE, stride=SPATIAL_STRIDE, padding=SPATIAL_STRIDE)
    later = cells[:, 1:].unflatten(1, (-1, TEMPORAL_STRIDE)).amax(dim=2)
    return torch.cat([cells[:, :1], later], dim=1) > 0


@torch.no_grad()
def encode(
    stories: Sequence[tuple[Story, np.ndarray]],
    model: Autoencoder,
    statistics: tuple[Sequence[float], Sequence[float]],
    device: torch.device,
    at_once: int,
    on_clip: Callable[[int], None],
) -> Pool:
    """Renders and encodes stories."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in statistics)
    dtype = model.encoder.conv1.weight.dtype
    pieces, near = [], []
    for begin in range(0, len(stories), at_once):
        part = stories[begin : begin + at_once]
        pixels = as_pixels(torch.stack([render(story.scenes(), track, device) for story, track in part]))
        latents, _ = model.moments(pixels.to(dtype))
        pieces.append(((latents - mean) / std).to(torch.bfloat16))
        near.append(cells_near_objects(pixels))
        on_clip(begin + len(part))
    told = [story for story, _ in stories]
    return Pool(
        torch.cat(pieces),
        torch.cat(near),
        torch.tensor([(story.start.x, story.start.y) for story in told]),
        torch.tensor([story.block for story in told]),
        token_ids([story.first_caption for story in told]),
        token_ids([story.second_caption for story in told]),
    ).to(device)
