"""Rings in GPU memory between processes: one allocation, exported once an epoch, opened once an epoch.

The memory is the ring's own, taken from the driver and not from torch's allocator, so that no weight or cache is ever
exposed. A consumer compares the announcement with its own configuration before anything is mapped. Knows slots and
bytes, not when they are full: the header and the completion of the copy say that. `scripts/gpu/probe_cuda_ipc.py` asks
a real driver what is assumed here.
"""

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ipc.errors import RingError
from ipc.messages import RingExported
from ipc.tensor_ring import Slots, TensorSpec

ALIGNMENT = 512
"""Bytes; what cudaMalloc aligns to, so that every slot is aligned like an allocation."""
SHARED_UNIT = 2 << 20
"""Bytes; less than a multiple of this may be cut from a block that an export shares whole (CUDA programming guide)."""
HANDLE_NBYTES = 64
"""CUDA_IPC_HANDLE_SIZE (CUDA runtime API)."""
LAZY_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess, the only flag cudaIpcOpenMemHandle knows (CUDA runtime API)."""


INSTEAD = "set rings.latents_memory=host to pass latents through host memory"
"""What a person can do where GPU memory cannot be shared."""


class DriverError(RingError):
    """A call of the driver failed: which, and how."""


class NoPeerAccess(RingError):
    """The ring lies on a GPU whose memory this one cannot reach."""


class CudaDriver(Protocol):
    """What is needed of CUDA; pointers are plain numbers. What acts on memory raises DriverError."""

    def uuid(self, device: torch.device) -> str:
        """A GPU's identity, the same in every process whatever its ordinal there is."""

    def device_of(self, uuid: str) -> torch.device | None:
        """The GPU of an identity, None where this process does not see it."""

    def can_access(self, device: torch.device, other: torch.device) -> bool:
        """Whether one GPU reaches another's memory."""

    def allocate(self, nbytes: int, device: torch.device) -> int:
        """Zeroed memory."""

    def free(self, pointer: int, device: torch.device) -> None: ...

    def export(self, pointer: int, device: torch.device) -> bytes:
        """The handle by which another process opens an allocation."""

    def open(self, handle: bytes, device: torch.device) -> int:
        """Maps another process's allocation."""

    def close(self, pointer: int, device: torch.device) -> None:
        """Unmaps what `open` mapped."""

    def tensor(self, pointer: int, spec: TensorSpec, device: torch.device) -> Tensor:
        """A view of memory; does not own it."""


