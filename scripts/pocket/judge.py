"""Says what a video of the world shows, by classical vision: objects, their colour, shape and number, their motion.

Objects are bright and grounds are dark; the world is a torus, so what leaves on one side is one object with what enters
on the other. Nothing here is learned, and nothing knows what was asked for.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from skimage.measure import label

from pocket.captions import COLOURS, GROUNDS, SHAPES
from pocket.render import cover

BRIGHT = 140
"""Least value of an object's brightest channel."""
LEAST_AREA = 40
"""Pixels below which a bright spot is no object."""
SIZING = 0.15
"""Change of an object's size, in pixels a frame, below which it stands still."""
SPOT_AREA = 12
"""Pixels from which a bright spot that is no object counts as dirt."""


@dataclass(frozen=True)
class Seen:
    """One object of one frame: centre in pixels on the torus, pixels covered, colour, shape, how well that fits."""

    x: float
    y: float
    area: int
    colour: str
    shape: str
    fit: float


@dataclass(frozen=True)
class Ground:
    """What lies behind the objects of a frame: nearest colour name, mean colour, deviation over the frame."""

    name: str
    mean: tuple[float, float, float]
    deviation: float


def look(frame: np.ndarray) -> list[Seen]:
    """The objects of a frame [H, W, 3] uint8."""
    mask = frame.max(axis=2) >= BRIGHT
    return [_describe(frame, part) for part in _parts(mask) if part.sum() >= LEAST_AREA]


def ground(frame: np.ndarray) -> Ground:
    """What is behind the objects of a frame [H, W, 3] uint8."""
    mask = frame.max(axis=2) >= BRIGHT - 40
    near = mask.copy()
    for axis in (0, 1):
        for shift in (-2, -1, 1, 2):
            near |= np.roll(mask, shift, axis)
    pixels = frame[~near].astype(np.float64)
    if not len(pixels):
        return Ground("none", (0.0, 0.0, 0.0), 0.0)
    mean = pixels.mean(axis=0)
    name = min(GROUNDS, key=lambda g: float(np.square(mean - np.array(GROUNDS[g]) * 0.95).sum()))
    return Ground(name, tuple(mean.tolist()), float(pixels.std(axis=0).mean()))


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts, across the edges too."""
    labels = label(mask, connectivity=2)
    joined = {number: number for number in range(1, labels.max() + 1)}

    def root(number: int) -> int:
        while joined[number] != number:
            number = joined[number]
        return number

    for first, last in ((labels[0], labels[-1]), (labels[:, 0], labels[:, -1])):
        for shift in (-1, 0, 1):
            for a, b in zip(first, np.roll(last, shift), strict=True):
                if a and b:
                    joined[root(int(a))] = root(int(b))
    roots = np.array([0, *(root(number) for number in range(1, labels.max() + 1))])
    named = roots[labels]
    return [named == number for number in np.unique(named) if number]


def _describe(frame: np.ndarray, part: np.ndarray) -> Seen:
    x, y = _centre(part)
    height, width = part.shape
    inside = part & np.roll(part, 1, 0) & np.roll(part, -1, 0) & np.roll(part, 1, 1) & np.roll(part, -1, 1)
    pixels = frame[inside if inside.sum() >= 8 else part].astype(np.float64)
    middle = np.median(pixels, axis=0)
    colour = min(COLOURS, key=lambda name: _hue_distance(middle, COLOURS[name]))
    centred = np.roll(part, (height // 2 - round(y), width // 2 - round(x)), axis=(0, 1))
    shape, fit = _shape(centred)
    return Seen(x, y, int(part.sum()), colour, shape, fit)


def _hue_distance(pixel: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Between colours as if equally bright."""
    a, b = pixel / max(1.0, pixel.max()), np.array(colour) / max(colour)
    return float(np.square(a - b).sum())


def _centre(part: np.ndarray) -> tuple[float, float]:
    """Circular mean of the pixels: x, y."""
    rows, columns = np.nonzero(part)
    centre = []
    for values, size in ((columns, part.shape[1]), (rows, part.shape[0])):
        angles = (values + 0.5) * 2 * math.pi / size
        centre.append(math.atan2(np.sin(angles).mean(), np.cos(angles).mean()) * size / (2 * math.pi) % size)
    return centre[0], centre[1]


@dataclass(frozen=True)
class _Templates:
    """Pictures of all shapes in all sizes, a pixel off in each direction, smallest first.

    Attributes:
        pixels: [N, pixels] float32, 0 or 1.
        areas: [N], pixels covered.
        shapes: N names.
    """

    pixels: np.ndarray
    areas: np.ndarray
    shapes: tuple[str, ...]


