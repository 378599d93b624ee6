"""Clips to learn from: scenes, with a change of scene or without, as pixels and as latents.

Knows the world and the VAE; knows no transformer and no loss.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pocket.captions import GROUNDS, Scene, draw_scene, phrase
from pocket.render import render
from pocket.world import Start, tracks

FIRST, LATER = 9, 12
"""Frames of block 0 and of every later block."""
START_X, START_Y = (16.0, 144.0), (16.0, 80.0)
"""Where a stream's first object may be, in pixels."""
CHANGES = ("colour", "shape", "motion", "ground")
"""What a change of scene may change alone."""
LEARNED_SHARE = (0.1, 0.4, 0.35, 0.15)
"""How often each of them does in what is learned; shapes are the hardest to let go of, then motions."""
SIZING_SHARE = 0.3
"""How often a new motion is growing or shrinking: what it goes on from is a size as well."""


SLID = 5
"""The first block before which the window has slid: from there on a switch keeps the sink of the scene before."""


@dataclass(frozen=True)
class Story:
    """What a clip shows: a scene, and from a block on perhaps another.

    Attributes:
        block: the first block of the second scene, 0 where there is none.
    """

    start: Start
    first: Scene
    first_caption: str
    second: Scene
    second_caption: str
    block: int

    def scenes(self) -> list[Scene]:
        """The scene of every frame until the last one stays."""
        return [self.first] * (FIRST + LATER * (self.block - 1)) + [self.second] if self.block else [self.second]


def frames_of(blocks: int) -> int:
    """Frames of so many blocks from the first of a stream."""
    return FIRST + LATER * (blocks - 1)


def draw_story(
    rng: np.random.Generator, blocks: int, switching: float, held_out: bool = False, small: float = 0.0
) -> Story:
    """A story at random; a share of them changes scene at a block between 1 and the last but one, half from SLID on.

    Args:
        small: the share whose objects are made small, but for those whose size is their motion.
    """
    start = Start(rng.uniform(*START_X), rng.uniform(*START_Y))
    shrunk = rng.random() < small
    second = draw_scene(rng, held_out)
    second = smaller(second) if shrunk else second
    if rng.random() >= switching or blocks < 3:
        caption = phrase(second, rng)
        return Story(start, second, caption, second, caption, 0)
    first = draw_scene(rng, held_out)
    first = smaller(first) if shrunk else first
    if rng.random() < 0.75:
        what = CHANGES[int(rng.choice(len(CHANGES), p=LEARNED_SHARE))]
        second = changed(first, what, rng, False if not held_out else None)
        if what == "motion" and rng.random() < SIZING_SHARE:
            sized = replace(second, motion=str(rng.choice(("grow", "shrink"))), size="medium")
            second = sized if sized.held_out == held_out else second
    earliest = SLID if rng.random() < 0.5 and blocks - 1 > SLID else 1
    block = int(rng.integers(earliest, blocks - 1))
    return Story(start, first, phrase(first, rng), second, phrase(second, rng), block)


def smaller(scene: Scene) -> Scene:
    """The scene with small objects; the same one where their size is their motion."""
    return scene if scene.motion in ("grow", "shrink") else replace(scene, size="small")


def changed(scene: Scene, what: str, rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """A scene that differs from another in one attribute."""
    while True:
        other = draw_scene(rng)
        if what == "ground":
            made = replace(scene, ground=other.ground, texture=other.texture)
            if scene.ground not in GROUNDS or made.ground == scene.ground:
                continue
        else:
            made = replace(scene, **{what: getattr(other, what)})
        if what == "motion" and made.motion in ("grow", "shrink"):
            made = replace(made, size="medium")
        if made != scene and (what == "ground" or held_out is None or made.held_out == held_out):
            return made


def draw_frames(story: Story, frames: int, device: torch.device) -> Tensor:
    """A story's first frames, [frames, H, W, 3] uint8."""
    scenes = story.scenes()
    return render(scenes, tracks(scenes, story.start, frames), device)


def as_pixels(frames: Tensor) -> Tensor:
    """[..., H, W, 3] uint8 -> [..., 3, H, W] float32 in -1 to 1."""
    return frames.movedim(-1, -3).float() / 127.5 - 1
