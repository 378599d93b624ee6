"""A process that probe_cuda_ipc.py asks: one JSON request a line in, one JSON answer a line out.

It exports, opens and wraps memory by the project's own driver. A request that fails is answered by its error, and the
next one is served; it ends with its standard input.
"""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ipc.cuda_ipc import CudaRingExporter, CudaRingImporter, RealDriver
from ipc.messages import RingExported
from ipc.tensor_ring import EventCompletion, TensorSpec

SMALL = 4096
"""Bytes of an allocation that the driver cuts from a larger block."""
PRODUCT = 8192
COPIED = 1 << 29
SPIN_CYCLES = 2_000_000
BATCH = 4
"""Kernels between two events; one batch runs while the next is queued."""
Answer = dict[str, Any]


class Child:
    """What can be asked: the methods, by name. Slots are flat, uint8; device 0 unless asked to begin on another."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._exporter: CudaRingExporter | None = None
        self._importer: CudaRingImporter | None = None
        self._works: list[Work] = []

    def begin(self, device: int = 0) -> Answer:
        """Makes the context."""
        self._device = torch.device("cuda", device)
        torch.cuda.set_device(self._device)
        self._driver = RealDriver()
        self._completion = EventCompletion(self._device)
        return self.alive()

    def alive(self) -> Answer:
        """Whether the context still computes."""
        return {"sum": int(torch.ones(1000, device=self._device).sum())}

    def used(self) -> Answer:
        """Bytes in use on the whole GPU, by all processes."""
        free, total = torch.cuda.mem_get_info(self._device)
        return {"bytes": total - free}

    def export(self, nbytes: int, slots: int = 1, value: int = 0) -> Answer:
        spec = TensorSpec((nbytes,), torch.uint8)
        self._exporter = CudaRingExporter(
            self._driver, self._device, ring="probe", epoch=1, slots=slots, spec=spec, pid=os.getpid()
        )
        for slot in range(slots):
            self._exporter.slots.tensor(slot).fill_(value)
        torch.cuda.synchronize()
        message = self._exporter.message().model_dump()
        return {"message": message | {"handle": message["handle"].hex()}, "at": self._slot(0).data_ptr()}

    def publish(self, slot: int, value: int, cycles: int, wait: bool = True) -> Answer:
        """A write behind a kernel that takes its time; answered when complete, or at once."""
        torch.cuda._sleep(cycles)
        self._slot(slot).fill_(value)
        if wait:
            done = threading.Event()
            self._completion.after(done.set)
            done.wait(10)
        return {}

    def free(self) -> Answer:
        assert self._exporter is not None
        self._exporter.close()
        return {}

    def refill(self, nbytes: int, value: int) -> Answer:
        """Takes as much anew and writes another value there."""
        pointer = self._driver.allocate(nbytes, self._device)
        self._driver.tensor(pointer, TensorSpec((nbytes,), torch.uint8), self._device).fill_(value)
        torch.cuda.synchronize()
        return {"at": pointer}

    def receive(self, message: Answer) -> Answer:
        """Opens by the project's importer."""
        announced = RingExported.model_validate(message | {"handle": bytes.fromhex(message["handle"])})
        spec = TensorSpec(tuple(announced.shape), torch.uint8)
        importer = CudaRingImporter(
            self._driver, ring="probe", slots=announced.slots, spec=spec, device=self._device, pid=os.getpid()
        )
        importer.receive(announced, 1)
        self._importer = importer
        view = importer.tensor(0)
        return {"at": view.data_ptr(), "device": str(view.device)}

    def read(self, slot: int = 0) -> Answer:
        """Least and greatest byte of a slot."""
        assert self._importer is not None
        least, greatest = torch.aminmax(self._importer.tensor(slot))
        return {"values": [int(least), int(greatest)]}

    def close(self) -> Answer:
        assert self._importer is not None
        self._importer.close()
        return {}

    def open_raw(self, handle: str) -> Answer:
        return {"at": self._driver.open(bytes.fromhex(handle), self._device)}

    def close_raw(self, at: int) -> Answer:
        self._driver.close(at, self._device)
        return {}

    def look_at(self, at: int, nbytes: int) -> Answer:
        least, greatest = torch.aminmax(self._driver.tensor(at, TensorSpec((nbytes,), torch.uint8), self._device))
        return {"values": [int(least), int(greatest)]}

    def times(self, message: Answer, rounds: int) -> Answer:
        """Medians of opening and closing, ms."""
        handle, opened, closed = bytes.fromhex(message["handle"]), [], []
        for _ in range(rounds):
            began = time.perf_counter()
            pointer = self._driver.open(handle, self._device)
            opened.append(time.perf_counter() - began)
            began = time.perf_counter()
            self._driver.close(pointer, self._device)
            closed.append(time.perf_counter() - began)
        return {"open_ms": statistics.median(opened) * 1e3, "close_ms": statistics.median(closed) * 1e3}

    def bandwidth(self, rounds: int) -> Answer:
        """GB/s of copies from the opened slot 0 into own memory."""
        assert self._importer is not None
        theirs = self._importer.tensor(0)
        own = torch.empty(theirs.shape, dtype=theirs.dtype, device=self._device)
        own.copy_(theirs)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            own.copy_(theirs)
        torch.cuda.synchronize()
        rate = rounds * own.numel() / (time.perf_counter() - began) / 1e9
        return {"gb_s": rate, "values": [int(own.min()), int(own.max())]}

    def share_torch(self) -> Answer:
        """Exports the second of two tensors of torch's allocator, which lie side by side: 1s, then 2s."""
        self._kept = [torch.full((SMALL,), value, dtype=torch.uint8, device=self._device) for value in (1, 2)]
        torch.cuda.synchronize()
        first, second = (tensor.data_ptr() for tensor in self._kept)
        return {"handle": self._driver.export(second, self._device).hex(), "apart": second - first}

    def share_small(self) -> Answer:
        """Exports the first of two small allocations of the driver's: 1s, then 2s."""
        first, second = (self._driver.allocate(SMALL, self._device) for _ in range(2))
        for at, value in ((first, 1), (second, 2)):
            self._driver.tensor(at, TensorSpec((SMALL,), torch.uint8), self._device).fill_(value)
        torch.cuda.synchronize()
        return {"handle": self._driver.export(first, self._device).hex(), "apart": second - first}

    def prepare(self, kinds: list[str]) -> Answer:
        """Work for as many threads, each on its own stream; warmed up."""
        self._works = [Work(kind, self._device) for kind in kinds]
        for work in self._works:
            work.run(0.2)
        return {}

    def rates(self, seconds: float) -> Answer:
        """Kernels a second of each, all at once."""
        threads = [threading.Thread(target=work.run, args=(seconds,)) for work in self._works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"rates": [work.rate for work in self._works]}

    def _slot(self, slot: int) -> Tensor:
        assert self._exporter is not None
        return self._exporter.slots.tensor(slot)


