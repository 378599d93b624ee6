"""The header of a ring of slots, in memory that both sides share; it alone decides who may touch a slot.

    FREE -> FILLING -> READY -> HELD -> FREE
         producer   producer  consumer consumer

One producer, one consumer: each step has one side that takes it, so no lock is needed. A slot's meta and length are
written before its state (x86-64 keeps the order of stores; the GIL's atomics order them elsewhere). Messages between
the sides only wake. Knows nothing of what lies in a slot.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from ipc.errors import RingError
from ipc.shared_memory import SharedMemory

MAGIC = 0x4C4C5249
VERSION = 1
META_BYTES = 1024
"""Room for a slot's announcing message."""

_HEAD = struct.Struct("<IIIIQQ")  # magic, version, slots, padding, epoch, last sequence
_SLOT = struct.Struct("<IIQ")  # state, meta length, sequence
_SLOT_BYTES = _SLOT.size + META_BYTES
_STATE = struct.Struct("<I")
_EPOCH = struct.Struct("<Q")
_EPOCH_AT = 16
_SEQUENCE_AT = 24


class State(IntEnum):
    """Who owns a slot: nobody, the producer, nobody but full, the consumer."""

    FREE = 0
    FILLING = 1
    READY = 2
    HELD = 3


def header_nbytes(slots: int) -> int:
    """Size of the header of a ring with that many slots."""
    return _HEAD.size + slots * _SLOT_BYTES


@dataclass(frozen=True)
class Taken:
    """A slot that the consumer holds, and the message it was announced by."""

    slot: int
    epoch: int
    sequence: int
    meta: bytes


