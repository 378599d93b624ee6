"""Rings in GPU memory, against a fake driver and, where there is a GPU, across two processes."""

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from types import ModuleType

import pytest
import torch
from fake_cuda import FakeDriver, FakeGpus

from ipc.cuda_ipc import SHARED_UNIT, CudaRingExporter, CudaRingImporter, DriverError, NoPeerAccess, RealDriver
from ipc.errors import RingError
from ipc.messages import LatentsReady, Message, RingExported
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import Consumer, Owner, Producer, SlotRing, header_nbytes
from ipc.tensor_ring import TensorSpec
from workers.ports import RingReader, RingWriter

SPEC = TensorSpec((3, 16, 2, 2), torch.float32)
GPU = torch.device("cuda", 0)
SLOTS = 2


@pytest.fixture
def gpus() -> FakeGpus:
    return FakeGpus(("GPU-a", "GPU-b"))


def exporter(gpus: FakeGpus, epoch: int = 1, visible: tuple[int, ...] = (0,)) -> CudaRingExporter:
    return CudaRingExporter(
        FakeDriver(gpus, visible), GPU, ring="latents", epoch=epoch, slots=SLOTS, spec=SPEC, pid=100
    )


def importer(gpus: FakeGpus, visible: tuple[int, ...] = (0,)) -> CudaRingImporter:
    return CudaRingImporter(FakeDriver(gpus, visible), ring="latents", slots=SLOTS, spec=SPEC, device=GPU, pid=200)


def test_one_export_and_one_open_an_epoch(gpus: FakeGpus) -> None:
    """However many blocks pass and however often the ring is announced."""
    producer, consumer = exporter(gpus), importer(gpus)
    for block in range(10):
        consumer.receive(producer.message(), 1)
        producer.slots.tensor(block % SLOTS).fill_(block)
        assert float(consumer.tensor(block % SLOTS).mean()) == block
    assert (gpus.count("allocate"), gpus.count("export"), gpus.count("open")) == (1, 1, 1)
    consumer.close()
    producer.close()
    assert gpus.log == ["allocate", "export", "open", "close", "free"]
    assert not gpus.memory


def test_slots_do_not_overlap(gpus: FakeGpus) -> None:
    producer, consumer = exporter(gpus), importer(gpus)
    consumer.receive(producer.message(), 1)
    producer.slots.tensor(0).fill_(1)
    producer.slots.tensor(1).fill_(2)
    assert [set(consumer.tensor(slot).flatten().tolist()) for slot in range(SLOTS)] == [{1.0}, {2.0}]


class LaterCompletion:
    """Work on a device that is done when the test says so."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def after(self, then: Callable[[], None]) -> None:
        self.pending.append(then)

    def complete(self) -> None:
        self.pending.pop(0)()


def test_a_slot_is_announced_only_after_completion(gpus: FakeGpus) -> None:
    """Before the copy is done neither the header nor a message tells of the slot."""
    ring = SlotRing(SharedMemory.create("header", header_nbytes(SLOTS)), SLOTS)
    ring.initialise()
    sent: list[Message] = []
    completion = LaterCompletion()
    writer = RingWriter(Producer(ring), completion.after, sent.append)
    reader = RingReader("latents", Consumer(ring), LatentsReady, lambda message: None)
    slot = writer.acquire()
    assert slot is not None
    message = LatentsReady(ring="latents", epoch=1, slot=slot, block=4, version=0, fresh=False, began_ns=1, sent_ns=2)
    writer.publish(slot, message)
    assert (sent, reader.take()) == ([], None)
    completion.complete()
    assert sent == [message]
    took = reader.take()
    assert took is not None
    assert took[1] == message


def test_what_is_said_last_is_said_after_all_slots(gpus: FakeGpus) -> None:
    """The end of a stream never overtakes a block whose copy is still under way."""
    ring = SlotRing(SharedMemory.create("header", header_nbytes(SLOTS)), SLOTS)
    ring.initialise()
    sent: list[Message] = []
    completion = LaterCompletion()
    writer = RingWriter(Producer(ring), completion.after, sent.append)
    last = exporter(gpus).message()
    writer.send_last(last)
    assert sent == []
    completion.complete()
    assert sent == [last]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "another ring": ({"ring": "frames"}, "name: found frames, expected latents"),
    "shape": ({"shape": [3, 16, 2, 3]}, r"shape: found \[3, 16, 2, 3\]"),
    "dtype": ({"dtype": "float16"}, "dtype: found float16, expected float32"),
    "slots": ({"slots": 3}, "slots: found 3, expected 2"),
    "slot size": ({"slot_nbytes": 1}, "slot bytes: found 1"),
    "total size": ({"total_nbytes": 2**40}, "total bytes: found"),
    "uuid": ({"device_uuid": "GPU-c"}, "GPU GPU-c: found none such here"),
    "our own": ({"pid": 200}, "our own pid 200"),
    "epoch to come": ({"epoch": 3}, "found epoch 3, expected 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_mapping(name: str, gpus: FakeGpus) -> None:
    changes, says = REFUSED[name]
    message = RingExported.model_validate(exporter(gpus, epoch=2).message().model_dump() | changes)
    consumer = importer(gpus)
    with pytest.raises(RingError, match=says) as caught:
        consumer.receive(message, 2)
    assert "\n" not in str(caught.value)
    assert gpus.count("open") == 0
    with pytest.raises(RingError, match="before its memory was announced"):
        consumer.tensor(0)


def test_a_new_epoch_replaces_the_old_mapping(gpus: FakeGpus) -> None:
    """After a producer's restart the consumer lets go of the dead memory, and old announcements stay refused."""
    first = exporter(gpus).message()
    consumer = importer(gpus)
    consumer.receive(first, 1)
    second = exporter(gpus, epoch=2)
    consumer.receive(second.message(), 2)
    second.slots.tensor(0).fill_(9)
    assert float(consumer.tensor(0).mean()) == 9
    assert (consumer.epoch, gpus.count("open"), gpus.count("close")) == (2, 2, 1)
    consumer.receive(first, 2)
    assert (consumer.epoch, gpus.count("open")) == (2, 2)