class Work:
    """One stream's endless work: `products` fill the GPU, `copies` its memory, `spins` one multiprocessor."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.rate = 0.0
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            self._kernel = _kernel(kind, device)

    def run(self, seconds: float) -> None:
        began, batches = time.perf_counter(), 0
        before: torch.cuda.Event | None = None
        with torch.cuda.stream(self._stream):
            while time.perf_counter() - began < seconds:
                for _ in range(BATCH):
                    self._kernel()
                event = torch.cuda.Event(blocking=True)
                event.record()
                if before is not None:
                    before.synchronize()
                before, batches = event, batches + 1
            self._stream.synchronize()
        self.rate = batches * BATCH / (time.perf_counter() - began)


def _kernel(kind: str, device: torch.device) -> Callable[[], object]:
    if kind == "products":
        left, out = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
        return lambda: torch.mm(left, left, out=out)
    if kind == "copies":
        source, target = (torch.zeros(COPIED, device=device, dtype=torch.uint8) for _ in range(2))
        return lambda: target.add_(source)
    return lambda: torch.cuda._sleep(SPIN_CYCLES)


def serve(child: object) -> None:
    """Answers requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(child, request.pop("ask"))(**request)
        except Exception as error:  # an error of the driver's is what may have been asked for
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), flush=True)  # noqa: T201


def gpus() -> Answer:
    """What torch sees here."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"gpus": names if torch.cuda.is_available() else [], "torch": torch.__version__, "cuda": torch.version.cuda}


if __name__ == "__main__":
    print(json.dumps(gpus()), flush=True)  # noqa: T201
    serve(Child())
