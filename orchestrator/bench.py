"""`scripts/bench`: measurements of the real runtime, seen from outside as a client sees it.

    scripts/bench overlap       what running the stages at the same time gains over one after another

Both ways are the same code and the same processes in the same session, alternating; only `output.pace` differs. The
last line is JSON. Knows the events of the daemon, not its inside.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from configs.load import load_config
from ipc.errors import LongLiveError, NotRunning, UserError
from ipc.messages import BlockTimes
from orchestrator.client import Client
from orchestrator.progress import one_line

Pace = Literal["serial", "free"]
START_S = 300.0
"""How long a run may take to come up."""
SKIPPED = 5
"""First blocks of every run that are not measured: the window is not full yet, caches are cold."""
SHOWN = 8
"""Blocks in the printed timeline."""
STAGES = ("denoiser", "vae_decoder")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Measured:
    """One run: what each stage did when, by block."""

    pace: Pace
    times: tuple[BlockTimes, ...]

    def stage_ms(self, stage: str) -> float:
        """Median time of a stage's work on a block."""
        return statistics.median((t.ended_ns - t.began_ns) / 1e6 for t in self._settled(stage))

    @property
    def block_ms(self) -> float:
        """Time from one block's end to the next one's, the mean over the run."""
        ends = [t.ended_ns for t in self._settled(STAGES[-1])]
        return (ends[-1] - ends[0]) / (len(ends) - 1) / 1e6

    def _settled(self, stage: str) -> list[BlockTimes]:
        return sorted((t for t in self.times if t.stage == stage and t.block >= SKIPPED), key=lambda t: t.block)


@app.callback()
def root() -> None:
    """Measures the runtime."""


