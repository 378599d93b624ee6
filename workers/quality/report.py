"""`report.json`: every figure of a comparison, and all that is needed to make it again.

`SCHEMA` rises with every change of a field's name, type or meaning. Knows no model and computes nothing but what is
worst; docs/quality.md says what the figures mean.
"""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from workers.quality.job import Gate, Option, Record, Story

SCHEMA = 1


class Block(Record):
    """What B made of one block, against A's.

    Attributes:
        psnr_db: over all frames of the block, 8 bits a channel; None where they are equal.
        ssim, lpips: means over its frames; None where not measured.
        latent_error: norm of the difference of the clean latents over the norm of A's.
    """

    story: int
    block: int
    psnr_db: float | None
    ssim: float | None
    lpips: float | None
    latent_error: float

    @property
    def decibels(self) -> float:
        """`psnr_db`, infinite for equal frames."""
        return math.inf if self.psnr_db is None else self.psnr_db


class Moment(Record):
    """All stories at one block: the worst PSNR (None: all equal), the mean of SSIM, the mean and largest error."""

    block: int
    worst_psnr_db: float | None
    mean_ssim: float | None
    mean_latent_error: float
    largest_latent_error: float


class Worst(Record):
    """The block with the least PSNR, of several equal ones the first; and the prompt in force there."""

    story: int
    block: int
    psnr_db: float | None
    prompt: str


class Compared(Record):
    """One way of comparing: every block, the same over time, and the worst.

    Attributes:
        first_below: of each story the first block with less than the gate's PSNR; None where there is none.
    """

    blocks: tuple[Block, ...]
    over_time: tuple[Moment, ...]
    worst: Worst
    first_below: tuple[int | None, ...]


class Score(Record):
    """The mean of so many outcomes of 0 or 1."""

    mean: float
    of: int


class Pair(Record):
    """The mean CLIP score of A's and of B's frames."""

    a: float
    b: float


class JudgeScores(Record):
    """By what was looked at, how often A's and B's videos show what their prompts ask for."""

    a: dict[str, Score]
    b: dict[str, Score]


class Against(Record):
    """One option, compared.

    Attributes:
        notes: what was chosen to compute it, as the denoiser says at start.
        files: pictures, relative to the report.
    """

    option: Option
    notes: tuple[str, ...]
    teacher_forced: Compared
    free_running: Compared
    clip: Pair | None
    judge: JudgeScores | None
    passed: bool
    files: tuple[str, ...]


class Versions(Record):
    """What computed it."""

    longlive_runtime: str
    python: str
    torch: str
    platform: str
    devices: tuple[str, ...]


class Report(Record):
    """The whole file.

    Attributes:
        version: `SCHEMA`, under the key `schema`.
        not_measured: one line for each figure that was left out, and why.
    """

    version: Literal[1] = Field(alias="schema")
    versions: Versions
    blocks: int
    stories: tuple[Story, ...]
    gate: Gate
    a: Option
    a_notes: tuple[str, ...]
    against: tuple[Against, ...]
    not_measured: tuple[str, ...]
    passed: bool


def compared(blocks: Sequence[Block], stories: Sequence[Story], gate: Gate) -> Compared:
    """What follows from the figures of all blocks of all stories."""
    worst = min(blocks, key=lambda block: block.decibels)
    numbers = sorted({block.block for block in blocks})
    return Compared(
        blocks=tuple(blocks),
        over_time=tuple(_moment([block for block in blocks if block.block == number]) for number in numbers),
        worst=Worst(
            story=worst.story,
            block=worst.block,
            psnr_db=worst.psnr_db,
            prompt=stories[worst.story].text_at(worst.block),
        ),
        first_below=tuple(
            next((b.block for b in blocks if b.story == story and b.decibels < gate.least_db), None)
            for story in range(len(stories))
        ),
    )


def passes(gate: Gate, teacher_forced: Compared, free_running: Compared) -> bool:
    """Whether the worst block of the comparison that the gate looks at reaches it; equal frames always do."""
    worst = (teacher_forced if gate.judges == "teacher_forced" else free_running).worst
    return worst.psnr_db is None or worst.psnr_db >= gate.least_db


def _moment(blocks: Sequence[Block]) -> Moment:
    worst = min(blocks, key=lambda block: block.decibels)
    errors = [block.latent_error for block in blocks]
    similar = [block.ssim for block in blocks if block.ssim is not None]
    return Moment(
        block=worst.block,
        worst_psnr_db=worst.psnr_db,
        mean_ssim=sum(similar) / len(similar) if similar else None,
        mean_latent_error=sum(errors) / len(errors),
        largest_latent_error=max(errors),
    )
