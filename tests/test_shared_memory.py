"""Shared host memory: one size, nothing left behind, readable by who receives the descriptor, alive or dead."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from ipc.errors import RingError
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import Consumer, Owner, Producer, SlotRing, header_nbytes
from ipc.tensor_ring import HostSlots, TensorSpec
from workers.spec import PassedFd

SPEC = TensorSpec((2, 3), torch.float32)
SLOTS = 3


def test_memory_is_zeroed_sealed_and_gone_after_close() -> None:
    memory = SharedMemory.create("test", 5000)
    assert bytes(memory.buffer) == bytes(5000)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 10)
    fd = memory.fd
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_two_mappings_are_one_memory() -> None:
    memory = SharedMemory.create("test", 16)
    other = SharedMemory.attach(os.dup(memory.fd), 16)
    memory.buffer[3] = 77
    assert other.buffer[3] == 77


def test_another_size_is_refused_and_the_descriptor_closed() -> None:
    memory = SharedMemory.create("test", 16)
    fd = os.dup(memory.fd)
    with pytest.raises(RingError, match="found 16 bytes, expected 17"):
        SharedMemory.attach(fd, 17)
    assert not Path(f"/proc/self/fd/{fd}").exists()


def test_too_much_memory_is_an_error_now_and_not_later() -> None:
    with pytest.raises(OSError):
        SharedMemory.create("test", 2**50)


def test_slots_are_views_of_the_memory() -> None:
    memory = SharedMemory.create("test", SLOTS * SPEC.nbytes)
    slots = HostSlots(memory, SLOTS, SPEC)
    slots.tensor(1).fill_(2.5)
    assert memory.buffer[SPEC.nbytes : 2 * SPEC.nbytes].cast("f").tolist() == [2.5] * 6
    assert not any(memory.buffer[: SPEC.nbytes])
    slots.close()


def test_slots_of_another_size_are_refused() -> None:
    with pytest.raises(RingError, match="expected 72"):
        HostSlots(SharedMemory.create("test", 71), SLOTS, SPEC)


def child(header: PassedFd, memory: PassedFd, pipe: Connection) -> None:
    """Takes a slot, tells what lies in it, and waits to be killed."""
    ring = SlotRing(SharedMemory.attach(header.fd, header_nbytes(SLOTS)), SLOTS)
    slots = HostSlots(SharedMemory.attach(memory.fd, SLOTS * SPEC.nbytes), SLOTS, SPEC)
    taken = Consumer(ring).take()
    assert taken is not None
    pipe.send((taken.meta, slots.tensor(taken.slot).tolist()))
    signal.pause()


def test_a_killed_reader_gives_its_slot_back() -> None:
    """Tensors cross a spawned process by descriptor alone; what it held when it was killed is read again."""
    header, memory = (
        SharedMemory.create("header", header_nbytes(SLOTS)),
        SharedMemory.create("slots", SLOTS * SPEC.nbytes),
    )
    ring = SlotRing(header, SLOTS)
    ring.initialise()
    producer = Producer(ring)
    slot = producer.acquire()
    assert slot is not None
    HostSlots(memory, SLOTS, SPEC).tensor(slot).fill_(7)
    producer.publish(slot, b"seven")
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    reader = spawn.Process(target=child, args=(PassedFd(header.fd), PassedFd(memory.fd), theirs))
    reader.start()
    assert ours.poll(50)
    assert ours.recv() == (b"seven", [[7.0] * 3] * 2)
    reader.kill()
    reader.join()
    assert Consumer(ring).take() is None
    Owner(ring).requeue_held()
    again = Consumer(ring).take()
    assert again is not None
    assert (again.slot, again.meta) == (slot, b"seven")
