"""What a run holds while it runs: memory on GPUs, of all and by process, and resident memory, every second.

Asks NVML where `pynvml` can be imported, else nvidia-smi. Knows no stage.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ipc.processes import resident_bytes
from orchestrator.bench.environment import gpu_rows

SAMPLE_S = 1.0
MIB = 2**20


class Meter(Protocol):
    """Memory in use on all GPUs."""

    name: str

    def used(self) -> int | None:
        """Bytes; None without a GPU."""

    def by_process(self) -> dict[int, int]:
        """Bytes by process number, as the driver sees it: inside a container it may know others than we do."""


class Nvml:
    """By nvidia-ml-py. Raises ImportError, or NVMLError where there is no driver."""

    name = "NVML"

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def used(self) -> int | None:
        return sum(self._nvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in self._gpus) if self._gpus else None

    def by_process(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for gpu in self._gpus:
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu):
                found[process.pid] = found.get(process.pid, 0) + (process.usedGpuMemory or 0)
        return found


class NvidiaSmi:
    """By nvidia-smi; without one there is no GPU. It tells of all, not by process."""

    name = "nvidia-smi"

    def used(self) -> int | None:
        values = [row.get("memory.used", "") for row in gpu_rows(("memory.used",))]
        numbers = [int(value) for value in values if value.isdigit()]
        return sum(numbers) * MIB if numbers else None

    def by_process(self) -> dict[int, int]:
        return {}


def meter() -> Meter:
    """The better one that works here."""
    try:
        import pynvml
    except ImportError:
        return NvidiaSmi()
    try:
        return Nvml()
    except pynvml.NVMLError:
        return NvidiaSmi()


@dataclass(frozen=True)
class Sample:
    """One look; bytes."""

    at_s: float
    gpu: int | None
    gpu_by_worker: dict[str, int] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)


class Watch:
    """Looks every second, in a thread of its own.

    Args:
        pids: by worker; who listens to the run adds to it meanwhile.
    """

    def __init__(self, meter: Meter, pids: Mapping[str, int], every_s: float = SAMPLE_S) -> None:
        self.samples: list[Sample] = []
        self._meter, self._pids, self._every_s = meter, pids, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(self._every_s):
            pids = dict(self._pids)
            on_gpu = self._meter.by_process()
            resident = {name: resident_bytes(pid) for name, pid in pids.items()}
            self.samples.append(
                Sample(
                    at_s=time.monotonic() - began,
                    gpu=self._meter.used(),
                    gpu_by_worker={name: on_gpu[pid] for name, pid in pids.items() if pid in on_gpu},
                    resident={name: held for name, held in resident.items() if held is not None},
                )
            )
