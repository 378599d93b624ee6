"""A report as tables, for the terminal, for the page, and as a block of Markdown to paste in an issue. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.bench.report import Comparison, Distribution, Report, Roofline, Steady, SwitchCase, Throughput

MIB = 2**20
TIMES = ("mean", "p50", "p95", "p99", "p99.9", "max", "jitter")
LISTED = 12
"""Operations that are shown of a profile."""


@dataclass(frozen=True)
class Grid:
    """Cells as text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(report: Report) -> Iterator[Grid]:
    """A table for each part that was measured."""
    if report.steady is not None:
        yield from _steady(report.steady)
    if report.switching:
        yield _switching(report.switching)
        yield _parts(report.switching)
    if report.throughput is not None:
        yield _throughput(report.throughput)
    if report.startup:
        starts = [
            (s.kind, *(f"{t:.2f}" for t in (s.answers_s, s.generating_s, s.first_frame_s))) for s in report.startup
        ]
        yield Grid("Start, seconds from the command", ("start", "answers", "generates", "first frame"), tuple(starts))
    if report.scaling:
        yield Grid(
            "Scaling",
            ("axis", "point", "fps in all", "RTF each", "ms a block, p50", "p99"),
            tuple(
                (
                    *(case.axis, case.name, f"{case.pixel_fps:.1f}", f"{case.rtf_each:.2f}"),
                    *(f"{case.block_interval_ms.p50:.1f}", f"{case.block_interval_ms.p99:.1f}"),
                )
                for case in report.scaling
            ),
        )
    for comparison in report.comparisons:
        yield _comparison(comparison)
    if report.roofline is not None:
        yield _roofline(report.roofline)
    if report.operations:
        yield _operations(report)


def headline(report: Report) -> str:
    """What was measured, in a line."""
    parts = [report.config["name"], f"{report.config['video']['width']}x{report.config['video']['height']}"]
    if report.config.get("preset"):
        parts.append(f"preset {report.config['preset']}")
    if report.steady is not None:
        steady = report.steady
        parts.append(
            f"{steady.pixel_fps:.1f} fps, RTF {steady.rtf:.2f}, p99 {steady.block_interval_ms.p99:.0f} ms a block"
        )
    parts.append(report.made_at)
    return " · ".join(parts)


def machine_line(report: Report) -> str:
    """Where it was measured, in a line."""
    machine, software = report.environment.machine, report.environment.software
    gpus = [f"{gpu.get('name', 'GPU')}, driver {gpu.get('driver_version', '?')}" for gpu in machine.gpus]
    parts = [f"{machine.cores} cores of {machine.cpu}", *gpus, f"torch {software.versions.get('torch', 'none')}"]
    parts.append(f"commit {(software.commit or 'none')[:12]}")
    return " · ".join(parts)


def print_report(report: Report, console: Console) -> None:
    """All tables."""
    for grid in grids(report):
        table = Table(*grid.head, title=grid.title, title_justify="left")
        for row in grid.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in report.notes:
        console.print(Text(note))


