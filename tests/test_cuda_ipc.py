"""Rings in GPU memory, against a fake driver and, where there is a GPU, across two processes."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from fake_cuda import FakeDriver, FakeGpus

from ipc.cuda_ipc import CudaRingExporter, CudaRingImporter, NoPeerAccess, RealDriver
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
    "stale epoch": ({"epoch": 1}, "found epoch 1, expected 2"),
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
    with pytest.raises(RingError, match="found epoch 1"):
        consumer.receive(first, 2)
    assert gpus.count("open") == 2


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
