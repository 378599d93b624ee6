"""What the world of the embedded model can show, and how people would say it.

A scene is one choice of count, size, colour, shape, motion, ground and texture; a caption is a scene in words, phrased
in one of many ways. Knows no pixels and no time.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (225, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 230, 60),
    "green": (50, 195, 75),
    "cyan": (60, 215, 225),
    "blue": (55, 95, 240),
    "purple": (165, 65, 215),
    "white": (240, 240, 240),
}
"""Colours of objects, RGB. All are brighter than every ground."""

GROUNDS = {
    "black": (14, 14, 17),
    "grey": (68, 68, 70),
    "dark blue": (22, 34, 96),
    "dark green": (18, 74, 40),
    "dark red": (92, 24, 28),
}
"""Colours of grounds, RGB; a texture lightens and darkens them."""

TEXTURES = ("plain", "striped", "checkered", "dotted", "shaded")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "medium", "large")
MOTIONS = (
    "left",
    "right",
    "up",
    "down",
    "diagonal up",
    "diagonal down",
    "bounce",
    "circle",
    "grow",
    "shrink",
    "still",
)
COUNTS = (1, 2)
DEFAULT_GROUND = ("grey", "plain")
"""Ground and texture of a caption that names none."""

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring",),
}
_SIZE_WORDS = {"small": ("small", "tiny", "little"), "medium": ("", "", "medium"), "large": ("large", "big")}
MOTION_WORDS = {
    "left": ("moving left", "moving to the left", "going left", "drifting left"),
    "right": ("moving right", "moving to the right", "going right", "drifting right"),
    "up": ("moving up", "rising", "going up", "moving upwards"),
    "down": ("moving down", "falling", "going down", "moving downwards"),
    "diagonal up": ("moving diagonally up", "going diagonally up", "moving up and to the right"),
    "diagonal down": ("moving diagonally", "moving diagonally down", "moving down and to the right"),
    "bounce": ("bouncing", "bouncing up and down", "hopping", "jumping up and down"),
    "circle": ("circling", "going in circles", "moving in a circle", "going round in circles"),
    "grow": ("growing", "getting bigger", "growing larger"),
    "shrink": ("shrinking", "getting smaller"),
    "still": ("standing still", "not moving", "", "resting"),
}
_TEXTURE_WORDS = {
    "plain": ("", "plain"),
    "striped": ("striped",),
    "checkered": ("checkered",),
    "dotted": ("dotted",),
    "shaded": ("shaded",),
}


@dataclass(frozen=True)
class Scene:
    """One thing the world can show; `ground` and `texture` are behind the objects."""

    count: int
    size: str
    colour: str
    shape: str
    motion: str
    ground: str = DEFAULT_GROUND[0]
    texture: str = DEFAULT_GROUND[1]

    @property
    def held_out(self) -> bool:
        """Whether training never shows this count of this shape in this colour with this motion: one in ten."""
        name = f"{self.count} {self.colour} {self.shape} {self.motion}"
        return hashlib.sha256(name.encode()).digest()[0] * 10 < 256


def draw_scene(rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """A scene at random; with `held_out` only one that is, or is not, held out of training."""
    while True:
        motion = _one(rng, MOTIONS)
        default_ground = rng.random() < 0.25
        scene = Scene(
            count=int(rng.choice(COUNTS, p=(0.65, 0.35))),
            size="medium" if motion in ("grow", "shrink") else _one(rng, SIZES),
            colour=_one(rng, tuple(COLOURS)),
            shape=_one(rng, SHAPES),
            motion=motion,
            ground=DEFAULT_GROUND[0] if default_ground else _one(rng, tuple(GROUNDS)),
            texture=DEFAULT_GROUND[1] if default_ground or rng.random() < 0.4 else _one(rng, TEXTURES),
        )
        if held_out is None or scene.held_out == held_out:
            return scene


def phrase(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of a scene, in one of many phrasings."""
    shape = _one(rng, SHAPE_WORDS[scene.shape])
    if scene.count == 2:
        count = _one(rng, ("two", "two", "a pair of"))
        shape = {"box": "boxes", "cross": "crosses", "plus": "plus signs"}.get(shape, f"{shape}s")
    else:
        count = _one(rng, ("a", "a", "one"))
    size = _one(rng, _SIZE_WORDS[scene.size])
    motion = _one(rng, MOTION_WORDS[scene.motion])
    thing = _joined(count, size, scene.colour, shape)
    ground = _ground(scene, rng)
    text = {
        0: _joined(thing, motion, ground),
        1: _joined(thing, motion, ground),
        2: _joined(thing, ground, motion) if motion else _joined(thing, ground),
        3: _joined(ground, thing, motion),
    }[int(rng.integers(4))]
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text.replace("an a ", "a ")


def _ground(scene: Scene, rng: np.random.Generator) -> str:
    if (scene.ground, scene.texture) == DEFAULT_GROUND and rng.random() < 0.8:
        return ""
    texture = _one(rng, _TEXTURE_WORDS[scene.texture])
    return _joined("on a", texture, scene.ground, _one(rng, ("background", "background", "ground")))


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def _one(rng: np.random.Generator, among: tuple[str, ...]) -> str:
    return among[int(rng.integers(len(among)))]