def as_markdown(report: Report) -> str:
    """To paste in an issue."""
    lines = [f"**{report.command}**", "", headline(report), "", machine_line(report)]
    lines += [f"- {note}" for note in report.notes]
    for grid in grids(report):
        lines += ["", f"**{grid.title}**", "", _row(grid.head), _row(["---"] * len(grid.head))]
        lines += [_row(row) for row in grid.rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _times(times: Distribution) -> tuple[str, ...]:
    values = (times.mean, times.p50, times.p95, times.p99, times.p999, times.max, times.jitter)
    return tuple(f"{value:.2f}" for value in values)


def _steady(steady: Steady) -> Iterator[Grid]:
    rows = [(f"{stage}", *_times(times)) for stage, times in steady.stage_ms.items()]
    rows += [(f"{stage}, CUDA events", *_times(times)) for stage, times in steady.device_ms.items()]
    rows += [
        ("block to block", *_times(steady.block_interval_ms)),
        ("frame to frame", *_times(steady.frame_interval_ms)),
        ("end to end", *_times(steady.end_to_end_ms)),
    ]
    yield Grid(f"Steady, {steady.blocks} blocks after {steady.warmup_blocks}, ms", ("what", *TIMES), tuple(rows))
    rates = [("blocks a second", f"{steady.block_fps:.2f}"), ("pixel fps", f"{steady.pixel_fps:.2f}")]
    rates += [("RTF", f"{steady.rtf:.2f}")]
    rates += [(f"late blocks at {m.fps} fps ({m.deadline_ms:.0f} ms)", f"{m.missed} of {m.of}") for m in steady.misses]
    yield Grid("Rates", ("what", "value"), tuple(rates))
    yield Grid(
        "Memory",
        ("worker", "host peak, MiB", "device peak, MiB", "growth, KiB a block", "leak"),
        tuple(
            (
                *(m.worker, f"{m.host_peak_bytes / MIB:.0f}", f"{m.device_peak_bytes / MIB:.0f}"),
                *(
                    ("", "not enough blocks")
                    if m.trend is None
                    else (
                        f"{m.trend.bytes_a_block / 1024:.1f} [{m.trend.low / 1024:.1f}, {m.trend.high / 1024:.1f}]",
                        "LEAK" if m.trend.leak else "no",
                    )
                ),
            )
            for m in steady.memory
        ),
    )


def _throughput(seen: Throughput) -> Grid:
    """Rates, and means of what was sampled beside them."""
    rows = [("pixel fps", f"{seen.pixel_fps:.2f}"), ("RTF", f"{seen.rtf:.2f}"), ("seconds", f"{seen.seconds:.1f}")]
    rows.append(("busy cores, mean", _mean([load.cpu_cores for load in seen.load], ".2f")))
    rows.append(("CPU clock, mean, MHz", _mean([load.cpu_mhz for load in seen.load if load.cpu_mhz], ".0f")))
    for number, gpu in enumerate(seen.gpu_samples()):
        for name, samples in gpu.items():
            rows.append((f"GPU {number}, {name}, mean", _mean([value for _, value in samples], ".0f")))
    return Grid("Throughput", ("what", "value"), tuple(rows))


def _mean(values: Sequence[float], form: str) -> str:
    return format(fmean(values), form) if values else "-"


def _switching(cases: Sequence[SwitchCase]) -> Grid:
    rows = []
    for case in cases:
        for kind, times in (("hot", case.hot), ("cold", case.cold)):
            if times is not None:
                rows.append((case.recache, case.switch, kind, str(times.count), *_times(times)))
    return Grid("Prompt switches, ms to the first frame", ("recache", "switch", "prompt", "n", *TIMES), tuple(rows))


def _parts(cases: Sequence[SwitchCase]) -> Grid:
    names = tuple(cases[0].parts)
    rows = [(case.recache, case.switch, *(f"{case.parts[name].mean:.1f}" for name in names)) for case in cases]
    return Grid("Where a switch's time goes, mean ms", ("recache", "switch", *names), tuple(rows))


def _comparison(comparison: Comparison) -> Grid:
    first = comparison.sides[0]
    empty = [""] * len(comparison.ratios)
    rows = [(first.name, f"{first.block_interval_ms.p50:.1f}", f"{first.block_interval_ms.p99:.1f}", *empty)]
    for side in comparison.sides[1:]:
        ratios = [comparison.ratios[metric][side.name] for metric in comparison.ratios]
        shown = (f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" for ratio in ratios)
        rows.append((side.name, f"{side.block_interval_ms.p50:.1f}", f"{side.block_interval_ms.p99:.1f}", *shown))
    faster = tuple(f"times as fast, {metric}" for metric in comparison.ratios)
    title = f"{comparison.title}: {comparison.rounds} rounds of {comparison.blocks} blocks in turn"
    return Grid(title, ("side", "ms a block, p50", "p99", *faster), tuple(rows))


def _roofline(roofline: Roofline) -> Grid:
    ceilings = ", ".join(f"{name} {rate / 1e12:.3f} TFLOP/s" for name, rate in roofline.dtype_flops_per_s.items())
    rows = [
        (
            *(part.stage, f"{part.flops / 1e9:.2f}", f"{part.bytes / 1e9:.3f}"),
            *(f"{part.measured_ms:.1f}", f"{part.limit_ms:.1f}", f"{part.share:.0%}"),
        )
        for part in roofline.parts
    ]
    title = f"Roofline: {ceilings}, {roofline.bytes_per_s / 1e9:.1f} GB/s"
    return Grid(
        title, ("stage", "GFLOP a block", "GB of products", "ms", "limit, ms", "share of the limit"), tuple(rows)
    )


def _operations(report: Report) -> Grid:
    rows = []
    for stage in dict.fromkeys(row["stage"] for row in report.operations):
        own = [row for row in report.operations if row["stage"] == stage][:LISTED]
        rows += [
            (stage, row["operation"], f"{row['ms_a_block']:.2f}", f"{row['calls_a_block']:.0f}", f"{row['share']:.1%}")
            for row in own
        ]
    return Grid("Time on the device by operation", ("stage", "operation", "ms a block", "calls", "share"), tuple(rows))
