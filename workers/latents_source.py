"""Where the VAE decoder reads latents from: host memory, this process's own GPU memory, or another's by CUDA IPC.

Knows memory only; which slot is ready is the header's business.
"""

import os
from typing import Protocol

import torch
from torch import Tensor

from ipc.cuda_ipc import CudaDriver, CudaRingImporter
from ipc.errors import ProtocolError
from ipc.messages import RingExported
from ipc.slot_ring import SlotRing
from ipc.tensor_ring import Slots, TensorSpec
from workers.ports import LocalRings


class LatentsSource(Protocol):
    """Slots that may have to be opened before they can be read."""

    @property
    def is_open(self) -> bool:
        """Whether the memory of the ring's present epoch can be read."""

    def opened(self, message: RingExported) -> None:
        """Takes the producer's announcement of its memory. Raises RingError if it does not fit."""

    def tensor(self, slot: int) -> Tensor:
        """A view of a slot, [F, 16, h, w] float32."""


class HostSource:
    """Shared host memory, open from the start."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.is_open = True

    def opened(self, message: RingExported) -> None:
        raise ProtocolError(f"ring {message.ring} lies in host memory, an export was announced")

    def tensor(self, slot: int) -> Tensor:
        return self._slots.tensor(slot)


class LocalSource:
    """Device memory of a sibling thread, found as soon as it has made it."""

    def __init__(self, local: LocalRings, ring: str) -> None:
        self._local = local
        self._ring = ring

    @property
    def is_open(self) -> bool:
        return self._local.get(self._ring) is not None

    def opened(self, message: RingExported) -> None:
        raise ProtocolError(f"ring {message.ring} lies in this process, an export was announced")

    def tensor(self, slot: int) -> Tensor:
        slots = self._local.get(self._ring)
        assert slots is not None, "asked before it was open"
        return slots.tensor(slot)


class ImportedSource:
    """Device memory of another process, opened once an epoch."""

    def __init__(self, driver: CudaDriver, header: SlotRing, ring: str, spec: TensorSpec, device: torch.device) -> None:
        self._header = header
        self._importer = CudaRingImporter(
            driver, ring=ring, slots=header.slots, spec=spec, device=device, pid=os.getpid()
        )

    @property
    def is_open(self) -> bool:
        return self._importer.epoch == self._header.epoch

    def opened(self, message: RingExported) -> None:
        self._importer.receive(message, self._header.epoch)

    def tensor(self, slot: int) -> Tensor:
        return self._importer.tensor(slot)

    def close(self) -> None:
        self._importer.close()
