"""Measurements that need the models in a process of their own: scripts of the checkout that print JSON as last line.

The orchestrator never imports torch; what is measured here runs beside it, in the same command on the same machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ipc.errors import InputError, LongLiveError
from orchestrator.bench.compare import Contender, Times
from orchestrator.bench.environment import REPOSITORY
from orchestrator.bench.report import Roofline
from orchestrator.bench.runs import Subject
from orchestrator.progress import one_line

SCRIPTS = REPOSITORY / "scripts"
STRAIGHTFORWARD = "straightforward"
"""Name of the side that scripts/baseline.py makes."""


def straightforward(subject: Subject, blocks: int, warmup: int) -> Contender:
    """The straightforward pipeline: one process, LoRA beside the weights, a rolled cache, the VAE in line."""

    def measure() -> Times:
        times: Times = run_script("bench_reference.py", subject, "--blocks", str(blocks), "--warmup", str(warmup))["ms"]
        return times

    return Contender(STRAIGHTFORWARD, subject.overrides, measure)


def roofline(subject: Subject, repeats: int) -> Roofline:
    """Ceilings of the device and the stages under them. Raises LongLiveError."""
    return Roofline.model_validate(run_script("bench_roofline.py", subject, "--repeats", str(repeats)))


def operations(subject: Subject, blocks: int) -> tuple[dict[str, Any], ...]:
    """Device time by operation, the largest first. Raises LongLiveError."""
    return tuple(run_script("bench_operations.py", subject, "--blocks", str(blocks))["operations"])


def run_script(name: str, subject: Subject, *arguments: str) -> dict[str, Any]:
    """The JSON object on a script's last line.

    Raises:
        InputError: there is no checkout with the script.
        LongLiveError: it failed.
    """
    script = SCRIPTS / name
    if not script.is_file():
        raise InputError(f"{script}: no such file; this measurement needs a checkout of the repository")
    changes = [word for override in subject.overrides for word in ("--set", override)]
    command: Sequence[str] = (sys.executable, str(script), "--config", subject.config, *changes, *arguments)
    done = subprocess.run(command, cwd=REPOSITORY, env=_with_repository(), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise LongLiveError(f"{name}: ended with code {done.returncode}: {one_line(done.stderr)[-400:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _with_repository() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
