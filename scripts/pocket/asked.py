"""What a prompt asks for, read back from its words, and whether a video shows it.

Reads what `captions.phrase` writes and whatever uses the same words; what a prompt does not name is not asked for.
Knows no model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocket.captions import COLOURS, GROUNDS, MOTION_WORDS, SHAPE_WORDS
from pocket.evaluation import MOTION_BLOCKS, SOON, Block, by_block, moves

_GROUND = re.compile(rf"\bon an? (?:\w+ )??(?:({'|'.join(GROUNDS)}) )?(?:\w+ )?(?:background|ground)\b")


@dataclass(frozen=True)
class Asked:
    """Attributes of a `captions.Scene`; None where the prompt says nothing of one that can be told."""

    count: int | None
    colour: str | None
    shape: str | None
    ground: str | None
    motion: str | None


def asked_for(text: str) -> Asked:
    """What a prompt asks for."""
    text = re.sub(r"[^\w\s]", " ", text.lower())
    ground = _GROUND.search(text)
    words = _GROUND.sub(" ", text)
    motion, form = _named(MOTION_WORDS, words)
    if form:
        words = words.replace(form, " ")  # "in circles" is no shape
    shape, _ = _named({name: _plurals(forms) for name, forms in SHAPE_WORDS.items()}, words)
    several = re.search(r"\b(two|pair)\b", words)
    return Asked(
        count=None if shape is None else 2 if several else 1,
        colour=_named({name: (name,) for name in COLOURS}, words)[0],
        shape=shape,
        ground=ground.group(1) if ground else None,
        motion=motion,
    )


def outcomes(frames: np.ndarray, prompts: Sequence[tuple[int, str]]) -> dict[str, list[float]]:
    """By attribute, 0 or 1 for every block of a video in which its prompt can be expected to show.

    Args:
        frames: [F, H, W, 3] uint8, from a stream's first frame on.
        prompts: the block at which each takes effect, and its text.

    Returns:
        A stream's first block is left out, as are the `SOON` blocks from a switch on. Motion has one outcome for each
        prompt that is in force long enough for it to be told.
    """
    blocks = by_block(frames)
    ends = [at for at, _ in prompts[1:]] + [len(blocks)]
    out: dict[str, list[float]] = {}
    for (at, text), end in zip(prompts, ends, strict=True):
        asked = asked_for(text)
        seen = blocks[max(1, at + SOON if at else 0) : end]
        for name in ("count", "colour", "shape", "ground"):
            wanted = getattr(asked, name)
            if wanted is not None:
                out.setdefault(name, []).extend(float(_shown(block, name) == wanted) for block in seen)
        if asked.motion is not None and len(seen) >= MOTION_BLOCKS:
            out.setdefault("motion", []).append(float(moves(seen) == asked.motion))
    return out


def _shown(block: Block, name: str) -> object:
    return block.ground.name if name == "ground" else getattr(block, name)


def _plurals(forms: Sequence[str]) -> tuple[str, ...]:
    return tuple(form + ending for form in forms for ending in ("", "s", "es", " signs"))


def _named(forms: dict[str, tuple[str, ...]], text: str) -> tuple[str | None, str]:
    """The name of the longest form that the text has as whole words, and the form; None and nothing without one."""
    found = [
        (len(form), name, form)
        for name, own in forms.items()
        for form in own
        if form and re.search(rf"\b{re.escape(form)}\b", text)
    ]
    return max(found)[1:] if found else (None, "")
