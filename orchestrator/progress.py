"""How a run is told to the person who started it: live lines on a terminal, plain lines anywhere else.

Standard output carries results only: the line that says what runs where. All else goes to standard error.
"""

import sys
import time
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ipc.messages import Status
from orchestrator.plan import Reporter

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain lines about frames."""


def reporter_for_this_terminal() -> Reporter:
    """Live where standard error is a terminal, plain otherwise."""
    console = Console(stderr=True)
    return TerminalReporter(console) if console.is_terminal else PlainReporter()


class PlainReporter:
    """A line for every piece of news.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, str] = {}
        self._told_at = clock()
        self._told_frames = -1

    def loading(self, stage: str, text: str) -> None:
        """A line, unless it is the stage's last one again."""
        if self._last.get(stage) != text:
            self._last[stage] = text
            typer.echo(f"{stage}: {text}", err=True)

    def up(self, line: str) -> None:
        """The line, on standard output."""
        typer.echo(line)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line."""
        typer.echo(text, err=True)

    def frames(self, done: int, total: int | None, fps: float) -> None:
        """A line every few seconds and one at the end of a run that has one; an endless run has `status` for that."""
        if total is None or done in (0, self._told_frames):
            return
        if done < total and self._clock() - self._told_at < PLAIN_INTERVAL_S:
            return
        self._told_at, self._told_frames = self._clock(), done
        typer.echo(f"frames {done} of {total}, {fps:.1f} fps", err=True)

    def close(self) -> None:
        """Nothing to put back."""


class TerminalReporter:
    """A line for each stage while it loads, then a line that counts frames.

    Args:
        console: of standard error, a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, TaskID] = {}
        self._counting: TaskID | None = None
        self._is_up = False
        self._progress = self._loading_display()

    def loading(self, stage: str, text: str) -> None:
        """The stage's line; `ready` stops its spinner. A stage that starts again while the run is up is a note."""
        if self._is_up:
            self.note(f"{stage}: {text}")
            return
        self._progress.start()
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=1, text="")
        done = int(text.startswith("ready"))
        self._progress.update(self._stages[stage], text=escape(text), completed=done)

    def up(self, line: str) -> None:
        """The line, on standard output, below those of the stages."""
        self._progress.stop()
        typer.echo(line)
        sys.stdout.flush()
        self._progress = self._frames_display()
        self._counting = None
        self._is_up = True

    def note(self, text: str) -> None:
        """A line above the live ones."""
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)

    def frames(self, done: int, total: int | None, fps: float) -> None:
        """The counting line, once the run is up."""
        if not self._is_up:
            return
        if self._counting is None:
            self._progress.start()
            self._counting = self._progress.add_task("frames", total=total, text="")
        of = "" if total is None else f" of {total}"
        self._progress.update(self._counting, completed=done, text=f"{done}{of}, {fps:.1f} fps")

    def close(self) -> None:
        """Leaves the last lines where they are and gives the cursor back."""
        self._progress.stop()

    def _loading_display(self) -> Progress:
        return Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<13}"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self._console,
        )

    def _frames_display(self) -> Progress:
        return Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}"),
            console=self._console,
        )


def one_line(text: str) -> str:
    """Text from anywhere, as it may go to a terminal: one line, no control characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def print_status(status: Status) -> None:
    """A snapshot as a table on standard output; 120 columns where that is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(_overview(status))
    console.print(_stages(status))
    console.print(_sinks(status))


def _overview(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    block = "not known yet" if status.block_ms is None else f"{status.block_ms:.0f} ms"
    first = "none yet" if status.first_frame_s is None else f"after {status.first_frame_s:.1f} s"
    preset = "" if status.preset is None else f", preset {status.preset}"
    rows = {
        "state": status.state,
        "config": f"{status.config}{preset}, {status.width}x{status.height}, seed {status.seed}, {status.placement}"
        + ", MPS" * status.mps,
        "prompt": f"version {status.version}: {status.prompt}",
        "position": f"block {status.block}, frame {status.frame}, first frame {first}, up {status.uptime_s:.0f} s",
        "speed": f"{status.fps:.1f} fps, {block} a block, RTF {status.rtf:.2f}, pace {status.pace}",
        "underruns": f"{status.underruns}, of them {status.underruns_after_first_second} after the first second",
        "prompt cache": f"{status.cache_hits} hits, {status.cache_misses} misses",
        "memory": f"{_mib(status.memory_bytes)}, on devices {_mib(status.device_memory_bytes)}",
    }
    if status.abstract_picture:
        rows["picture"] = (
            "abstract: the weights are random; prompts change the picture, which does not show what they say"
        )
    if status.last_error is not None:
        rows["last error"] = status.last_error
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(one_line(value), overflow="fold"))
    return table


def _stages(status: Status) -> Table:
    table = Table("stage", "state", "pid", "restarts", "device", "ms a block", "memory", "on device")
    for name, stage in status.stages.items():
        block = "-" if stage.block_ms is None else f"{stage.block_ms:.0f}"
        table.add_row(
            *map(Text, (name, stage.state, str(stage.pid), str(stage.restarts), stage.device, block)),
            *map(_mib, (stage.memory_bytes, stage.device_memory_bytes)),
        )
    return table


def _sinks(status: Status) -> Table:
    table = Table("output", "state", "frames", "dropped", "error")
    for sink in status.sinks:
        values = (sink.target, sink.state, str(sink.frames), str(sink.dropped), sink.error or "")
        table.add_row(*(Text(one_line(value), overflow="fold") for value in values))
    return table


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