@app.command()
def overlap(
    config: Annotated[str, typer.Option(help="A shipped name, or the path of a YAML file.")] = "pocket",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")] = None,
    blocks: Annotated[int, typer.Option(min=SKIPPED + 3, help="Blocks of each run.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 2,
    out: Annotated[Path, typer.Option(help="Timeline in Chrome's trace format.")] = Path("out/timeline.json"),
) -> None:
    """Serial against pipelined: time a block, the stages' shares, and the timeline."""
    runs: list[Measured] = []
    for _ in range(rounds):
        for pace in ("serial", "free"):
            typer.echo(f"run {len(runs) + 1} of {2 * rounds}: {'pipelined' if pace == 'free' else pace}", err=True)
            runs.append(_measure(config, overrides or [], pace, blocks))
    serial = [run for run in runs if run.pace == "serial"]
    pipelined = [run for run in runs if run.pace == "free"]
    result = _result(serial, pipelined)
    _print(result, pipelined[-1])
    _write_trace(out, serial[-1], pipelined[-1])
    typer.echo(json.dumps({"bench": "overlap", "config": config, "blocks": blocks, "rounds": rounds, **result}))


def _measure(config: str, overrides: Sequence[str], pace: Pace, blocks: int) -> Measured:
    """Runs the daemon once and gathers the stages' times of every block."""
    stream = load_config(config, overrides)
    frames = stream.stream.first_frame(blocks)
    command = [sys.executable, "-m", "orchestrator.cli", "start", "--config", config, "--out", "null:"]
    command += ["--seconds", str(frames / stream.video.fps)]
    for setting in (*overrides, f"output.pace={pace}"):
        command += ["--set", setting]
    with tempfile.TemporaryDirectory(prefix="longlive-bench-") as folder:
        directory = Path(folder) / "run"
        environment = {**os.environ, "LONGLIVE_RUN_DIR": str(directory)}
        daemon = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            with _connected(directory, daemon) as client:
                times = tuple(event for event in client.events() if isinstance(event, BlockTimes))
            _, errors = daemon.communicate(timeout=60)
        finally:
            daemon.kill()
            daemon.wait()
    if daemon.returncode != 0 or not times:
        raise LongLiveError(f"the {pace} run ended with code {daemon.returncode}: {one_line(errors)[-400:]}")
    return Measured(pace, times)


def _connected(directory: Path, daemon: "subprocess.Popen[str]") -> Client:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return Client(directory)
        except NotRunning:
            if daemon.poll() is not None:
                _, errors = daemon.communicate()
                raise LongLiveError(f"the daemon did not start: {one_line(errors)[-400:]}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _result(serial: Sequence[Measured], pipelined: Sequence[Measured]) -> dict[str, Any]:
    alone = {stage: statistics.median(run.stage_ms(stage) for run in serial) for stage in STAGES}
    serial_ms = statistics.median(run.block_ms for run in serial)
    pipelined_ms = statistics.median(run.block_ms for run in pipelined)
    slowest = max(alone, key=lambda stage: alone[stage])
    return {
        "serial_ms": round(serial_ms, 1),
        "pipelined_ms": round(pipelined_ms, 1),
        "speedup": round(serial_ms / pipelined_ms, 3),
        "slowest_stage": slowest,
        "slowest_alone_ms": round(alone[slowest], 1),
        "pipelined_over_slowest": round(pipelined_ms / alone[slowest], 3),
        "stage_ms": {stage: round(ms, 1) for stage, ms in alone.items()},
        "share_of_serial": {stage: round(ms / serial_ms, 3) for stage, ms in alone.items()},
    }


def _print(result: dict[str, Any], run: Measured) -> None:
    console = Console(highlight=False, width=100)
    table = Table("stage", "ms a block, alone", "share of serial")
    for stage in STAGES:
        table.add_row(stage, f"{result['stage_ms'][stage]:.1f}", f"{result['share_of_serial'][stage]:.0%}")
    console.print(table)
    console.print(
        f"serial {result['serial_ms']} ms a block, pipelined {result['pipelined_ms']} ms: speedup"
        f" {result['speedup']:.2f}; {result['pipelined_over_slowest']:.2f} times {result['slowest_stage']} alone"
    )
    console.print(_timeline(run))


def _timeline(run: Measured) -> Table:
    """The last blocks of a run: when each stage worked on them, in milliseconds from the first one shown."""
    by_block: defaultdict[int, dict[str, BlockTimes]] = defaultdict(dict)
    for times in run.times:
        by_block[times.block][times.stage] = times
    shown = sorted(block for block, stages in by_block.items() if set(STAGES) <= set(stages))[-SHOWN:]
    start = by_block[shown[0]][STAGES[0]].began_ns
    table = Table("block", *(f"{stage}, ms" for stage in STAGES), title="timeline of the pipelined run")
    for block in shown:
        spans = [by_block[block][stage] for stage in STAGES]
        cells = [f"{(t.began_ns - start) / 1e6:8.1f} - {(t.ended_ns - start) / 1e6:8.1f}" for t in spans]
        table.add_row(str(block), *cells)
    return table


def _write_trace(path: Path, serial: Measured, pipelined: Measured) -> None:
    """Both timelines as complete events of Chrome's trace format, microseconds (chrome://tracing, Perfetto)."""
    events = [*_trace_events(1, "serial", serial.times), *_trace_events(2, "pipelined", pipelined.times)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def _trace_events(process: int, name: str, times: Iterable[BlockTimes]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}]
    for thread, stage in enumerate(STAGES):
        events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": stage}})
    spans = [t for t in times if t.stage in STAGES]
    start = min(t.began_ns for t in spans)
    for t in spans:
        events.append(
            {
                "ph": "X",
                "name": f"block {t.block}",
                "cat": t.stage,
                "pid": process,
                "tid": STAGES.index(t.stage),
                "ts": (t.began_ns - start) / 1e3,
                "dur": (t.ended_ns - t.began_ns) / 1e3,
                "args": {"version": t.version},
            }
        )
    return events


def main() -> int:
    """Runs a measurement; the exit code."""
    try:
        app(prog_name="scripts/bench", standalone_mode=False)
    except (LongLiveError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        typer.echo(f"error: {one_line(text)}", err=True)
        return error.exit_code if isinstance(error, UserError | typer.TyperException) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
