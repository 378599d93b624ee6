"""The process that compares: a job on standard input, the table on standard output, progress on standard error.

Ends with 0 where every option passes the gate, 1 where one does not or the comparison fails, 2 after a person's error.
"""

import logging
import sys
from pathlib import Path

from ipc.errors import InputError, LongLiveError, UserError
from workers.quality.comparison import Comparison
from workers.quality.job import Job
from workers.quality.report import Report
from workers.quality.table import decibels, place, print_report, printable


def main() -> int:
    """Runs the job; the exit code."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    job = Job.model_validate_json(sys.stdin.read())
    try:
        report = Comparison(job, _say).report()
        write(report, job.out / "report.json")
    except LongLiveError as error:
        _say(f"error: {error}")
        return error.exit_code if isinstance(error, UserError) else 1
    print_report(report)
    for line in (wrote(report, job.out), *verdict(report)):
        _tell(line)
    return 0 if report.passed else 1


def write(report: Report, path: Path) -> None:
    """The file, at once or not at all. Raises InputError."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(report.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def wrote(report: Report, folder: Path) -> str:
    """Which files there are now; of several options' pictures the first and the last."""
    pictures = [file for one in report.against for file in one.files]
    shown = " and ".join(pictures) if len(report.against) == 1 else f"{pictures[0]} to {pictures[-1]}"
    return f"wrote {folder / 'report.json'}, beside it {shown}"


def verdict(report: Report) -> list[str]:
    """A line for each option that fails the gate, naming its worst block; one line where none does."""
    gate, lines = report.gate, []
    for one in report.against:
        found = getattr(one, gate.judges)
        if not one.passed:
            where = f"{place(found)} ({found.worst.prompt})"
            lines.append(
                f"failed: {one.option.name}: {gate.judges.replace('_', '-')}, {where}: found"
                f" {decibels(found.worst.psnr_db)} dB, expected at least {gate.least_db:g}"
            )
    return lines or [f"passed: every block reaches {gate.least_db:g} dB, {gate.judges.replace('_', '-')}"]


def _say(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def _tell(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
