"""Which measurements a command makes, at which size, and what it leaves: tables, `report.json`, `report.html`, a block
to paste. Knows what each measurement is called, not how it is done.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.load import load_preset
from configs.schema import RuntimeConfig
from ipc.errors import InputError, LongLiveError
from orchestrator.bench.compare import (
    OFF,
    ON,
    Contest,
    ablations,
    compare,
    contender,
    geometry_ablations,
    identity,
    named_subject,
)
from orchestrator.bench.environment import environment
from orchestrator.bench.html import as_html
from orchestrator.bench.models_alone import STRAIGHTFORWARD, operations, roofline, straightforward
from orchestrator.bench.report import Case, Report, Start, Steady, SwitchCase
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.scaling import case_of, measure_point, points
from orchestrator.bench.steady import checked_warmup, steady_of
from orchestrator.bench.sustained import measure_starts, measure_throughput
from orchestrator.bench.switching import measure_switches, switch_cases
from orchestrator.bench.tables import as_markdown, print_report
from orchestrator.bench.trace import write_trace
from orchestrator.options import writable_folder

Parts = dict[str, Any]
"""Fields of a `Report`."""
UNFINISHED = "Not finished: the command still measured when this was written, or failed."


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
    straightforward_blocks: int
    ablation_rounds: int
    repeats: int


FULL = Sizes(1000, 50, 50, 60.0, 3, 50, 7, 60, 20, 5, 20)
QUICK = Sizes(60, 30, 7, 8.0, 1, 4, 2, 6, 3, 1, 5)
"""All parts on `pocket` in some eight minutes where a block takes 470 ms and a start 8 s."""


@dataclass(frozen=True)
class Bench:
    """One command. Its measurements tell what they have whenever there is more of it, so that it can be kept.

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

    def steady(self, pace: str = "free", profile: bool = False) -> Iterator[Parts]:
        """Latencies of a warm stream; with `profile` its trace, and time by operation."""
        config, sizes = self.subject.load(), self.sizes
        checked_warmup(config, sizes.warmup)
        self.say(f"steady: {sizes.blocks} blocks after {sizes.warmup}")
        recording = record(self.subject, sizes.warmup + sizes.blocks, (f"output.pace={pace}",))
        yield {"steady": steady_of(recording, config, sizes.warmup, pace)}
        if profile:
            write_trace(recording, self.out / "trace.json")
            self.say("time on the device by operation")
            yield {"operations": operations(self.subject, sizes.repeats)}

    def switch(self, pace: str = "live") -> Iterator[Parts]:
        """Prompt switches by every recache policy and cut."""
        cases: list[SwitchCase] = []
        for recache, cut in switch_cases(self.subject.load().stream, self.quick):
            self.say(f"switch: {self.sizes.switches} switches, recache {recache}, {cut}")
            cases.append(measure_switches(self.subject, recache, cut, self.sizes.switches, pace, self.seed))
            yield {"switching": tuple(cases)}

    def throughput(self) -> Iterator[Parts]:
        """A sustained stream with the machine's load."""
        self.say(f"throughput: {self.sizes.seconds:g} s")
        yield {"throughput": measure_throughput(self.subject, self.sizes.seconds)}

    def startup(self) -> Iterator[Parts]:
        """Cold and warm starts."""
        starts: list[Start] = []
        for number in range(self.sizes.starts):
            self.say(f"startup: {number + 1} of {self.sizes.starts}, cold and warm")
            starts += measure_starts(self.subject)
            yield {"startup": tuple(starts)}

    def scaling(self, axes: Sequence[str], base: Steady | None = None) -> Iterator[Parts]:
        """Points along each axis; one that two axes share is measured once.

        Args:
            base: the subject's own stream, where it was measured already.
        """
        measured: dict[tuple[str, int], Case] = {}
        cases: list[Case] = []
        for point in points(self.subject, tuple(axes), self.quick):
            axis, name, settings, streams = point
            key = (identity(self.subject.with_settings(*settings)), streams)
            if base is not None and key == (identity(self.subject), 1):
                measured[key] = case_of(point, self.subject.load(), [[row.spans["output"][1] for row in base.rows]])
            if key not in measured:
                self.say(f"scaling: {axis} {name}")
                measured[key] = measure_point(self.subject, point, self.sizes.scaling_blocks)
            cases.append(measured[key].model_copy(update={"axis": axis, "name": name, "settings": settings}))
            yield {"scaling": tuple(cases)}

    def compare(self, sides: Sequence[str]) -> Iterator[Parts]:
        """Presets or configurations in turn."""
        yield from self._compared([self._contest_of(sides)])

    def ablate(self, kinds: Sequence[str]) -> Iterator[Parts]:
        """One optimisation off at a time from the subject, on at a time from `reference`; windows and precisions."""
        yield from self._compared([self._ablation(kind) for kind in kinds])

    def reference(self, sides: Sequence[str] = ()) -> Iterator[Parts]:
        """The straightforward pipeline and the runtime in turn, under each of some presets if given."""
        yield from self._compared([self._reference(sides)])

    def roofline(self) -> Iterator[Parts]:
        """The stages under the device's ceilings."""
        self.say("roofline")
        yield {"roofline": roofline(self.subject, self.sizes.repeats)}

    def all(self, sides: Sequence[str], axes: Sequence[str], kinds: Sequence[str], profile: bool) -> Iterator[Parts]:
        """Every measurement, one after the other; all comparisons in the same rounds."""
        contests = [self._reference(), self._contest_of(sides), *map(self._ablation, kinds)]
        base: Steady | None = None
        for parts in self.steady(profile=profile):
            base = parts.get("steady", base)
            yield parts
        yield from self.switch()
        yield from self.throughput()
        yield from self.startup()
        yield from self.scaling(axes, base)
        yield from self.roofline()
        yield from self._compared(contests)

    def run(self, measured: Iterable[Parts], console: Console) -> Report:
        """Measures, writes the outputs whenever there is more, and prints the tables.

        Raises:
            InputError: the folder of the outputs cannot be written.
            LongLiveError: a measurement failed; what was measured before is kept.
        """
        writable_folder(self.out, "--out")
        began, busy = time.monotonic(), os.getloadavg()[0]
        parts: Parts = {}
        made = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            for more in measured:
                parts |= more
                wall_s = time.monotonic() - began
                self.write(self._report(made, wall_s, busy, parts, (UNFINISHED,)))
                self.say(f"{', '.join(more)}: written after {wall_s:.0f} s")
        except LongLiveError:
            if parts:
                self.say(f"what was measured before is kept in {self.out}: {', '.join(parts)}")
            raise
        report = self._report(made, time.monotonic() - began, busy, parts)
        self.write(report)
        print_report(report, console)
        return report

    def write(self, report: Report) -> None:
        """All three outputs, each whole or not at all. Raises InputError."""
        texts = {"json": report.model_dump_json(indent=1) + "\n", "html": as_html(report), "md": as_markdown(report)}
        for kind, text in texts.items():
            path, new = self.out / f"report.{kind}", self.out / f"report.{kind}.new"
            try:
                new.write_text(text, encoding="utf-8")
                new.replace(path)
            except OSError as error:
                raise InputError(f"--out {path}: cannot be written: {error.strerror}") from error

    def _report(self, made: str, wall_s: float, busy: float, parts: Parts, first_notes: Sequence[str] = ()) -> Report:
        config = self.subject.load()
        return Report(
            command=self.command,
            made_at=made,
            wall_s=wall_s,
            environment=environment(),
            config=config.model_dump(mode="json"),
            seeds={"stream": config.seed, "bench": self.seed},
            notes=(*first_notes, *notes(config, busy, parts)),
            **parts,
        )

    def _compared(self, contests: Sequence[Contest]) -> Iterator[Parts]:
        for comparisons in compare(contests, self.seed, self.say):
            yield {"comparisons": comparisons}

    def _contest_of(self, sides: Sequence[str]) -> Contest:
        subjects = [(name, named_subject(name, self.subject)) for name in sides]
        return self._contest(" and ".join(sides), subjects, self.sizes.rounds)

    def _ablation(self, kind: str) -> Contest:
        base = self.subject.load().preset or "as configured"
        if kind == "on":
            reference = self.subject.with_settings("preset=reference")
            title, sides = "One on from reference", [("reference", reference), *ablations(reference, ON)]
        elif kind == "off":
            title, sides = f"One off from {base}", [(base, self.subject), *ablations(self.subject, OFF)]
        else:
            title = f"Window and precision from {base}"
            sides = [(base, self.subject), *geometry_ablations(self.subject)]
        return self._contest(title, sides, self.sizes.ablation_rounds)

    def _reference(self, names: Sequence[str] = ()) -> Contest:
        subjects = {name: named_subject(name, self.subject) for name in names} or {"runtime": self.subject}
        sides = [
            straightforward(self.subject, self.sizes.straightforward_blocks),
            *(contender(name, subject, self.sizes.round_blocks) for name, subject in subjects.items()),
        ]
        return Contest(f"{STRAIGHTFORWARD.capitalize()} and runtime", sides, self.sizes.rounds)

    def _contest(self, title: str, subjects: Sequence[tuple[str, Subject]], rounds: int) -> Contest:
        sides = [contender(name, subject, self.sizes.round_blocks) for name, subject in subjects]
        return Contest(title, sides, rounds)


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
