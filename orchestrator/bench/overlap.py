"""What running the stages at the same time gains over one after another.

Both ways are the same code and the same processes in the same session, alternating; only `output.pace` differs. Knows
the events of the daemon, not its inside.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ipc.messages import BlockTimes
from orchestrator.bench.runs import Subject, record

Pace = Literal["serial", "free"]
SKIPPED = 5
"""First blocks of every run that are not measured: the window is not full yet, caches are cold."""
SHOWN = 8
"""Blocks in the printed timeline."""
STAGES = ("denoiser", "vae_decoder")


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


def measure_overlap(
    subject: Subject, blocks: int, rounds: int, say: Callable[[str], None]
) -> tuple[list[Measured], list[Measured]]:
    """Serial and pipelined runs, in turn. Raises LongLiveError."""
    serial: list[Measured] = []
    pipelined: list[Measured] = []
    for number in range(rounds):
        for pace, runs in (("serial", serial), ("free", pipelined)):
            say(f"round {number + 1} of {rounds}: {'pipelined' if pace == 'free' else pace}")
            times = tuple(record(subject, blocks, (f"output.pace={pace}",)).blocks)
            runs.append(Measured("free" if pace == "free" else "serial", times))
    return serial, pipelined


def overlap_result(serial: Sequence[Measured], pipelined: Sequence[Measured]) -> dict[str, Any]:
    """Times a block, shares, and the ratio of the two ways."""
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


def print_overlap(result: dict[str, Any], run: Measured) -> None:
    """A table, a line and a timeline on standard output."""
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
