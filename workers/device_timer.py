"""How long a device works on what a stage gives it, from the device's own events. Knows no stage."""

from typing import Protocol

import torch


class DeviceTimer(Protocol):
    """Measures one span at a time; both calls from the thread that queues the work."""

    def begin(self) -> None:
        """What is queued from now on counts."""

    def end(self) -> float | None:
        """Waits until it is done; milliseconds of the device, None where there is no clock but the host's."""


class HostTimer:
    """For the CPU, where a call that returned has done its work and the host's stamps say all."""

    def begin(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def wait(device: torch.device) -> None:
    """Until a GPU has done what this thread has queued; on the CPU a call that returned has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class EventTimer:
    """For a GPU: two events on the current stream, used again and again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def begin(self) -> None:
        self._began.record(torch.cuda.current_stream(self._device))

    def end(self) -> float:
        self._ended.record(torch.cuda.current_stream(self._device))
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended))


def device_timer(device: torch.device) -> DeviceTimer:
    """The timer of a device."""
    return EventTimer(device) if device.type == "cuda" else HostTimer()
