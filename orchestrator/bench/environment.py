"""What a report says of the machine and the software. Reads files and asks programs that are there; guesses nothing."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.bench.report import Environment, Machine, Software
from orchestrator.checkout import ROOT

PACKAGES = (
    "longlive-runtime",
    "torch",
    "triton",
    "flash-attn",
    "fa3-fwd",
    "transformers",
    "pyzmq",
    "pydantic",
    "numpy",
)
GPU_FACTS = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
GPU_LOAD = ("utilization.gpu", "clocks.sm", "clocks.mem", "memory.used", "power.draw", "temperature.gpu")
ANSWER_S = 10.0


def environment() -> Environment:
    """As it is now."""
    machine = Machine(
        cpu=_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        cpu_mhz=cpu_mhz(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()}",
        gpus=tuple(gpu_rows(GPU_FACTS)),
    )
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Environment(machine=machine, software=Software(commit=commit(ROOT), versions=versions))


def commit(folder: Path) -> str | None:
    """The checkout's commit, `+` behind it where tracked files were changed; None where there is no git or checkout.

    An installed package may lie inside a checkout of something else, whose commit says nothing of it.
    """
    if not (folder / ".git").exists():
        return None
    number = _answer(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not number:
        return None
    return number + ("+" if _answer(["git", "-C", str(folder), "status", "--porcelain", "-uno"]) else "")


def gpu_rows(fields: Sequence[str]) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; nothing where it is not installed."""
    answer = _answer(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    rows = [[value.strip() for value in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def gpu_load() -> tuple[dict[str, float], ...]:
    """Load and clocks of each GPU, as far as they are numbers."""
    return tuple(
        {name: float(value) for name, value in row.items() if value.replace(".", "", 1).isdigit()}
        for row in gpu_rows(GPU_LOAD)
    )


def cpu_mhz() -> float | None:
    """Mean clock of the cores now; None where the kernel does not say."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _field(path: Path, name: str) -> str | None:
    lines = (line.partition(":") for line in _read(path).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _answer(command: Sequence[str]) -> str:
    """What a program prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