def test_an_announcement_of_an_older_epoch_is_dropped(gpus: FakeGpus) -> None:
    """Its producer died while it was on its way, or while the consumer was away: no fault of the consumer's."""
    stale = exporter(gpus).message()
    consumer = importer(gpus)
    consumer.receive(stale, 2)
    assert (consumer.epoch, gpus.count("open")) == (0, 0)
    consumer.receive(exporter(gpus, epoch=2).message(), 2)
    assert consumer.epoch == 2


def test_memory_of_a_dead_producer_is_read_until_it_is_closed(gpus: FakeGpus) -> None:
    """A block that was ready when its producer died is still decoded."""
    driver = FakeDriver(gpus)
    producer = CudaRingExporter(driver, GPU, ring="latents", epoch=1, slots=SLOTS, spec=SPEC, pid=100)
    consumer = importer(gpus)
    consumer.receive(producer.message(), 1)
    producer.slots.tensor(0).fill_(3)
    driver.die()
    assert float(consumer.tensor(0).mean()) == 3
    consumer.receive(exporter(gpus, epoch=2).message(), 2)
    assert len(gpus.mapped) == 1
    consumer.close()
    assert not gpus.mapped


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "freed"])
def test_a_handle_that_opens_no_more_is_one_line(gpus: FakeGpus, dies: bool) -> None:
    """And leaves the consumer closed, not with half a mapping."""
    driver = FakeDriver(gpus)
    producer = CudaRingExporter(driver, GPU, ring="latents", epoch=1, slots=SLOTS, spec=SPEC, pid=100)
    message = producer.message()
    if dies:
        driver.die()
    else:
        producer.close()
    consumer = importer(gpus)
    with pytest.raises(RingError, match=r"memory of process 100 was not opened .*latents_memory=host") as caught:
        consumer.receive(message, 1)
    assert "\n" not in str(caught.value)
    assert consumer.epoch == 0
    consumer.close()
    assert gpus.count("close") == 0


def test_where_memory_is_not_shared_the_setting_is_named(gpus: FakeGpus) -> None:
    gpus.shares = False
    with pytest.raises(RingError, match=r"cuda:0 does not share its memory .*rings\.latents_memory=host"):
        exporter(gpus)


def test_a_consumer_that_died_holds_nothing(gpus: FakeGpus) -> None:
    """Its successor opens the same handle, and the producer may free the memory afterwards."""
    producer, dead = exporter(gpus), FakeDriver(gpus)
    first = CudaRingImporter(dead, ring="latents", slots=SLOTS, spec=SPEC, device=GPU, pid=200)
    first.receive(producer.message(), 1)
    dead.die()
    second = importer(gpus)
    second.receive(producer.message(), 1)
    producer.slots.tensor(1).fill_(5)
    assert float(second.tensor(1).mean()) == 5
    second.close()
    producer.close()
    assert not gpus.memory


