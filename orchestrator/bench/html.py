"""`report.html`: one file with tables and plots, nothing loaded from anywhere. Pure: a report in, text out."""

import itertools
from collections.abc import Iterator, Sequence
from html import escape

import yaml

from orchestrator.bench import plots
from orchestrator.bench.report import BlockRow, Comparison, Report, Roofline, Steady, SwitchCase, Throughput
from orchestrator.bench.steady import STAGES, block_intervals, span_ms, stage_times
from orchestrator.bench.tables import Grid, grids, headline, machine_line

SHOWN = 8
"""Blocks of the stage chart."""
MIB = 2**20
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 860px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .6em 0 } caption { text-align: left; font-weight: 600; padding: .3em 0 }
td, th { padding: .15em .7em; border-bottom: 1px solid #8884; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { width: 100%; height: auto; margin: .8em 0 } .title { font-weight: 600; font-size: 13px; fill: currentColor }
.tick { font-size: 11px; fill: currentColor } .on { font-size: 10px; fill: #fff } .axis { stroke: currentColor }
.grid { stroke: #8883 } .mark { stroke: #c03945; stroke-dasharray: 3 3 } pre { overflow-x: auto; font-size: 12px }
"""


def as_html(report: Report) -> str:
    """The whole page."""
    config = yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True)
    body = [
        f"<h1>{escape(report.command)}</h1><p>{escape(headline(report))}</p><p>{escape(machine_line(report))}</p>",
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        *charts(report),
        *(_table(grid) for grid in grids(report)),
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>",
    ]
    title = escape(f"LongLive benchmark, {report.made_at}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def charts(report: Report) -> Iterator[str]:
    """Every plot that the report has numbers for."""
    if report.steady is not None:
        yield from _steady(report.steady)
    for case in report.switching:
        yield _switches(case)
    if report.throughput is not None:
        yield from _throughput(report.throughput)
    for comparison in report.comparisons:
        yield _comparison(comparison)
    for axis in dict.fromkeys(case.axis for case in report.scaling):
        found = {case.name: case.pixel_fps for case in report.scaling if case.axis == axis}
        yield plots.bars(found, f"Frames a second by {axis}", "fps")
    if report.roofline is not None:
        yield _roofline(report.roofline)


def _steady(steady: Steady) -> Iterator[str]:
    block_ms, whole = block_intervals(steady.rows), steady.block_interval_ms
    marks = {"p50": whole.p50, "p99": whole.p99, "max": whole.max}
    yield plots.histogram(block_ms, "Time from block to block", "ms", marks)
    yield plots.lines(_series(steady.rows), "Latency by block", "block", "ms", _switched(steady.rows))
    yield plots.gantt(_lanes(steady.rows), f"Stages, last {SHOWN} blocks")
    memory = {
        worker.worker: [(float(b), size / MIB) for b, size in zip(worker.blocks, worker.host_bytes, strict=True)]
        for worker in steady.memory
        if worker.blocks
    }
    if memory:
        yield plots.lines(memory, "Host memory by worker", "block", "MiB")


def _series(rows: Sequence[BlockRow]) -> dict[str, list[tuple[float, float]]]:
    blocks = [float(row.block) for row in rows]
    found = {stage: list(zip(blocks, stage_times(rows, stage), strict=True)) for stage in STAGES}
    whole = [span_ms(row, "denoiser", "output") for row in rows]
    return {**found, "end to end": list(zip(blocks, whole, strict=True))}


def _switched(rows: Sequence[BlockRow]) -> list[float]:
    return [float(b.block) for a, b in itertools.pairwise(rows) if a.version != b.version]


def _lanes(rows: Sequence[BlockRow]) -> dict[str, list[tuple[float, float, str]]]:
    shown = rows[-SHOWN:]
    start = shown[0].spans["denoiser"][0]
    return {
        stage: [((r.spans[stage][0] - start) / 1e6, (r.spans[stage][1] - start) / 1e6, f"{r.block}") for r in shown]
        for stage in STAGES
    }


def _switches(case: SwitchCase) -> str:
    title = f"Latency by block with switches, recache {case.recache}, {case.switch}"
    return plots.lines(_series(case.rows), title, "block", "ms", _switched(case.rows))


def _throughput(throughput: Throughput) -> Iterator[str]:
    rate = {"frames": [(float(second), float(n)) for second, n in enumerate(throughput.fps_by_second)]}
    if rate["frames"]:
        yield plots.lines(rate, "Frames a second", "s", "fps")
    if throughput.load:
        busy = {"all cores": [(load.at_s, load.cpu_cores) for load in throughput.load]}
        for worker in throughput.load[0].worker_cores:
            busy[worker] = [(load.at_s, load.worker_cores.get(worker, 0.0)) for load in throughput.load]
        yield plots.lines(busy, "Busy cores", "s", "cores")
        gpus = enumerate(throughput.gpu_samples())
        used = {f"GPU {number}": gpu["utilization.gpu"] for number, gpu in gpus if "utilization.gpu" in gpu}
        if used:
            yield plots.lines(used, "GPU load", "s", "%")


def _comparison(comparison: Comparison) -> str:
    values = {name: (ratio.value, ratio.low, ratio.high) for name, ratio in comparison.ratios["block"].items()}
    return plots.intervals(values, comparison.title, f"times as fast as {comparison.sides[0].name}, a block")


def _roofline(roofline: Roofline) -> str:
    places = {
        f"{part.stage}, {part.share:.0%} of its limit": (
            part.flops / part.bytes,
            part.flops / (part.measured_ms / 1000),
        )
        for part in roofline.parts
    }
    return plots.roof(roofline.dtype_flops_per_s, roofline.bytes_per_s, places, f"Roofline, {roofline.device}")


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    return f"<table><caption>{escape(grid.title)}</caption><tr>{head}</tr>{rows}</table>"
