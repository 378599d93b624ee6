"""From tracks to pixels: anti-aliased shapes on plain or textured grounds.

Shapes are signed distances in pixels, so that edges cover pixels by their share. Knows no motion and no captions.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pocket.captions import COLOURS, GROUNDS, Scene
from pocket.world import HEIGHT, WIDTH

PERIOD = 16
"""Pixels after which a texture repeats."""
LIGHT, DARK = 1.25, 0.65
"""What a texture multiplies its ground by."""


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.95


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.85


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    sides = (1.65 * u.abs() - (v + 1)) / math.hypot(1.65, 1)
    return torch.maximum(v - 0.75, sides)


def _star(u: Tensor, v: Tensor) -> Tensor:
    tenth = math.pi / 5
    angle = torch.atan2(u, -v).abs() % (2 * tenth)
    angle = torch.minimum(angle, 2 * tenth - angle)
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin()
    inner = (0.45 * math.cos(tenth), 0.45 * math.sin(tenth))
    edge = (inner[0] - 1.08, inner[1])
    return ((x - 1.08) * edge[1] - y * edge[0]) / math.hypot(*edge)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    return torch.minimum(torch.maximum(u - 0.98, v - 0.34), torch.maximum(v - 0.98, u - 0.34))


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.74).abs() - 0.25


DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
"""Signed distance to a shape of radius 1 at points right and below of its centre; negative inside."""


def cover(shape: str, tracks: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Share of each pixel that an object covers.

    Args:
        tracks: [F, 3] of x, y, radius in pixels; radius 0 for none.

    Returns:
        [F, height, width] in 0 to 1.
    """
    x, y, radius = (part[:, None, None] for part in tracks.unbind(-1))
    across = torch.arange(width, device=tracks.device) + 0.5
    along = torch.arange(height, device=tracks.device)[:, None] + 0.5
    dx = (across - x + width / 2) % width - width / 2
    dy = (along - y + height / 2) % height - height / 2
    size = radius.clamp(min=0.01)
    inside = (0.5 - DISTANCE[shape](dx / size, dy / size) * size).clamp(0, 1)
    return inside * (radius > 0.5)


def ground(scene: Scene, device: torch.device, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """The ground of a scene, [height, width, 3] float32 in 0 to 255."""
    across = torch.arange(width, device=device)
    along = torch.arange(height, device=device)[:, None]
    half = PERIOD // 2
    match scene.texture:
        case "striped":
            light = (across // half % 2).expand(height, -1).float()
        case "checkered":
            light = ((across // PERIOD + along // PERIOD) % 2).float()
        case "dotted":
            dx, dy = across % PERIOD - half + 0.5, along % PERIOD - half + 0.5
            light = (0.5 + 4.5 - torch.hypot(dx, dy)).clamp(0, 1)
        case "shaded":
            light = (1 - along / (height - 1)).expand(-1, width)
        case _:
            light = torch.full((height, width), (1 - DARK) / (LIGHT - DARK), device=device)
    colour = torch.tensor(GROUNDS[scene.ground], dtype=torch.float32, device=device)
    return (DARK + (LIGHT - DARK) * light)[..., None] * colour


def render(scenes: Sequence[Scene], tracks: np.ndarray, device: torch.device | None = None) -> Tensor:
    """A clip.

    Args:
        scenes: of every frame; the last one stays.
        tracks: [F, 3, 3], as `world.tracks` makes them.

    Returns:
        [F, H, W, 3] uint8 on the device.
    """
    device = device or torch.device("cpu")
    along = torch.from_numpy(tracks).to(device)
    pieces = []
    for scene, begin, end in _runs(scenes, len(tracks)):
        picture = ground(scene, device).expand(end - begin, -1, -1, -1)
        colour = torch.tensor(COLOURS[scene.colour], dtype=torch.float32, device=device)
        for i in range(tracks.shape[1]):
            if tracks[begin:end, i, 2].any():
                share = cover(scene.shape, along[begin:end, i])[..., None]
                picture = picture + share * (colour - picture)
        pieces.append(picture)
    return torch.cat(pieces).round().to(torch.uint8)


def _runs(scenes: Sequence[Scene], frames: int) -> list[tuple[Scene, int, int]]:
    """Scenes with the frames [begin, end) they last."""
    runs: list[tuple[Scene, int, int]] = []
    for frame in range(frames):
        scene = scenes[min(frame, len(scenes) - 1)]
        if runs and runs[-1][0] == scene:
            runs[-1] = (scene, runs[-1][1], frame + 1)
        else:
            runs.append((scene, frame, frame + 1))
    return runs