def test_a_ring_shares_its_unit_with_no_other_allocation(gpus: FakeGpus) -> None:
    """The driver shares whole units: of a smaller allocation its neighbours would be readable too."""
    message = exporter(gpus).message()
    assert message.total_nbytes == SHARED_UNIT
    assert {len(memory) for memory in gpus.memory.values()} == {SHARED_UNIT}


class HandleOfNoName:
    """As of cuda-bindings 13.5: bytes that only their address leads to."""

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(64)

    def getPtr(self) -> int:
        return ctypes.addressof(self._bytes)


class BindingsOfNoName:
    """Exports 64 bytes and notes those it is asked to open; `code` is what opening answers."""

    cudaIpcMemHandle_t = HandleOfNoName
    code = 0

    def __init__(self) -> None:
        self.opened = b""

    def cudaIpcGetMemHandle(self, pointer: int) -> tuple[int, HandleOfNoName]:
        handle = HandleOfNoName()
        ctypes.memmove(handle.getPtr(), bytes(range(64)), 64)
        return 0, handle

    def cudaIpcOpenMemHandle(self, handle: HandleOfNoName, flags: int) -> tuple[int, int]:
        self.opened = ctypes.string_at(handle.getPtr(), 64)
        return self.code, 4096


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> BindingsOfNoName:
    found = BindingsOfNoName()
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    module = ModuleType("cuda.bindings")
    module.runtime = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return found


def test_a_handle_is_taken_whole_from_any_cuda_bindings(bindings: BindingsOfNoName) -> None:
    """Zero bytes included, and though its fields have other names from version to version."""
    driver = RealDriver()
    handle = driver.export(4096, GPU)
    assert handle == bytes(range(64))
    assert driver.open(handle, GPU) == 4096
    assert bindings.opened == handle
    with pytest.raises(DriverError, match="handle of 63 bytes"):
        driver.open(handle[1:], GPU)


def test_a_call_that_fails_is_named(bindings: BindingsOfNoName) -> None:
    bindings.code = 400
    with pytest.raises(DriverError, match="cudaIpcOpenMemHandle failed: 400"):
        RealDriver().open(bytes(64), GPU)


def test_a_copy_is_no_view(bindings: BindingsOfNoName, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch copies what it takes for another GPU's memory, silently: the consumer would read old blocks for ever."""
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: torch.zeros(array.__cuda_array_interface__["shape"]))
    with pytest.raises(DriverError, match="torch copied memory of another GPU"):
        RealDriver().tensor(4096, SPEC, GPU)


def test_raised_epoch_makes_a_mapping_stale() -> None:
    ring = SlotRing(SharedMemory.create("header", header_nbytes(SLOTS)), SLOTS)
    ring.initialise()
    assert Owner(ring).raise_epoch() == 2


@pytest.mark.parametrize("visible", [(0, 1), (1, 0)], ids=str)
def test_a_gpu_is_known_by_uuid_whatever_its_ordinal(gpus: FakeGpus, visible: tuple[int, ...]) -> None:
    """CUDA_VISIBLE_DEVICES may differ between workers."""
    consumer = importer(gpus, visible)
    consumer.receive(exporter(gpus).message(), 1)
    assert consumer.epoch == 1


def test_without_peer_access_nothing_is_mapped() -> None:
    gpus = FakeGpus(("GPU-a", "GPU-b"), peers=False)
    consumer = importer(gpus, visible=(1, 0))
    with pytest.raises(NoPeerAccess, match="host memory"):
        consumer.receive(exporter(gpus).message(), 1)
    assert gpus.count("open") == 0


def reads_ring(pipe: Connection) -> None:
    """Opens an announced ring on a real GPU and tells what lies in each slot."""
    message = RingExported.model_validate(pipe.recv())
    ring = CudaRingImporter(RealDriver(), ring="latents", slots=SLOTS, spec=SPEC, device=GPU, pid=os.getpid())
    ring.receive(message, 1)
    pipe.send([float(ring.tensor(slot).mean()) for slot in range(SLOTS)])
    pipe.recv()
    ring.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_memory_crosses_a_process() -> None:
    producer = CudaRingExporter(RealDriver(), GPU, ring="latents", epoch=1, slots=SLOTS, spec=SPEC, pid=os.getpid())
    for slot in range(SLOTS):
        producer.slots.tensor(slot).fill_(slot + 0.5)
    torch.cuda.synchronize()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    reader = spawn.Process(target=reads_ring, args=(theirs,))
    reader.start()
    ours.send(producer.message().model_dump())
    assert ours.poll(50)
    assert ours.recv() == [0.5, 1.5]
    ours.send("done")
    reader.join()
    producer.close()
