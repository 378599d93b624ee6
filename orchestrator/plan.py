"""What the command line and the daemon agree on: the plan of a run, its result, and how progress is told.

Plain data; knows no command line, no process and no tensor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ScheduledPrompt:
    """A prompt and the block it takes effect at; None means the next block boundary."""

    text: str
    at: int | None


@dataclass(frozen=True)
class RunPlan:
    """What one run does.

    Attributes:
        prompts: the first has version 0 and `at` 0, the others follow in order of their blocks.
        frames: how many frames leave playout before the run ends; None where `blocks` says it, or nothing does.
        blocks: how many blocks are generated; None where `frames` says it, or nothing does.
        inputs: a safetensors file with noise and embeddings to use instead of the seed and the text encoder.
        dump_latents: where the clean latents of all blocks are written.
        live: whether clients are answered.
        log: where worker logs go; None for standard error.
    """

    prompts: tuple[ScheduledPrompt, ...]
    frames: int | None
    blocks: int | None
    inputs: Path | None
    dump_latents: Path | None
    live: bool
    log: Path | None


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        exit_code: of the process.
        frames: frames that left playout.
        blocks: blocks that were generated.
        frames_sha256: over the RGB bytes of all frames, hexadecimal.
        files: what was written and is complete.
        error: one line, None after success.
        wall_s: seconds from the first frame's block to the end.
    """

    exit_code: int
    frames: int
    blocks: int
    frames_sha256: str
    files: tuple[str, ...]
    error: str | None
    wall_s: float


class Reporter(Protocol):
    """How the daemon tells the person what goes on."""

    def loading(self, stage: str, text: str) -> None:
        """What a stage does before it is ready; `ready` closes its line."""

    def up(self, line: str) -> None:
        """The run is up: the one line that says what runs where."""

    def note(self, text: str) -> None:
        """Something the person should know."""

    def frames(self, done: int, total: int | None, fps: float) -> None:
        """Frames that left playout until now, of how many."""

    def close(self) -> None:
        """Nothing more will be told; the terminal is as it was."""