class SlotRing:
    """A ring's header in shared memory.

    Args:
        memory: of `header_nbytes(slots)` bytes.
        slots: how many.
    """

    def __init__(self, memory: SharedMemory, slots: int) -> None:
        if memory.nbytes != header_nbytes(slots):
            raise RingError(f"ring header: found {memory.nbytes} bytes, expected {header_nbytes(slots)}")
        self._buffer = memory.buffer
        self.slots = slots

    def initialise(self) -> None:
        """Makes it a header with free slots and epoch 1; by its owner, once, before anybody else attaches."""
        self._buffer[:] = bytes(len(self._buffer))
        _HEAD.pack_into(self._buffer, 0, MAGIC, VERSION, self.slots, 0, 1, 0)

    def check(self) -> None:
        """Raises RingError unless this is an initialised header of as many slots."""
        magic, version, slots, *_ = _HEAD.unpack_from(self._buffer, 0)
        if (magic, version, slots) != (MAGIC, VERSION, self.slots):
            raise RingError(
                f"ring header: found magic {magic:#x}, version {version}, {slots} slots; expected {MAGIC:#x},"
                f" {VERSION}, {self.slots}"
            )

    @property
    def epoch(self) -> int:
        """Rises when the memory behind the slots is another."""
        epoch: int = _EPOCH.unpack_from(self._buffer, _EPOCH_AT)[0]
        return epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        _EPOCH.pack_into(self._buffer, _EPOCH_AT, value)

    def state(self, slot: int) -> State:
        return State(_STATE.unpack_from(self._buffer, self._at(slot))[0])

    def states(self) -> list[State]:
        return [self.state(slot) for slot in range(self.slots)]

    def find(self, state: State) -> list[int]:
        """Slots in a state, in the order in which they were published."""
        return sorted((slot for slot in range(self.slots) if self.state(slot) == state), key=self.sequence)

    def sequence(self, slot: int) -> int:
        """The number under which a slot was last published; numbers rise."""
        sequence: int = _SLOT.unpack_from(self._buffer, self._at(slot))[2]
        return sequence

    def meta(self, slot: int) -> bytes:
        """The bytes a slot was announced by."""
        at = self._at(slot)
        length = _SLOT.unpack_from(self._buffer, at)[1]
        return bytes(self._buffer[at + _SLOT.size : at + _SLOT.size + length])

    def put(self, slot: int, meta: bytes) -> None:
        """Writes a slot's meta under the next sequence number; its state stays."""
        if len(meta) > META_BYTES:
            raise RingError(f"slot {slot}: meta of {len(meta)} bytes, at most {META_BYTES} fit")
        sequence = _EPOCH.unpack_from(self._buffer, _SEQUENCE_AT)[0] + 1
        _EPOCH.pack_into(self._buffer, _SEQUENCE_AT, sequence)
        at = self._at(slot)
        self._buffer[at + _SLOT.size : at + _SLOT.size + len(meta)] = meta
        _SLOT.pack_into(self._buffer, at, self.state(slot), len(meta), sequence)

    def move(self, slot: int, before: State, after: State) -> None:
        """One step of a slot. Raises RingError if it is in another state than the step begins with."""
        found = self.state(slot)
        if found != before:
            raise RingError(f"slot {slot}: found {found.name}, expected {before.name}")
        self.set(slot, after)

    def set(self, slot: int, state: State) -> None:
        _STATE.pack_into(self._buffer, self._at(slot), state)

    def _at(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise RingError(f"slot {slot}: this ring has {self.slots}")
        return _HEAD.size + slot * _SLOT_BYTES


class Producer:
    """The side that fills slots."""

    def __init__(self, ring: SlotRing) -> None:
        ring.check()
        self.ring = ring

    def acquire(self) -> int | None:
        """A free slot, now ours to fill; None if there is none."""
        free = self.ring.find(State.FREE)
        if not free:
            return None
        self.ring.move(free[0], State.FREE, State.FILLING)
        return free[0]

    def publish(self, slot: int, meta: bytes) -> None:
        """Hands a filled slot to the consumer. Raises RingError if we do not own it or the meta does not fit."""
        if self.ring.state(slot) != State.FILLING:
            raise RingError(f"slot {slot}: found {self.ring.state(slot).name}, expected FILLING")
        self.ring.put(slot, meta)
        self.ring.move(slot, State.FILLING, State.READY)

    def abandon(self, slot: int) -> None:
        """Gives back a slot that was not filled after all."""
        self.ring.move(slot, State.FILLING, State.FREE)


class Consumer:
    """The side that reads slots, in the order in which they were published."""

    def __init__(self, ring: SlotRing) -> None:
        ring.check()
        self.ring = ring

    def take(self) -> Taken | None:
        """The oldest ready slot, now ours to read; None if there is none."""
        ready = self.ring.find(State.READY)
        if not ready:
            return None
        slot = ready[0]
        self.ring.move(slot, State.READY, State.HELD)
        return Taken(slot, self.ring.epoch, self.ring.sequence(slot), self.ring.meta(slot))

    def release(self, taken: Taken) -> None:
        """Frees a slot; one of an older epoch is no longer ours to free, and nothing happens."""
        if taken.epoch == self.ring.epoch:
            self.ring.move(taken.slot, State.HELD, State.FREE)


class Owner:
    """The daemon's side: mends the header after a death, while the side that died is not there."""

    def __init__(self, ring: SlotRing) -> None:
        ring.check()
        self.ring = ring

    def raise_epoch(self) -> int:
        """The memory died with its producer: all slots are free, and what was taken of them is void."""
        self.ring.epoch += 1
        for slot in range(self.ring.slots):
            self.ring.set(slot, State.FREE)
        return self.ring.epoch

    def requeue_held(self) -> int:
        """The consumer died: what it held is ready again, in the old order. How many slots that were."""
        return self._move_all(State.HELD, State.READY)

    def free_filling(self) -> int:
        """The producer died, the memory did not: half-filled slots are free. How many that were."""
        return self._move_all(State.FILLING, State.FREE)

    def _move_all(self, before: State, after: State) -> int:
        slots = self.ring.find(before)
        for slot in slots:
            self.ring.set(slot, after)
        return len(slots)
