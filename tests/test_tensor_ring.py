"""Slots as tensors: views that last, a stream between two processes that survives its reader, and completion."""

import gc
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from ipc.messages import FramesReady, Message
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import Consumer, Owner, Producer, SlotRing, State, header_nbytes
from ipc.tensor_ring import (
    DeviceSlots,
    EventCompletion,
    HostSlots,
    ImmediateCompletion,
    TensorSpec,
    completion_for,
)
from workers.ports import RingReader, RingWriter
from workers.spec import PassedFd

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
SPEC = TensorSpec((3, 2, 2), torch.float32)
SLOTS = 3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "spec",
    [TensorSpec((3, 16, 2, 2), torch.float32), TensorSpec((4, 8, 8, 3), torch.uint8), TensorSpec((5,), torch.bfloat16)],
    ids=lambda spec: str(spec.dtype),
)
def test_slots_are_of_the_spec_and_do_not_overlap(spec: TensorSpec) -> None:
    memory = SharedMemory.create("test", SLOTS * spec.nbytes)
    slots = HostSlots(memory, SLOTS, spec)
    for slot in range(SLOTS):
        slots.tensor(slot).fill_(slot + 1)
    again = HostSlots(memory, SLOTS, spec)
    for slot in range(SLOTS):
        view = again.tensor(slot)
        assert (tuple(view.shape), view.dtype, view.nbytes) == (spec.shape, spec.dtype, spec.nbytes)
        assert view.is_contiguous()
        assert set(view.flatten().tolist()) == {slot + 1}


def test_a_tensor_outlives_the_memory_it_views() -> None:
    """The mapping goes with the last tensor, not under it: reading one late is no crash."""
    memory = SharedMemory.create("outlived", SLOTS * SPEC.nbytes)
    slots = HostSlots(memory, SLOTS, SPEC)
    tensor = slots.tensor(1)
    memory.close()
    slots.close()
    assert is_mapped("outlived")
    tensor.fill_(3)
    assert float(tensor.sum()) == 3 * tensor.numel()
    del tensor
    gc.collect()
    assert not is_mapped("outlived")


def is_mapped(name: str) -> bool:
    return f"memfd:{name}" in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_closed_slots_give_no_tensor() -> None:
    slots = HostSlots(SharedMemory.create("test", SLOTS * SPEC.nbytes), SLOTS, SPEC)
    slots.close()
    slots.close()
    with pytest.raises(AssertionError, match="closed"):
        slots.tensor(0)


def test_device_slots_are_zeroed_and_do_not_overlap() -> None:
    slots = DeviceSlots(SLOTS, SPEC, CPU)
    slots.tensor(1).fill_(1)
    assert [float(slots.tensor(slot).sum()) for slot in range(SLOTS)] == [0.0, float(slots.tensor(1).numel()), 0.0]
    assert (tuple(slots.tensor(0).shape), slots.tensor(0).dtype) == (SPEC.shape, SPEC.dtype)


def test_on_the_cpu_work_is_complete_when_the_call_returns() -> None:
    completion = completion_for(CPU)
    assert isinstance(completion, ImmediateCompletion)
    done: list[int] = []
    for number in range(3):
        completion.after(lambda number=number: done.append(number))
        assert done == list(range(number + 1))
    completion.close()


