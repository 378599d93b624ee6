"""Which measurements a command makes, at which size, and what it leaves: tables, `report.json`, `report.html`, a block
to paste. Knows what each measurement is called, not how it is done.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.load import load_preset
from configs.schema import RuntimeConfig
from orchestrator.bench.compare import (
    OFF,
    ON,
    SETTLE,
    Contender,
    ablations,
    compare,
    contender,
    geometry_ablations,
    named_subject,
)
from orchestrator.bench.environment import environment
from orchestrator.bench.html import as_html
from orchestrator.bench.models_alone import STRAIGHTFORWARD, operations, roofline, straightforward
from orchestrator.bench.report import Case, Comparison, Report, write_report
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.scaling import measure_point, points
from orchestrator.bench.steady import checked_warmup, steady_of
from orchestrator.bench.sustained import measure_starts, measure_throughput
from orchestrator.bench.switching import measure_switches, switch_cases
from orchestrator.bench.tables import as_markdown, print_report
from orchestrator.bench.trace import write_trace

Parts = dict[str, Any]
"""Fields of a `Report`."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Blocks are those after the window is full."""

    blocks: int
    warmup: int
    switches: int
    seconds: float
    starts: int
    scaling_blocks: int
    rounds: int
    round_blocks: int
    ablation_rounds: int
    repeats: int


FULL = Sizes(1000, 50, 50, 60.0, 3, 50, 7, 60, 5, 20)
QUICK = Sizes(100, 50, 10, 10.0, 1, 6, 3, 8, 1, 5)


@dataclass(frozen=True)
class Bench:
    """One command.

    Attributes:
        command: as it was typed, for the report.
        out: folder of the outputs.
        seed: of the bootstrap and of what is drawn while measuring; the stream's is the configuration's.
        say: told what is done now.
    """

    command: str
    subject: Subject
    sizes: Sizes
    quick: bool
    out: Path
    seed: int
    say: Callable[[str], None]

    def steady(self, pace: str = "free", profile: bool = False) -> Parts:
        """Latencies of a warm stream; with `profile` its trace, and time by operation."""
        config, sizes = self.subject.load(), self.sizes
        checked_warmup(config, sizes.warmup)
        self.say(f"steady: {sizes.blocks} blocks after {sizes.warmup}")
        recording = record(self.subject, sizes.warmup + sizes.blocks, (f"output.pace={pace}",))
        parts: Parts = {"steady": steady_of(recording, config, sizes.warmup, pace)}
        if profile:
            write_trace(recording, self.out / "trace.json")
            self.say("time on the device by operation")
            parts["operations"] = operations(self.subject, sizes.repeats)
        return parts

    def switch(self, pace: str = "live") -> Parts:
        """Prompt switches by every recache policy and cut."""
        cases = []
        for recache, cut in switch_cases(self.subject.load().stream, self.quick):
            self.say(f"switch: {self.sizes.switches} switches, recache {recache}, {cut}")
            cases.append(measure_switches(self.subject, recache, cut, self.sizes.switches, pace, self.seed))
        return {"switching": tuple(cases)}

    def throughput(self) -> Parts:
        """A sustained stream with the machine's load."""
        self.say(f"throughput: {self.sizes.seconds:g} s")
        return {"throughput": measure_throughput(self.subject, self.sizes.seconds)}

    def startup(self) -> Parts:
        """Cold and warm starts."""
        self.say(f"startup: {self.sizes.starts} cold, {self.sizes.starts} warm")
        return {"startup": tuple(measure_starts(self.subject, self.sizes.starts))}

    def scaling(self, axes: Sequence[str]) -> Parts:
        """Points along each axis; one that two axes share is measured once."""
        measured: dict[tuple[str, int], Case] = {}
        cases = []
        for point in points(self.subject, tuple(axes), self.quick):
            axis, name, settings, streams = point
            key = (self.subject.with_settings(*settings).load().model_dump_json(), streams)
            if key not in measured:
                self.say(f"scaling: {axis} {name}")
                measured[key] = measure_point(self.subject, point, self.sizes.scaling_blocks)
            cases.append(measured[key].model_copy(update={"axis": axis, "name": name, "settings": settings}))
        return {"scaling": tuple(cases)}

    def compare(self, sides: Sequence[str]) -> Parts:
        """Presets or configurations in turn."""
        subjects = [(name, named_subject(name, self.subject)) for name in sides]
        return {"comparisons": (self._compared(" and ".join(sides), subjects, self.sizes.rounds),)}

    def ablate(self, kinds: Sequence[str]) -> Parts:
        """One optimisation off at a time from the subject, on at a time from `reference`; windows and precisions."""
        reference = self.subject.with_settings("preset=reference")
        base = self.subject.load().preset or "as configured"
        found: list[Comparison] = []
        for kind in kinds:
            if kind == "off":
                title, sides = f"One off from {base}", [(base, self.subject), *ablations(self.subject, OFF)]
            elif kind == "on":
                title, sides = "One on from reference", [("reference", reference), *ablations(reference, ON)]
            else:
                title, sides = (
                    f"Window and precision from {base}",
                    [(base, self.subject), *geometry_ablations(self.subject)],
                )
            found.append(self._compared(title, sides, self.sizes.ablation_rounds))
        return {"comparisons": tuple(found)}

    def reference(self) -> Parts:
        """The straightforward pipeline and the runtime in turn."""
        blocks = self.sizes.round_blocks
        warmup = self.subject.load().stream.window_blocks + SETTLE
        sides = [straightforward(self.subject, blocks, warmup), contender("runtime", self.subject, blocks)]
        title = f"{STRAIGHTFORWARD.capitalize()} and runtime"
        return {"comparisons": (compare(title, sides, self.sizes.rounds, self.seed, self.say),)}

    def roofline(self) -> Parts:
        """The stages under the device's ceilings."""
        self.say("roofline")
        return {"roofline": roofline(self.subject, self.sizes.repeats)}

    def all(self, sides: Sequence[str], axes: Sequence[str], kinds: Sequence[str], profile: bool) -> Parts:
        """Every measurement, one after the other."""
        parts = {**self.steady(profile=profile), **self.switch(), **self.throughput(), **self.startup()}
        parts |= {**self.scaling(axes), **self.roofline()}
        compared = [self.reference(), self.compare(sides), self.ablate(kinds)]
        return {**parts, "comparisons": tuple(one for part in compared for one in part["comparisons"])}

    def run(self, measure: Callable[[], Parts], console: Console) -> Report:
        """Measures, writes the outputs and prints the tables."""
        began, busy = time.monotonic(), os.getloadavg()[0]
        config = self.subject.load()
        made = datetime.now(UTC).isoformat(timespec="seconds")
        parts = measure()
        report = Report(
            command=self.command,
            made_at=made,
            wall_s=time.monotonic() - began,
            environment=environment(),
            config=config.model_dump(mode="json"),
            seeds={"stream": config.seed, "bench": self.seed},
            notes=tuple(notes(config, busy, parts)),
            **parts,
        )
        self.write(report)
        print_report(report, console)
        return report

    def write(self, report: Report) -> None:
        """All three outputs."""
        write_report(report, self.out / "report.json")
        (self.out / "report.html").write_text(as_html(report), encoding="utf-8")
        (self.out / "report.md").write_text(as_markdown(report), encoding="utf-8")

    def _compared(self, title: str, subjects: Sequence[tuple[str, Subject]], rounds: int) -> Comparison:
        sides: list[Contender] = [contender(name, subject, self.sizes.round_blocks) for name, subject in subjects]
        return compare(title, sides, rounds, self.seed, self.say)


