"""What is measured of the embedded model: streams of one prompt, prompt switches, long streams, the VAE.

Each figure is a list of outcomes under a name; a block's outcome is what most of its frames show. Knows no bar.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from configs.schema import RuntimeConfig
from pocket.captions import Scene, draw_scene, phrase
from pocket.clips import (
    CHANGES,
    FIRST,
    LATER,
    START_X,
    START_Y,
    Story,
    as_pixels,
    changed,
    draw_frames,
    draw_story,
    frames_of,
)
from pocket.judge import Ground, Seen, ground, look, most, motion
from pocket.world import HEIGHT, WIDTH, Start
from workers.models.checkpoint import load_vae_decoder, load_vae_encoder
from workers.models.vae import VaeDecoder, to_rgb8
from workers.models.vae_encoder import VaeEncoder

FPS = 16
TEN_SECONDS = 14
"""Blocks of a stream of 10 s."""
SWITCHED_AT = (5, 20)
AFTER_SWITCH = 8
"""Blocks looked at after a switch."""
SOON = 2
"""Blocks within which a new attribute has to be on screen."""
LONG = 241
"""Blocks of a stream of 3 minutes."""
VAE_BLOCKS = 5
SAME_GROUND = 16.0
"""Largest distance of two grounds' mean colours, of 255, that counts as kept."""

Progress = Callable[[str], None]


@dataclass
class Scores:
    """Outcomes by name: 0 or 1, or a measure."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, outcome: float) -> None:
        self.values.setdefault(name, []).append(float(outcome))

    def mean(self, name: str) -> float:
        return float(np.mean(self.values[name]))

    def summary(self) -> dict[str, dict[str, float]]:
        """By name, the mean and how many outcomes it is of."""
        return {name: {"mean": self.mean(name), "of": len(values)} for name, values in self.values.items()}


@dataclass(frozen=True)
class Block:
    """What a block shows: what most frames have, and all that was seen in each."""

    count: int
    colour: str | None
    shape: str | None
    ground: Ground
    frames: tuple[tuple[Seen, ...], ...]


def by_block(video: np.ndarray, first: int = 0) -> list[Block]:
    """The blocks of a stream's frames [F, H, W, 3], which begin with those of block `first`."""
    edges = [0, FIRST if first == 0 else LATER]
    while edges[-1] + LATER <= len(video):
        edges.append(edges[-1] + LATER)
    return [_block(video[begin:end]) for begin, end in pairwise(edges)]


