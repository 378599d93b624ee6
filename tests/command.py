"""Runs the real `orchestrator` command in processes of its own, and sees what it leaves behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parent.parent


class Command:
    """`orchestrator` with a run directory of its own, and if asked a folder for temporary files."""

    def __init__(self, run_directory: Path, temporary: Path | None = None) -> None:
        self.run_directory = run_directory
        self._environment = {**os.environ, "LONGLIVE_RUN_DIR": str(run_directory), "PYTHONPATH": str(REPOSITORY)}
        if temporary is not None:
            self._environment["TMPDIR"] = str(temporary)

    def run(self, *arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self._line(arguments),
            env=self._environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Starts a command and leaves it running."""
        return subprocess.Popen(
            self._line(arguments),
            env=self._environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _line(self, arguments: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]


def until(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Waits for a condition; fails when it does not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not after {timeout_s} s: {condition}")
        time.sleep(0.05)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all its descendants."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
