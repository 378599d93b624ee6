"""A soak's report as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """To standard output unless another console is given."""
    console = console or Console()
    console.print(
        f"{report['config']}, pace {report['pace']}, {report['blocks']} blocks in {report['seconds']:g} s with a full"
        f" window, {'no GPU' if report['gpu_before_bytes'] is None else 'GPU memory by ' + report['memory_by']}"
    )
    for table in (_blocks(report), _switches(report), _memory(report), _killed(report), _checks(report)):
        if table.row_count:
            console.print(table)


def _blocks(report: dict[str, Any]) -> Table:
    table = Table("ms a block", "blocks", "count", "median", "p99", "p99 / median", "max")
    for kind, found in report["block_ms"].items():
        for name, d in found.items():
            numbers = (f"{d['p50']:.1f}", f"{d['p99']:.1f}", f"{d['p99'] / d['p50']:.2f}", f"{d['max']:.1f}")
            table.add_row(name, "with a switch" if kind == "switch" else kind, str(d["count"]), *numbers)
    return table


def _switches(report: dict[str, Any]) -> Table:
    table = Table(f"ms from accepted, {report['switches']} switches", "median", "worst")
    for name, (middle, worst) in report["switch_ms"].items():
        table.add_row(name, f"{middle:.1f}", f"{worst:.1f}")
    return table


def _memory(report: dict[str, Any]) -> Table:
    table = Table("MiB", "mean", "max", "max - min", "slope a minute", "growth over the series")
    held = report["memory"]
    if report["gpu_before_bytes"] is None:
        table.add_row("GPU", *["no GPU"] * 5)
    for name, m in held.items():
        numbers = (m["mean_bytes"], m["max_bytes"], m["max_bytes"] - m["min_bytes"])
        slope = 60 * m["slope_bytes_a_second"] / MIB
        table.add_row(name, *(f"{n / MIB:.1f}" for n in numbers), f"{slope:+.2f}", f"{m['growth_bytes'] / MIB:+.1f}")
    return table


def _killed(report: dict[str, Any]) -> Table:
    table = Table("killed", "ready after s", "prompt on air after s", "gap at the sinks s", "GPU MiB before", "after")
    for k in report["killed"]:
        sizes = ("no GPU" if k[key] is None else f"{k[key] / MIB:.0f}" for key in ("before_bytes", "after_bytes"))
        table.add_row(k["worker"], *(f"{k[key]:.2f}" for key in ("ready_s", "on_air_s", "gap_s")), *sizes)
    return table


def _checks(report: dict[str, Any]) -> Table:
    table = Table("check", "", "found")
    words = {True: "holds", False: "FAILS", None: "not judged"}
    for check in report["checks"]:
        table.add_row(check["name"], words[check["passed"]], check["text"])
    return table
