"""A CUDA driver on host memory: handles that another process may open, GPUs by uuid, everything counted.

It refuses what the real one refuses or leaves undefined, as far as that is documented (CUDA runtime API, cudaIpc*).
"""

import torch
from torch import Tensor

from ipc.cuda_ipc import DriverError
from ipc.tensor_ring import TensorSpec


class FakeGpus:
    """The hardware: which GPUs there are, their memory, and who reaches whose.

    Attributes:
        log: what was done, in order: allocate, export, open, close, free.
        mapped: what was opened and not yet closed: the pointer there, and the exporter's.
        shares: whether memory can be exported at all.
    """

    def __init__(self, uuids: tuple[str, ...], peers: bool = True) -> None:
        self.uuids = uuids
        self.peers = peers
        self.log: list[str] = []
        self.memory: dict[int, bytearray] = {}
        self.mapped: dict[int, int] = {}
        self.shares = True
        self.next_pointer = 1 << 32

    def count(self, what: str) -> int:
        return self.log.count(what)


class FakeDriver:
    """One process's view of the hardware.

    Args:
        visible: indices of the GPUs it sees, in its own order, as CUDA_VISIBLE_DEVICES would give them.
    """

    def __init__(self, gpus: FakeGpus, visible: tuple[int, ...] = (0,)) -> None:
        self._gpus = gpus
        self._visible = [gpus.uuids[index] for index in visible]
        self._own: set[int] = set()
        self._opened: dict[int, list[int]] = {}

    def uuid(self, device: torch.device) -> str:
        return self._visible[device.index or 0]

    def device_of(self, uuid: str) -> torch.device | None:
        return torch.device("cuda", self._visible.index(uuid)) if uuid in self._visible else None

    def can_access(self, device: torch.device, other: torch.device) -> bool:
        return self._gpus.peers

    def allocate(self, nbytes: int, device: torch.device) -> int:
        self._gpus.log.append("allocate")
        pointer = self._place(bytearray(nbytes))
        self._own.add(pointer)
        return pointer

    def free(self, pointer: int, device: torch.device) -> None:
        assert pointer not in self._gpus.mapped.values(), "freed while a consumer has it mapped: undefined"
        self._gpus.log.append("free")
        del self._gpus.memory[pointer]

    def die(self) -> None:
        """The process ends: its memory lives on where others have it mapped, its handles open no more."""
        for pointer in self._own:
            self._gpus.memory.pop(pointer, None)
        for pointer, _ in self._opened.values():
            self._forget(pointer)

    def export(self, pointer: int, device: torch.device) -> bytes:
        if not self._gpus.shares:
            raise DriverError("cudaIpcGetMemHandle failed: cudaErrorNotSupported")
        self._gpus.log.append("export")
        return pointer.to_bytes(64, "little")

    def open(self, handle: bytes, device: torch.device) -> int:
        """The same pointer each time; it must be closed as often."""
        theirs = int.from_bytes(handle, "little")
        if theirs in self._own or theirs not in self._gpus.memory:
            raise DriverError("cudaIpcOpenMemHandle failed: cudaErrorInvalidResourceHandle")
        self._gpus.log.append("open")
        opened = self._opened.setdefault(theirs, [self._place(self._gpus.memory[theirs]), 0])
        opened[1] += 1
        self._gpus.mapped[opened[0]] = theirs
        return opened[0]

    def close(self, pointer: int, device: torch.device) -> None:
        if pointer not in self._gpus.mapped:
            raise DriverError("cudaIpcCloseMemHandle failed: cudaErrorInvalidValue")
        self._gpus.log.append("close")
        opened = self._opened[self._gpus.mapped[pointer]]
        opened[1] -= 1
        if not opened[1]:
            del self._opened[self._gpus.mapped[pointer]]
            self._forget(pointer)

    def tensor(self, pointer: int, spec: TensorSpec, device: torch.device) -> Tensor:
        base = max(start for start in self._gpus.memory if start <= pointer)
        whole = torch.frombuffer(self._gpus.memory[base], dtype=torch.uint8)
        return whole[pointer - base : pointer - base + spec.nbytes].view(spec.dtype).view(spec.shape)

    def _forget(self, pointer: int) -> None:
        del self._gpus.memory[pointer], self._gpus.mapped[pointer]

    def _place(self, memory: bytearray) -> int:
        pointer = self._gpus.next_pointer
        self._gpus.next_pointer += 1 << 32
        self._gpus.memory[pointer] = memory
        return pointer
