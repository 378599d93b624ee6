"""What the kernel says of processes (proc(5)): resident memory and processor time. Knows no worker."""

import os
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int | None:
    """Resident memory, shared pages included; None for a process that is gone."""
    fields = _fields(pid, "statm")
    return int(fields[1]) * PAGE if fields else None


def own_resident_bytes() -> int:
    """Resident memory of this process."""
    return resident_bytes(os.getpid()) or 0


def cpu_seconds(pid: int) -> float | None:
    """Processor time in user and kernel mode; None for a process that is gone."""
    fields = _fields(pid, "stat")
    return (int(fields[11]) + int(fields[12])) / TICK if fields else None


def machine_cpu_seconds() -> float:
    """Processor time that all cores together were busy since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def _fields(pid: int, name: str) -> list[str]:
    """Of `stat` those behind the command, which may hold blanks: the first is the state."""
    try:
        text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