def _block(frames: np.ndarray) -> Block:
    seen = tuple(tuple(look(frame)) for frame in frames)
    things = [thing for frame in seen for thing in frame]
    return Block(
        count=int(str(most([len(frame) for frame in seen]))),
        colour=_text(most([thing.colour for thing in things])),
        shape=_text(most([thing.shape for thing in things])),
        ground=ground(frames[len(frames) // 2]),
        frames=seen,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def moves(blocks: Sequence[Block]) -> str:
    """How the objects of consecutive blocks move."""
    return motion([frame for block in blocks for frame in block.frames], WIDTH, HEIGHT)


def score_stream(scores: Scores, scene: Scene, blocks: Sequence[Block], prefix: str = "") -> None:
    """How well blocks, the first of a stream left out, show a scene."""
    for block in blocks:
        scores.add(f"{prefix}presence", block.count > 0)
        scores.add(f"{prefix}colour", block.colour == scene.colour)
        scores.add(f"{prefix}shape", block.shape == scene.shape)
        scores.add(f"{prefix}count", block.count == scene.count)
        scores.add(f"{prefix}ground", block.ground.name == scene.ground)
    scores.add(f"{prefix}motion", moves(blocks) == scene.motion)


def judge_accuracy(scores: Scores, seed: int, clips: int, say: Progress) -> None:
    """What the judge says of rendered videos, half as many of them with a change, against what was rendered."""
    rng, own = np.random.default_rng((seed, 1)), Scores()
    for number in range(clips):
        story = draw_story(rng, TEN_SECONDS, 0.0)
        video = draw_frames(story, frames_of(TEN_SECONDS), torch.device("cpu")).numpy()
        score_stream(own, story.second, by_block(video)[1:])
        say(f"judge {number + 1}/{clips}")
    for what, at, before, after in _switched_scenes(rng, clips // 2):
        story = Story(Start(rng.uniform(*START_X), rng.uniform(*START_Y)), before, "", after, "", at)
        seen = by_block(draw_frames(story, frames_of(at + AFTER_SWITCH), torch.device("cpu")).numpy())
        own.add("switch", _in_time(first_shown(what, after, seen, at)))
        say(f"judge, a {what} that changes")
    for name, values in own.values.items():
        for value in values:
            scores.add("judge", value)
            scores.add(f"judge, {name}", value)


Make = Callable[[Sequence[str], int, int, Sequence[int]], np.ndarray]
"""Prompts, blocks, seed and the blocks at which further prompts take effect, to frames [F, H, W, 3]."""
Wanted = tuple[Sequence[str], int, int, Sequence[int]]
"""The arguments of a `Make`."""


def made(make: Make, wanted: Sequence[Wanted], at_once: int) -> Iterator[np.ndarray]:
    """The videos in order; of several at once, each in a thread, some are made while the one before is looked at."""
    if at_once == 1:
        yield from (make(*video) for video in wanted)
        return
    with ThreadPoolExecutor(at_once) as pool:
        begun = deque(pool.submit(make, *video) for video in wanted[:at_once])
        for video in wanted[at_once:]:
            done = begun.popleft().result()
            begun.append(pool.submit(make, *video))
            yield done
        while begun:
            yield begun.popleft().result()


def fresh_streams(
    scores: Scores,
    make: Make,
    seed: int,
    streams: int,
    say: Progress,
    blocks: int = TEN_SECONDS,
    at_once: int = 1,
) -> None:
    """Streams of one caption whose scene was held out of training; `at_once` of them are made at a time."""
    rng, scenes, wanted = np.random.default_rng((seed, 2)), [], []
    for number in range(streams):
        scenes.append(draw_scene(rng, held_out=True))
        wanted.append(([phrase(scenes[-1], rng)], blocks, seed * 1000 + number, ()))
    for number, (scene, video) in enumerate(zip(scenes, made(make, wanted, at_once), strict=True)):
        (caption,), seen = wanted[number][0], by_block(video)
        score_stream(scores, scene, seen[1:])
        say(f"stream {number + 1}/{streams}: {caption}: {_short(seen[1:])}, {moves(seen[1:])}")


def _short(blocks: Sequence[Block]) -> str:
    middle = blocks[len(blocks) // 2]
    return f"{middle.count} {middle.colour} {middle.shape} on {middle.ground.name}"


def switches(
    scores: Scores,
    make: Make,
    seed: int,
    count: int,
    say: Progress,
    places: Sequence[int] = SWITCHED_AT,
    at_once: int = 1,
    looked_at: int = AFTER_SWITCH,
) -> None:
    """Streams with one prompt switch that changes one thing: is it on screen soon, and does the rest stay.

    All kinds of change at the first of `places` come before those at the next; `at_once` are made at a time.
    `looked_at` blocks are judged from the switch on.
    """
    rng, changes, wanted = np.random.default_rng((seed, 3)), [], []
    for number, change in enumerate(_switched_scenes(rng, count, places)):
        _, at, before, after = change
        changes.append(change)
        wanted.append(([phrase(before, rng), phrase(after, rng)], at + looked_at, seed * 1000 + 500 + number, (at,)))
    for number, (change, video) in enumerate(zip(changes, made(make, wanted, at_once), strict=True)):
        (what, at, before, after), prompts, seen = change, wanted[number][0], by_block(video)
        soon = first_shown(what, after, seen, at)
        scores.add("switched within 2 blocks", _in_time(soon))
        scores.add(f"switched {what}", _in_time(soon))
        scores.add(f"switched at block {at}", _in_time(soon))
        kept = keeps(what, before, after, seen, at)
        for name, held in kept.items():
            scores.add("kept", held)
            scores.add(f"kept {name}", held)
        lost = ", ".join(name for name, held in kept.items() if not held)
        say(
            f"switch {number + 1}/{count}: {' -> '.join(prompts)}: after {soon} blocks"
            + (f", lost {lost}" * bool(lost))
        )


def _switched_scenes(
    rng: np.random.Generator, count: int, places: Sequence[int] = SWITCHED_AT
) -> Iterator[tuple[str, int, Scene, Scene]]:
    """What changes, at which block, the scene before and the one after."""
    for number in range(count):
        what = CHANGES[number % len(CHANGES)]
        before = draw_scene(rng)
        yield what, places[number // len(CHANGES) % len(places)], before, changed(before, what, rng, None)


def _in_time(blocks: int | None) -> bool:
    return blocks is not None and blocks <= SOON


def first_shown(what: str, scene: Scene, seen: Sequence[Block], at: int) -> int | None:
    """After how many blocks a new attribute is on screen; None for never."""
    for block in range(at, len(seen)):
        if what == "motion":
            shown = block + MOTION_BLOCKS <= len(seen) and moves(seen[block : block + MOTION_BLOCKS]) == scene.motion
        elif what == "ground":
            shown = seen[block].ground.name == scene.ground
        else:
            shown = getattr(seen[block], what) == getattr(scene, what)
        if shown:
            return block - at
    return None


MOTION_BLOCKS = 4
"""Blocks in which a motion can be told: the slowest, circling, takes as long."""


def keeps(what: str, before: Scene, after: Scene, seen: Sequence[Block], at: int) -> dict[str, bool]:
    """Whether what both prompts ask for stays on screen: from two blocks after the switch on, in most blocks."""
    later, old = seen[at + SOON :], seen[at - 1]
    out = {}
    for name in ("colour", "shape", "count"):
        if name != what and getattr(before, name) == getattr(after, name):
            out[name] = np.mean([getattr(block, name) == getattr(after, name) for block in later]) >= 0.5
    if what != "ground":
        off = [np.linalg.norm(np.subtract(block.ground.mean, old.ground.mean)) for block in later]
        out["ground"] = bool(np.median(off) <= SAME_GROUND)
    return out


def drift(
    scores: Scores, make: Make, seed: int, streams: int, say: Progress, blocks: int = LONG, at_once: int = 1
) -> None:
    """Long streams, `at_once` made at a time: the first 10 s, their first block left out, against the last."""
    rng, scenes, wanted = np.random.default_rng((seed, 4)), [], []
    for number in range(streams):
        scenes.append(draw_scene(rng))
        wanted.append(([phrase(scenes[-1], rng)], blocks, seed * 1000 + 900 + number, ()))
    for number, (scene, video) in enumerate(zip(scenes, made(make, wanted, at_once), strict=True)):
        (caption,) = wanted[number][0]
        parts = {"first 10 s, ": video[FIRST : FIRST + 10 * FPS], "last 10 s, ": video[-LATER * (TEN_SECONDS - 1) :]}
        sharp = {}
        for prefix, frames in parts.items():
            score_stream(scores, scene, by_block(frames, first=1), prefix)
            sharp[prefix] = sharpness(frames)
        first, last = sharp.values()
        scores.add("sharpness, last 10 s / first", last / first)
        say(f"long {number + 1}/{streams}: {caption}: sharpness {last / first:.3f}")


def sharpness(frames: np.ndarray) -> float:
    """Mean energy of the Laplacian of brightness, which is the mean of the channels."""
    grey = frames.mean(axis=3)
    centre = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.square(around - 4 * centre).mean())


@torch.inference_mode()
def vae_quality(scores: Scores, config: RuntimeConfig, seed: int, clips: int, say: Progress) -> None:
    """PSNR of held-out clips encoded and decoded; and how much still ones change where blocks meet."""
    rng, device = np.random.default_rng((seed, 5)), torch.device("cpu")
    encoder, decoder = load_vae_encoder(config.model, device), load_vae_decoder(config.model, device)
    at_edges, elsewhere = [], []
    for number in range(clips):
        still = number % 2 == 0
        story = draw_story(rng, VAE_BLOCKS, 0.0, held_out=True)
        if still:
            scene = replace(story.second, count=1, motion="still")
            story = replace(story, first=scene, second=scene, start=Start(WIDTH / 2, HEIGHT / 2))
        frames = draw_frames(story, frames_of(VAE_BLOCKS), device)
        made = _through(encoder, decoder, frames)
        error = float((made.float() - frames.float()).square().mean())
        kind = "plain" if story.second.texture == "plain" else "textured"
        scores.add(f"VAE {kind} dB", 10 * np.log10(255**2 / error))
        if still:
            edges, others = changes_at_edges(made.numpy())
            at_edges.append(edges)
            elsewhere.append(others)
        say(f"VAE {number + 1}/{clips}: {phrase(story.second, rng)}")
    scores.add("change at block edges / elsewhere", float(np.mean(at_edges) / np.mean(elsewhere)))


def _through(encoder: VaeEncoder, decoder: VaeDecoder, frames: Tensor) -> Tensor:
    """Frames [F, H, W, 3] uint8 encoded and decoded."""
    cache = decoder.new_cache()
    latents = encoder.encode(as_pixels(frames)[None])
    return torch.cat([to_rgb8(decoder.decode(latent, cache))[0] for latent in latents.unbind(1)])


def changes_at_edges(video: np.ndarray) -> tuple[float, float]:
    """Mean squared change from frame to frame of a stream where blocks meet, and elsewhere; not at its beginning."""
    change = np.square(np.diff(video.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))
    later = np.arange(1, len(video))
    settled, edge = later >= FIRST + LATER, (later - FIRST) % LATER == 0
    return float(change[settled & edge].mean()), float(change[settled & ~edge].mean())
