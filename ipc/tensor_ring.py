"""Slots as tensors, and when their contents are complete: host memory, one process's own device memory, CUDA events.

Knows shapes, dtypes and devices; not who fills a slot nor when it may.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ipc.errors import RingError
from ipc.shared_memory import SharedMemory


@dataclass(frozen=True)
class TensorSpec:
    """What one slot holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Slots(Protocol):
    """The memory of a ring's slots."""

    def tensor(self, slot: int) -> Tensor:
        """A view of one slot, of the spec's shape and dtype."""

    def close(self) -> None:
        """Gives the memory back."""


class HostSlots:
    """Slots in shared host memory.

    Args:
        memory: `slots * spec.nbytes` bytes.
        pin: page-lock the mapping in this process, so that copies between it and a GPU are asynchronous.
    """

    def __init__(self, memory: SharedMemory, slots: int, spec: TensorSpec, pin: bool = False) -> None:
        if memory.nbytes != slots * spec.nbytes:
            raise RingError(f"ring memory: found {memory.nbytes} bytes, expected {slots * spec.nbytes}")
        flat = torch.frombuffer(memory.buffer, dtype=spec.dtype, count=slots * prod(spec.shape))
        self._slots: Tensor | None = flat.view(slots, *spec.shape)
        self._pinned = pin
        if pin:
            _check_cuda(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), memory.nbytes, 0))

    def tensor(self, slot: int) -> Tensor:
        assert self._slots is not None, "closed"
        return self._slots[slot]

    def close(self) -> None:
        if self._slots is None:
            return
        if self._pinned:
            _check_cuda(torch.cuda.cudart().cudaHostUnregister(self._slots.data_ptr()))
        self._slots = None


class DeviceSlots:
    """Slots in this process's own memory of a device, for stages that are its threads."""

    def __init__(self, slots: int, spec: TensorSpec, device: torch.device) -> None:
        self._slots = torch.zeros(slots, *spec.shape, dtype=spec.dtype, device=device)

    def tensor(self, slot: int) -> Tensor:
        return self._slots[slot]

    def close(self) -> None:
        return


class Completion(Protocol):
    """Calls back once all work queued on the current stream until now is done, in order."""

    def after(self, then: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class ImmediateCompletion:
    """For the CPU, where a call that returned has done its work."""

    def after(self, then: Callable[[], None]) -> None:
        then()

    def close(self) -> None:
        return


class EventCompletion:
    """For a GPU: a thread waits for events, with the GIL released, and calls back in order.

    What it raises while waiting or calling back, such as a CUDA error, is raised by the next `after`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="completion", daemon=True)
        self._thread.start()

    def after(self, then: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._queue.put((event, then))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            event, then = entry
            try:
                event.synchronize()
                then()
            except Exception as error:  # kept for the stage's thread, which ends by it
                self._error = error
                return


def completion_for(device: torch.device) -> Completion:
    """The completion of a device."""
    return EventCompletion(device) if device.type == "cuda" else ImmediateCompletion()


def _check_cuda(code: object) -> None:
    if int(code) != 0:  # type: ignore[call-overload]
        raise RingError(f"page-locking of ring memory failed with CUDA error {int(code)}")  # type: ignore[call-overload]