def notes(config: RuntimeConfig, busy: float, parts: Parts) -> list[str]:
    """What a reader must know before the figures.

    Args:
        busy: processes that ran or waited for a core before anything was measured (getloadavg(3)).
    """
    found = []
    if busy > 0.5:
        found.append(f"The machine was busy before: {busy:.1f} processes ran or waited on average over a minute.")
    if config.preset is not None and not load_preset(config.preset).exact:
        found.append(f"Preset {config.preset} is not exact.")
    for comparison in parts.get("comparisons", ()):
        if comparison.rounds == 1:
            found.append(f"{comparison.title}: one round; its intervals say nothing of how runs differ.")
    steady = parts.get("steady")
    for worker in steady.leaks if steady is not None else ():
        growth, low, high = (size / 2**20 for size in (worker.trend.bytes_a_block, worker.trend.low, worker.trend.high))
        found.append(f"Leak: {worker.worker} grows by {growth:.2f} MiB a block [{low:.2f}, {high:.2f}].")
    return found


def summary(report: Report, out: Path) -> str:
    """One line of JSON for scripts: the main figures and where the rest is."""
    line: dict[str, Any] = {"bench": report.command.split()[0], "report": str(out / "report.json")}
    if report.steady is not None:
        steady = report.steady
        line |= {"pixel_fps": round(steady.pixel_fps, 2), "block_ms_p50": round(steady.block_interval_ms.p50, 2)}
        line |= {"block_ms_p99": round(steady.block_interval_ms.p99, 2), "rtf": round(steady.rtf, 3)}
    for comparison in report.comparisons:
        ratios = comparison.ratios["block"].items()
        line[comparison.title] = {name: [round(v, 4) for v in (r.value, r.low, r.high)] for name, r in ratios}
    return json.dumps(line)
