"""Measurements that need the models in a process of their own: scripts of the checkout that print JSON as last line.

The orchestrator never imports torch; what is measured here runs beside it, in the same command on the same machine.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ipc.errors import InputError, LongLiveError
from orchestrator.bench.compare import Contender, Times, identity
from orchestrator.bench.report import Roofline
from orchestrator.bench.runs import Subject
from orchestrator.checkout import ROOT, SCRIPTS, with_sources
from orchestrator.progress import one_line

SCRIPT_S = 3600.0
"""How long a script may take."""
STRAIGHTFORWARD = "straightforward"
"""Name of the side that scripts/baseline.py makes."""


def straightforward(subject: Subject, blocks: int) -> Contender:
    """The straightforward pipeline: one process, LoRA beside the weights, a rolled cache, the VAE in line."""
    warmup = subject.load().stream.window_blocks + 1

    def measure() -> Times:
        times: Times = run_script("bench_reference.py", subject, "--blocks", str(blocks), "--warmup", str(warmup))["ms"]
        return times

    return Contender(STRAIGHTFORWARD, subject.overrides, f"{STRAIGHTFORWARD} {identity(subject)}", measure)


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
        LongLiveError: it failed, or took longer than `SCRIPT_S`.
    """
    script = SCRIPTS / name
    if not script.is_file():
        raise InputError(f"{script}: no such file; this measurement needs a checkout of the repository")
    changes = [word for override in subject.overrides for word in ("--set", override)]
    command: Sequence[str] = (sys.executable, str(script), "--config", subject.config, *changes, *arguments)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=with_sources(), capture_output=True, text=True, timeout=SCRIPT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LongLiveError(f"{name}: not done within {SCRIPT_S:g} s; measure fewer blocks") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise LongLiveError(f"{name}: ended with code {done.returncode}: {one_line(said[-1])[:400]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found
