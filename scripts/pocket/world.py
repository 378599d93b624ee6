"""How objects move: a scene and a start become positions and sizes, frame by frame, on a torus.

What happens next follows from what is seen: whoever knows the last frames and the scene knows the next ones. So a new
scene goes on from where the objects are, and all chance lies in where the first frame has them. Knows no pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocket.captions import Scene

HEIGHT, WIDTH = 96, 160
RADIUS = {"small": 12.0, "medium": 16.0, "large": 21.0}
"""Half the extent of an object, in pixels."""
LEAST, MOST = 9.0, 24.0
"""Radius between which growing and shrinking objects go."""
SPEED = 2.0
"""Pixels a frame."""
TURN_FRAMES, ORBIT = 48, 20.0
HOP_FRAMES, HOP, FLOOR = 32, 36.0, 66.0
CYCLE_FRAMES, CYCLE_BACK = 64, 10
"""A growing object grows for all but the last frames of a cycle, and then comes back."""
MARGIN = 28.0
APPEAR = 3.0
"""Pixels of radius a frame in which objects come and go; sizes change at a sixth of it."""

_VELOCITY = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "diagonal up": (0.75, -0.75),
    "diagonal down": (0.75, 0.75),
}


@dataclass(frozen=True)
class Start:
    """Where the first object of a stream is in its first frame, in pixels: the only chance beside the scene."""

    x: float
    y: float


class Thing:
    """One object: where it is, how large, and what its motion has to remember."""

    def __init__(self, x: float, y: float, radius: float) -> None:
        self.x, self.y, self.radius = x, y, radius
        self.phase = 0.0
        self.anchor = (x, y)
        self.leaving = False

    def begin(self, motion: str, home_x: float | None) -> None:
        """Takes up a motion from where it is; `home_x` is where one of a pair belongs."""
        self.home = self._home(motion, home_x)
        if motion == "circle":
            self.phase = -math.pi / 2
            self.anchor = (self.x, self.y + ORBIT)
        elif motion == "bounce":
            self.phase = _fall_phase(self.y)
            self.anchor = (self.x, self.y - _hop(self.phase))
        elif motion in ("grow", "shrink"):
            slow = (min(max(self.radius, LEAST), MOST) - LEAST) / (MOST - LEAST)
            self.phase = (slow if motion == "grow" else 1 - slow) * (CYCLE_FRAMES - CYCLE_BACK) / CYCLE_FRAMES

    def step(self, motion: str, radius: float) -> None:
        """One frame on."""
        if motion in _VELOCITY:
            vx, vy = _VELOCITY[motion]
            self.x += vx * SPEED
            self.y += vy * SPEED
        elif motion == "circle":
            self.phase += 2 * math.pi / TURN_FRAMES
            self.anchor = _nearer(self.anchor, self.home)
            self.x = self.anchor[0] + ORBIT * math.cos(self.phase)
            self.y = self.anchor[1] + ORBIT * math.sin(self.phase)
        elif motion == "bounce":
            self.phase += 1 / HOP_FRAMES
            self.anchor = _nearer(self.anchor, (self.home[0], 0.0))
            self.x, self.y = self.anchor[0], self.anchor[1] + _hop(self.phase)
        else:
            self.x, self.y = _nearer((self.x, self.y), self.home)
        if motion in ("grow", "shrink") and not self.leaving:
            self.phase += 1 / CYCLE_FRAMES
            radius = _cycle(motion, self.phase % 1)
        self._resize(0.0 if self.leaving else radius)

    def _resize(self, radius: float) -> None:
        fast = self.leaving or self.radius < LEAST or radius < self.radius - 8
        limit = APPEAR if fast else APPEAR / 6
        self.radius += min(max(radius - self.radius, -limit), limit)

    def _home(self, motion: str, home_x: float | None) -> tuple[float, float]:
        """Where motions that stay in place do so: not across an edge."""
        self.x, self.y = self.x % WIDTH, self.y % HEIGHT
        room = ORBIT + max(RADIUS.values()) + 3 if motion == "circle" else MARGIN
        x = min(max(self.x, room), WIDTH - room) if home_x is None else home_x
        y = HEIGHT / 2 if motion == "circle" else min(max(self.y, MARGIN), HEIGHT - MARGIN)
        return x, y


class World:
    """The objects of a stream."""

    def __init__(self, scene: Scene, start: Start) -> None:
        apart = WIDTH / 2
        self.things = [Thing((start.x + i * apart) % WIDTH, start.y, RADIUS[scene.size]) for i in range(scene.count)]
        self.scene = scene
        self._begin()
        if scene.count > 1 and scene.motion not in _VELOCITY:
            for thing in self.things:
                thing.x = thing.home[0]
                thing.begin(scene.motion, thing.home[0])

    def change(self, scene: Scene) -> None:
        """Another scene from the next frame on; the objects stay, come or go."""
        self.scene = scene
        staying = [thing for thing in self.things if not thing.leaving]
        if len(staying) > scene.count:
            max(staying, key=lambda thing: thing.x % WIDTH).leaving = True
        if len(staying) < scene.count:
            first = staying[0]
            self.things.append(Thing((first.x + WIDTH / 2) % WIDTH, first.y, 0.0))
        self._begin()

    def step(self) -> None:
        """One frame on."""
        for thing in self.things:
            thing.step(self.scene.motion, RADIUS[self.scene.size])
        self.things = [thing for thing in self.things if thing.radius > 0 or not thing.leaving]

    def _begin(self) -> None:
        staying = sorted((thing for thing in self.things if not thing.leaving), key=lambda thing: thing.x % WIDTH)
        homes = [None] if len(staying) == 1 else [WIDTH / 4, 3 * WIDTH / 4]
        for thing, home in zip(staying, homes, strict=True):
            thing.begin(self.scene.motion, home)
        for thing in self.things:
            if thing.leaving:
                thing.begin(self.scene.motion, None)


def tracks(scenes: Sequence[Scene], start: Start, frames: int) -> np.ndarray:
    """Where objects are while a scene follows another.

    Args:
        scenes: of every frame, in a sequence as long as the clip or shorter; the last one stays.

    Returns:
        [frames, 3, 3] float32: x, y in pixels on the torus and radius of up to three objects, radius 0 for none.
    """
    world = World(scenes[0], start)
    out = np.zeros((frames, 3, 3), dtype=np.float32)
    for frame in range(frames):
        scene = scenes[min(frame, len(scenes) - 1)]
        if frame and scene != world.scene:
            world.change(scene)
        if frame:
            world.step()
        for i, thing in enumerate(world.things[:3]):
            out[frame, i] = thing.x % WIDTH, thing.y % HEIGHT, thing.radius
    return out


def _hop(phase: float) -> float:
    """Height of a hopping object: a parabola up from the floor and back."""
    return FLOOR - HOP * (1 - (2 * (phase % 1) - 1) ** 2)


def _fall_phase(y: float) -> float:
    """The phase in which a falling object is at a height, or at the nearest one."""
    above = min(max((FLOOR - y) / HOP, 0.0), 1.0)
    return 0.5 + 0.5 * math.sqrt(1 - above) - 1e-9


def _cycle(motion: str, phase: float) -> float:
    slow = (CYCLE_FRAMES - CYCLE_BACK) / CYCLE_FRAMES
    up = phase / slow if phase < slow else (1 - phase) / (1 - slow)
    return LEAST + (MOST - LEAST) * (up if motion == "grow" else 1 - up)


def _nearer(at: tuple[float, float], home: tuple[float, float], share: float = 0.08) -> tuple[float, float]:
    return at[0] + share * (home[0] - at[0]), at[1] + share * (home[1] - at[1])