HALF = 32
"""Half the side of the square that a shape is compared in."""


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    pixels, shapes = [], []
    for shape in SHAPES:
        for radius in range(14, 56):  # in half pixels
            track = torch.tensor([[HALF, HALF, radius / 2]], dtype=torch.float32)
            mask = cover(shape, track, 2 * HALF, 2 * HALF)[0].numpy() >= 0.5
            x, y = _centre(mask)
            mask = np.roll(mask, (HALF - round(y), HALF - round(x)), axis=(0, 1))
            pixels += [np.roll(mask, (dy, dx), axis=(0, 1)).ravel() for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            shapes += [shape] * 9
    stack = np.stack(pixels).astype(np.float32)
    areas = stack.sum(axis=1)
    order = areas.argsort(kind="stable")
    return _Templates(stack[order], areas[order], tuple(shapes[i] for i in order))


def _shape(part: np.ndarray) -> tuple[str, float]:
    """The shape whose picture of nearly the same area overlaps best; intersection over union."""
    rows, columns = part.shape[0] // 2, part.shape[1] // 2
    cut = part[rows - HALF : rows + HALF, columns - HALF : columns + HALF].ravel().astype(np.float32)
    area, among = cut.sum(), _templates()
    begin, end = np.searchsorted(among.areas, (0.82 * area, np.nextafter(1.22 * area, np.inf)))
    if begin == end:
        return "none", 0.0
    shared = among.pixels[begin:end] @ cut
    overlap = shared / (among.areas[begin:end] + area - shared)
    best = int(overlap.argmax())
    return among.shapes[begin + best], float(overlap[best])


def most(values: Sequence[object]) -> object:
    """The most frequent value, the first seen of equal ones; None of nothing."""
    return Counter(values).most_common(1)[0][0] if values else None


def motion(frames: Sequence[Sequence[Seen]], width: int, height: int) -> str:
    """How the objects of consecutive frames move, by the names of `captions.MOTIONS`; `none` without objects."""
    moves, sizes = [], []
    for before, after in pairwise(frames):
        if not before or len(before) != len(after):
            continue
        moves.append(_move(before, after, width, height))
        sizes.append(math.sqrt(np.mean([thing.area for thing in after])) - math.sqrt(np.mean([t.area for t in before])))
    if len(moves) < 4:
        return "none"
    steps = np.array(moves)
    mean, speed = steps.mean(axis=0), float(np.linalg.norm(_smoothed(steps), axis=1).mean())
    if np.linalg.norm(mean) > 0.7 and np.linalg.norm(mean) > 0.75 * speed:
        return _direction(mean)
    if speed > 0.7:
        return "bounce" if steps[:, 0].std() < 0.4 * steps[:, 1].std() else "circle"
    return _sizing(_smoothed(np.array(sizes)[:, None])[:, 0])


def _sizing(growth: np.ndarray) -> str:
    """Growing, shrinking or neither, from changes of size [n] in pixels a frame.

    What grows comes back faster than it grew: where sizes go both ways for a while, the slower way is the motion.
    """
    rising, falling = growth > SIZING, growth < -SIZING
    if np.mean(rising | falling) < 0.5:
        return "still"
    if min(rising.mean(), falling.mean()) < 0.2:
        return "grow" if rising.sum() > falling.sum() else "shrink"
    return "grow" if growth[rising].mean() < -growth[falling].mean() else "shrink"


def _move(before: Sequence[Seen], after: Sequence[Seen], width: int, height: int) -> tuple[float, float]:
    """Mean displacement, each object to the nearest of the next frame."""
    total = np.zeros(2)
    for thing in before:
        steps = [_wrapped(other.x - thing.x, other.y - thing.y, width, height) for other in after]
        total += min(steps, key=lambda step: step[0] ** 2 + step[1] ** 2)
    return tuple((total / len(before)).tolist())


def _wrapped(dx: float, dy: float, width: int, height: int) -> tuple[float, float]:
    return (dx + width / 2) % width - width / 2, (dy + height / 2) % height - height / 2


def _smoothed(steps: np.ndarray, over: int = 4) -> np.ndarray:
    """Running means over a few frames."""
    return np.stack([np.convolve(column, np.ones(over) / over, mode="valid") for column in steps.T], axis=1)


def _direction(mean: np.ndarray) -> str:
    angle = math.degrees(math.atan2(-mean[1], mean[0])) % 360
    names = {0: "right", 45: "diagonal up", 90: "up", 180: "left", 270: "down", 315: "diagonal down", 360: "right"}
    return names[min(names, key=lambda a: abs(a - angle))]
