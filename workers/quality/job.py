"""What `orchestrator quality` asks for, as plain data: it goes to the process that compares, and into the report.

Imports no torch: the command builds it. Knows neither models nor figures.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from configs.schema import RuntimeConfig

Judged = Literal["teacher_forced", "free_running"]
"""Which of the two comparisons the gate looks at."""


class Record(BaseModel):
    """Frozen; a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scene(Record):
    """A prompt and the block at which it takes effect."""

    text: str
    block: int


class Story(Record):
    """One video: the seed of its noise, and its prompts."""

    seed: int
    prompts: tuple[Scene, ...]

    def text_at(self, block: int) -> str:
        """The prompt in force at a block."""
        return [scene.text for scene in self.prompts if scene.block <= block][-1]


class Option(Record):
    """One side of a comparison: a whole configuration under the name by which it was asked for."""

    name: str
    config: RuntimeConfig


class Gate(Record):
    """The least PSNR in dB that every block has to reach, and in which comparison."""

    least_db: float
    judges: Judged


class Job(Record):
    """All of a comparison.

    Attributes:
        a: what the others are compared with.
        against: compared with it, one after the other; their blocks and frames are as long and as large as its.
        blocks: length of every story.
        out: folder for the report and the pictures.
    """

    a: Option
    against: tuple[Option, ...]
    stories: tuple[Story, ...]
    blocks: int
    gate: Gate
    out: Path
