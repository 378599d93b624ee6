"""Progress: any order of news is told, results alone go to standard output, and texts do not steer the terminal."""

import io
import itertools

import pytest
from rich.console import Console

from orchestrator.plan import Reporter
from orchestrator.progress import PlainReporter, TerminalReporter


def _terminal() -> TerminalReporter:
    return TerminalReporter(Console(file=io.StringIO(), force_terminal=True, width=100))


NEWS = {
    "loading": lambda reporter: reporter.loading("denoiser", "reading weights [1/2]"),
    "ready": lambda reporter: reporter.loading("denoiser", "ready (note)"),
    "up": lambda reporter: reporter.up("up: pocket"),
    "note": lambda reporter: reporter.note("denoiser died: [/b] starting it again"),
    "frames": lambda reporter: reporter.frames(12, 160, 16.0),
    "endless": lambda reporter: reporter.frames(12, None, 16.0),
}


@pytest.mark.parametrize("make", [_terminal, PlainReporter], ids=["terminal", "plain"])
def test_any_order_of_news_is_told(make: type[PlainReporter], capsys: pytest.CaptureFixture[str]) -> None:
    """Frames may be counted before the run is up, and a stage that was restarted loads again after it."""
    for order in itertools.product(NEWS, repeat=3):
        reporter: Reporter = make()
        for name in order:
            NEWS[name](reporter)
        reporter.close()
        reporter.close()
        assert capsys.readouterr().out == "up: pocket\n" * order.count("up")


def test_plain_lines_about_frames_are_rare_and_the_last_is_always_told(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    reporter = PlainReporter(lambda: now)
    for done in range(0, 161):
        now = done / 16
        reporter.frames(done, 160, 16.0)
    reporter.frames(160, 160, 16.0)
    reporter.frames(161, None, 16.0)
    told = capsys.readouterr().err.splitlines()
    assert told == ["frames 80 of 160, 16.0 fps", "frames 160 of 160, 16.0 fps"]


def test_a_plain_stage_does_not_repeat_itself(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainReporter()
    for text in ("loading", "loading", "ready", "loading"):
        reporter.loading("denoiser", text)
    assert capsys.readouterr().err == "denoiser: loading\ndenoiser: ready\ndenoiser: loading\n"


def test_the_terminal_shows_stages_then_frames() -> None:
    screen = io.StringIO()
    reporter = TerminalReporter(Console(file=screen, force_terminal=True, width=100))
    reporter.loading("denoiser", "reading weights [1/2]")
    reporter.loading("denoiser", "ready")
    reporter.up("up: pocket")
    reporter.frames(12, 160, 16.0)
    reporter.close()
    shown = screen.getvalue()
    assert "✓" in shown and "denoiser" in shown and "12 of 160, 16.0 fps" in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is there again"