class Ring:
    """A ring in host memory and the processes that read it."""

    def __init__(self) -> None:
        self._header = SharedMemory.create("header", header_nbytes(SLOTS))
        self._memory = SharedMemory.create("slots", SLOTS * SPEC.nbytes)
        self.header = SlotRing(self._header, SLOTS)
        self.header.initialise()
        self.producer = Producer(self.header)
        self._slots = HostSlots(self._memory, SLOTS, SPEC)

    def publish(self, block: int) -> None:
        slot = self.producer.acquire()
        assert slot is not None
        self._slots.tensor(slot).fill_(block)
        self.producer.publish(slot, str(block).encode())

    def reader(self) -> tuple[BaseProcess, Connection]:
        """A process that does what it is told through the pipe: take, release."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(
            target=obeys, args=(PassedFd(self._header.fd), PassedFd(self._memory.fd), theirs), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours


def obeys(header: PassedFd, memory: PassedFd, pipe: Connection) -> None:
    """Takes slots and says what lies in them, or releases the oldest it holds, as it is told, until the pipe ends."""
    consumer = Consumer(SlotRing(SharedMemory.attach(header.fd, header_nbytes(SLOTS)), SLOTS))
    slots = HostSlots(SharedMemory.attach(memory.fd, SLOTS * SPEC.nbytes), SLOTS, SPEC)
    held = []
    while (order := pipe.recv()) != "end":
        if order == "release":
            consumer.release(held.pop(0))
            pipe.send("released")
        elif (taken := consumer.take()) is None:
            pipe.send(None)
        else:
            held.append(taken)
            pipe.send((int(taken.meta), set(slots.tensor(taken.slot).flatten().tolist())))


def ask(pipe: Connection, order: str) -> object:
    pipe.send(order)
    assert pipe.poll(50), f"no answer to {order}"
    return pipe.recv()


def test_a_stream_goes_on_after_its_reader_is_killed() -> None:
    """Every slot is used again and again; what a killed reader held comes first to its heir, nothing is lost."""
    ring = Ring()
    reader, pipe = ring.reader()
    for block in range(2 * SLOTS):
        ring.publish(block)
        assert ask(pipe, "take") == (block, {float(block)})
        assert ask(pipe, "release") == "released"
    for block in (6, 7, 8):
        ring.publish(block)
    assert ask(pipe, "take") == (6, {6.0})
    assert ask(pipe, "take") == (7, {7.0})
    assert ring.producer.acquire() is None
    reader.kill()
    reader.join(50)
    assert reader.exitcode == -signal.SIGKILL
    pipe.close()
    assert ring.header.find(State.HELD) != []
    assert Owner(ring.header).requeue_held() == 2

    heir, pipe = ring.reader()
    for block in (6, 7, 8):
        assert ask(pipe, "take") == (block, {float(block)})
    assert ask(pipe, "take") is None
    for _ in range(SLOTS):
        ask(pipe, "release")
    assert ring.header.states() == [State.FREE] * SLOTS
    pipe.send("end")
    heir.join(50)
    assert heir.exitcode == 0


def test_who_is_woken_finds_the_slot() -> None:
    """The header tells of a slot before a message does: a reader that looks once when woken misses nothing."""
    header = SlotRing(SharedMemory.create("header", header_nbytes(SLOTS)), SLOTS)
    header.initialise()
    reader = RingReader("frames", Consumer(header), FramesReady, lambda message: None)
    found: list[Message | None] = []

    def looks(_: Message) -> None:
        took = reader.take()
        found.append(None if took is None else took[1])

    writer = RingWriter(Producer(header), completion_for(CPU).after, looks)
    slot = writer.acquire()
    assert slot is not None
    message = FramesReady(ring="frames", epoch=1, slot=slot, block=0, version=0, first_frame=0, count=4, sent_ns=1)
    writer.publish(slot, message)
    assert found == [message]


@needs_gpu
def test_on_a_gpu_completion_follows_the_work_in_order() -> None:
    """Each call back sees the finished contents of its own copy to page-locked memory."""
    memory = SharedMemory.create("test", SLOTS * SPEC.nbytes)
    slots = HostSlots(memory, SLOTS, SPEC, pin=True)
    assert slots.tensor(0).is_pinned()
    completion = completion_for(GPU)
    assert isinstance(completion, EventCompletion)
    seen: list[tuple[int, float]] = []

    def tells(slot: int) -> Callable[[], None]:
        return lambda: seen.append((slot, float(slots.tensor(slot).max())))

    for slot in range(SLOTS):
        torch.cuda._sleep(50_000_000)
        slots.tensor(slot).copy_(torch.full(SPEC.shape, float(slot + 1), device=GPU), non_blocking=True)
        completion.after(tells(slot))
    completion.close()
    assert seen == [(slot, float(slot + 1)) for slot in range(SLOTS)]
    slots.close()


@needs_gpu
def test_what_a_call_back_raises_is_raised_by_the_next_one() -> None:
    completion = EventCompletion(GPU)

    def fails() -> None:
        raise ValueError("lost")

    completion.after(fails)
    completion.close()
    with pytest.raises(ValueError, match="lost"):
        completion.after(lambda: None)