@dataclass(frozen=True)
class _Layout:
    """Slots one after another, each aligned, in memory that shares its unit with nothing else."""

    slots: int
    spec: TensorSpec

    @property
    def stride(self) -> int:
        return -(-self.spec.nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        return -(-self.slots * self.stride // SHARED_UNIT) * SHARED_UNIT


class _MappedSlots:
    def __init__(self, driver: CudaDriver, pointer: int, layout: _Layout, device: torch.device) -> None:
        self._views = [
            driver.tensor(pointer + slot * layout.stride, layout.spec, device) for slot in range(layout.slots)
        ]

    def tensor(self, slot: int) -> Tensor:
        return self._views[slot]

    def close(self) -> None:
        self._views.clear()


class CudaRingExporter:
    """The producer's memory of one epoch.

    Args:
        device: where it lies.
        epoch: of the ring's header when this producer began.

    Raises:
        RingError: there is not that much memory, or the driver does not share it.
    """

    def __init__(
        self, driver: CudaDriver, device: torch.device, *, ring: str, epoch: int, slots: int, spec: TensorSpec, pid: int
    ) -> None:
        self._driver, self._device = driver, device
        layout = _Layout(slots, spec)
        self._pointer: int | None = driver.allocate(layout.nbytes, device)
        self.slots: Slots = _MappedSlots(driver, self._pointer, layout, device)
        try:
            handle = driver.export(self._pointer, device)
        except DriverError as error:
            raise RingError(f"ring {ring}: {device} does not share its memory ({error}); {INSTEAD}") from error
        self._message = RingExported(
            ring=ring,
            epoch=epoch,
            pid=pid,
            device_uuid=driver.uuid(device),
            handle=handle,
            slots=slots,
            slot_nbytes=spec.nbytes,
            total_nbytes=layout.nbytes,
            shape=list(spec.shape),
            dtype=_word(spec.dtype),
        )

    def message(self) -> RingExported:
        """What a consumer needs; the same every time, the memory was exported once."""
        return self._message

    def close(self) -> None:
        """Frees the memory. Only when its consumer has closed it or died: under a mapping, freeing is undefined."""
        if self._pointer is not None:
            self.slots.close()
            self._driver.free(self._pointer, self._device)
            self._pointer = None


class CudaRingImporter:
    """The consumer's mapping of a ring: that of the present epoch, opened once.

    Args:
        device: where the consumer computes.
        pid: of this process, which must not be the producer's.

    Attributes:
        epoch: of what is mapped; 0 before the first.
    """

    def __init__(
        self, driver: CudaDriver, *, ring: str, slots: int, spec: TensorSpec, device: torch.device, pid: int
    ) -> None:
        self._driver, self._ring, self._device, self._pid = driver, ring, device, pid
        self._layout = _Layout(slots, spec)
        self._pointer: int | None = None
        self._slots: _MappedSlots | None = None
        self.epoch = 0

    def receive(self, message: RingExported, current_epoch: int) -> None:
        """Maps an announced ring in place of the older epoch's; what was announced before is not opened again.

        An announcement of an older epoch is dropped: its producer died while it was on its way, or while this consumer
        was not there, and its successor will announce its own.

        Args:
            current_epoch: of the ring's header.

        Raises:
            RingError: the announcement does not fit, and nothing was mapped; or the driver does not open it.
            NoPeerAccess: it lies on a GPU that this one cannot reach.
        """
        if message.epoch < current_epoch or message.epoch == self.epoch:
            return
        if message.epoch > current_epoch:
            raise RingError(f"ring {self._ring}: found epoch {message.epoch}, expected {current_epoch}")
        self._check(message)
        self._check_device(message)
        self.close()
        try:
            self._pointer = self._driver.open(message.handle, self._device)
        except DriverError as error:
            raise RingError(
                f"ring {self._ring}: memory of process {message.pid} was not opened ({error}); if that process lives,"
                f" {INSTEAD}"
            ) from error
        self._slots = _MappedSlots(self._driver, self._pointer, self._layout, self._device)
        self.epoch = message.epoch

    def tensor(self, slot: int) -> Tensor:
        """A view of a slot."""
        if self._slots is None:
            raise RingError(f"ring {self._ring}: asked for slot {slot} before its memory was announced")
        return self._slots.tensor(slot)

    def close(self) -> None:
        """Unmaps."""
        if self._slots is not None:
            self._slots.close()
        pointer, self._pointer, self._slots = self._pointer, None, None
        if pointer is not None:
            self._driver.close(pointer, self._device)

    def _check(self, message: RingExported) -> None:
        layout = self._layout
        pairs: list[tuple[str, Any, Any]] = [
            ("name", message.ring, self._ring),
            ("shape", message.shape, list(layout.spec.shape)),
            ("dtype", message.dtype, _word(layout.spec.dtype)),
            ("slots", message.slots, layout.slots),
            ("slot bytes", message.slot_nbytes, prod(layout.spec.shape) * layout.spec.dtype.itemsize),
            ("total bytes", message.total_nbytes, layout.nbytes),
        ]
        for what, found, expected in pairs:
            if found != expected:
                raise RingError(f"ring {self._ring}: {what}: found {found}, expected {expected}")
        if message.pid == self._pid:
            raise RingError(f"ring {self._ring}: found our own pid {self._pid}, expected another process's memory")

    def _check_device(self, message: RingExported) -> None:
        theirs = self._driver.device_of(message.device_uuid)
        if theirs is None:
            raise RingError(
                f"ring {self._ring}: GPU {message.device_uuid}: found none such here, expected one that this process"
                " sees; check CUDA_VISIBLE_DEVICES"
            )
        if theirs != self._device and not self._driver.can_access(self._device, theirs):
            raise NoPeerAccess(f"ring {self._ring}: {self._device} cannot reach the memory of {theirs}; {INSTEAD}")


class RealDriver:
    """CUDA by cuda-bindings, which torch's CUDA builds bring along."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime: Any = runtime

    def uuid(self, device: torch.device) -> str:
        return str(torch.cuda.get_device_properties(device).uuid)

    def device_of(self, uuid: str) -> torch.device | None:
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            if self.uuid(device) == uuid:
                return device
        return None

    def can_access(self, device: torch.device, other: torch.device) -> bool:
        return bool(torch.cuda.can_device_access_peer(device, other))

    def allocate(self, nbytes: int, device: torch.device) -> int:
        with torch.cuda.device(device):
            pointer = int(self._call("cudaMalloc", nbytes))
            self._call("cudaMemset", pointer, 0, nbytes)
            self._call("cudaDeviceSynchronize")
        return pointer

    def free(self, pointer: int, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._call("cudaFree", pointer)

    def export(self, pointer: int, device: torch.device) -> bytes:
        with torch.cuda.device(device):
            handle = self._call("cudaIpcGetMemHandle", pointer)
        return ctypes.string_at(handle.getPtr(), HANDLE_NBYTES)

    def open(self, handle: bytes, device: torch.device) -> int:
        if len(handle) != HANDLE_NBYTES:
            raise DriverError(f"handle of {len(handle)} bytes, expected {HANDLE_NBYTES}")
        # By address: cuda-bindings 13.0 names the handle's bytes, 13.5 does not.
        wrapped = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(wrapped.getPtr(), handle, HANDLE_NBYTES)
        with torch.cuda.device(device):
            return int(self._call("cudaIpcOpenMemHandle", wrapped, LAZY_PEER_ACCESS))

    def close(self, pointer: int, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._call("cudaIpcCloseMemHandle", pointer)

    def tensor(self, pointer: int, spec: TensorSpec, device: torch.device) -> Tensor:
        view = torch.as_tensor(_DeviceArray(pointer, spec), device=device)
        # torch copies what it takes for another device's; a copy would never see what the producer writes.
        if view.data_ptr() != pointer:
            raise DriverError(f"torch copied memory of another GPU to {device} instead of wrapping it")
        return view

    def _call(self, name: str, *arguments: object) -> Any:
        code, *results = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            raise DriverError(f"{name} failed: {getattr(code, 'name', code)}")
        return results[0] if results else None


class _DeviceArray:
    """Memory as numba's CUDA array interface, version 3, which torch wraps without a copy."""

    def __init__(self, pointer: int, spec: TensorSpec) -> None:
        self.__cuda_array_interface__ = {
            "shape": spec.shape,
            "typestr": {torch.float32: "<f4", torch.uint8: "|u1", torch.float16: "<f2"}[spec.dtype],
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
