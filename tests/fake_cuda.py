"""A CUDA driver on host memory: handles that another process may open once mapped, GPUs by uuid, everything counted."""

import torch
from torch import Tensor

from ipc.tensor_ring import TensorSpec


class FakeGpus:
    """The hardware: which GPUs there are, their memory, and who reaches whose.

    Attributes:
        log: what was done, in order: allocate, export, open, close, free.
    """

    def __init__(self, uuids: tuple[str, ...], peers: bool = True) -> None:
        self.uuids = uuids
        self.peers = peers
        self.log: list[str] = []
        self.memory: dict[int, bytearray] = {}
        self.mapped: dict[int, int] = {}
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

    def uuid(self, device: torch.device) -> str:
        return self._visible[device.index or 0]

    def device_of(self, uuid: str) -> torch.device | None:
        return torch.device("cuda", self._visible.index(uuid)) if uuid in self._visible else None

    def can_access(self, device: torch.device, other: torch.device) -> bool:
        return self._gpus.peers

    def allocate(self, nbytes: int, device: torch.device) -> int:
        self._gpus.log.append("allocate")
        return self._place(bytearray(nbytes))

    def free(self, pointer: int, device: torch.device) -> None:
        self._gpus.log.append("free")
        del self._gpus.memory[pointer]

    def export(self, pointer: int, device: torch.device) -> bytes:
        self._gpus.log.append("export")
        return pointer.to_bytes(64, "little")

    def open(self, handle: bytes, device: torch.device) -> int:
        self._gpus.log.append("open")
        return self._place(self._gpus.memory[int.from_bytes(handle, "little")])

    def close(self, pointer: int, device: torch.device) -> None:
        self._gpus.log.append("close")
        del self._gpus.memory[pointer]

    def tensor(self, pointer: int, spec: TensorSpec, device: torch.device) -> Tensor:
        base = max(start for start in self._gpus.memory if start <= pointer)
        whole = torch.frombuffer(self._gpus.memory[base], dtype=torch.uint8)
        return whole[pointer - base : pointer - base + spec.nbytes].view(spec.dtype).view(spec.shape)

    def _place(self, memory: bytearray) -> int:
        pointer = self._gpus.next_pointer
        self._gpus.next_pointer += 1 << 32
        self._gpus.memory[pointer] = memory
        return pointer
