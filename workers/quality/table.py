"""A report on the terminal: one row an option, and how they diverge. Knows the report, computes nothing."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from workers.quality.report import Against, Compared, Report, Score

LEAST_COLUMNS = 120
MOMENTS = 10
"""Blocks that have a column of their own."""


def print_report(report: Report) -> None:
    """On standard output; 120 columns where that is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LEAST_COLUMNS
    console.print(_options(report))
    console.print(_divergence(report))
    for line in report.not_measured:
        console.print(Text(printable(line)), soft_wrap=True)


def decibels(value: float | None) -> str:
    """dB, or `equal`."""
    return "equal" if value is None else f"{value:.1f}"


def share(scores: Iterable[Score]) -> str:
    """Of all outcomes together, those that are right."""
    all_of = list(scores)
    count = sum(score.of for score in all_of)
    return f"{sum(score.mean * score.of for score in all_of) / count:.3f}" if count else "-"


def printable(text: str) -> str:
    """As it may go to a terminal: one line, no control characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _options(report: Report) -> Table:
    gate = report.gate
    judged, clipped = (any(getattr(one, name) is not None for one in report.against) for name in ("judge", "clip"))
    table = Table(
        title=Text(printable(f"A: {report.a.name}; stories: {len(report.stories)}, of {report.blocks} blocks"))
    )
    table.add_column("against A")
    headers = ["taught\nworst dB", "at\nstory:block", "least\nSSIM", "latent\nerror", "free\nworst dB", "first\nbelow"]
    headers += [*(["judge\nA, B"] if judged else []), *(["CLIP\nA, B"] if clipped else [])]
    for header in (*headers, f"{gate.least_db:g} dB\n{'free' if gate.judges == 'free_running' else 'taught'}"):
        table.add_column(header, no_wrap=True)
    for one in report.against:
        cells = [*_figures(one), *([_judge(one)] if judged else []), *([_clip(one)] if clipped else [])]
        table.add_row(_name(one), *cells, "passed" if one.passed else "FAILED")
    return table


def _name(one: Against) -> Text:
    """Whole, on as many lines as it needs."""
    return Text(printable(one.option.name), overflow="fold")


def _figures(one: Against) -> list[str]:
    forced, free = one.teacher_forced, one.free_running
    below = [block for block in free.first_below if block is not None]
    return [
        decibels(forced.worst.psnr_db),
        "-" if forced.worst.psnr_db is None else f"{forced.worst.story}:{forced.worst.block}",
        _least_ssim(forced),
        f"{max(block.latent_error for block in forced.blocks):.1e}",
        decibels(free.worst.psnr_db),
        f"block {min(below)}" if below else "none",
    ]


def _judge(one: Against) -> str:
    return "-" if one.judge is None else f"{share(one.judge.a.values())}, {share(one.judge.b.values())}"


def _clip(one: Against) -> str:
    return "-" if one.clip is None else f"{one.clip.a:.1f}, {one.clip.b:.1f}"


def place(compared: Compared) -> str:
    """Where the worst block is; stories and blocks are counted from 0."""
    return f"story {compared.worst.story}, block {compared.worst.block}"


def _least_ssim(compared: Compared) -> str:
    found = [block.ssim for block in compared.blocks if block.ssim is not None]
    return f"{min(found):.3f}" if found else "-"


def _divergence(report: Report) -> Table:
    every = -(-report.blocks // MOMENTS)
    shown = range(0, report.blocks, every)
    table = Table("worst dB", *(f"block {block}" for block in shown), title="free-running, over time")
    for one in report.against:
        moments = [one.free_running.over_time[block] for block in shown]
        table.add_row(_name(one), *(decibels(moment.worst_psnr_db) for moment in moments))
    return table
