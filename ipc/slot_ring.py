"""The header of a ring of slots, in memory that both sides share; it alone decides who may touch a slot.

    FREE -> FILLING -> READY -> HELD -> FREE
         producer   producer  consumer consumer

One producer, one consumer: each step has one side that takes it, so no lock is needed. A slot's meta and length are
written before its state (x86-64 keeps the order of stores; the GIL's atomics order them elsewhere). The header is made
of aligned 8-byte words, each stored at once: the other side, or a death in between, never finds half of one. Messages
between the sides only wake. Knows nothing of what lies in a slot.
"""

from dataclasses import dataclass
from enum import IntEnum

from ipc.errors import RingError
from ipc.shared_memory import SharedMemory

MAGIC = 0x4C4C5249
VERSION = 2
META_BYTES = 1024
"""Room for a slot's announcing message."""

_WORD = 8
_MAGIC, _VERSION, _SLOTS, _EPOCH, _LAST_SEQUENCE = range(5)
_HEAD_WORDS = 5
_STATE, _LENGTH, _SEQUENCE = range(3)
_META_AT = 3 * _WORD
_SLOT_BYTES = _META_AT + META_BYTES


class State(IntEnum):
    """Who owns a slot: nobody, the producer, nobody but full, the consumer."""

    FREE = 0
    FILLING = 1
    READY = 2
    HELD = 3


def header_nbytes(slots: int) -> int:
    """Size of the header of a ring with that many slots."""
    return _HEAD_WORDS * _WORD + slots * _SLOT_BYTES


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
        # Not struct.pack_into: it zeroes its target first, and a state of zero is FREE to whoever looks just then.
        self._words = memory.buffer.cast("Q")
        self.slots = slots

    def initialise(self) -> None:
        """Makes it a header with free slots and epoch 1; by its owner, once, before anybody else attaches."""
        self._buffer[:] = bytes(len(self._buffer))
        for at, word in ((_VERSION, VERSION), (_SLOTS, self.slots), (_EPOCH, 1), (_MAGIC, MAGIC)):
            self._words[at] = word

    def check(self) -> None:
        """Raises RingError unless this is an initialised header of as many slots."""
        magic, version, slots = (self._words[at] for at in (_MAGIC, _VERSION, _SLOTS))
        if (magic, version, slots) != (MAGIC, VERSION, self.slots):
            raise RingError(
                f"ring header: found magic {magic:#x}, version {version}, {slots} slots; expected {MAGIC:#x},"
                f" {VERSION}, {self.slots}"
            )

    @property
    def epoch(self) -> int:
        """Rises when the memory behind the slots is another."""
        return self._words[_EPOCH]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._words[_EPOCH] = value

    def state(self, slot: int) -> State:
        return State(self._words[self._at(slot) + _STATE])

    def states(self) -> list[State]:
        return [self.state(slot) for slot in range(self.slots)]

    def find(self, state: State) -> list[int]:
        """Slots in a state, in the order in which they were published."""
        return sorted((slot for slot in range(self.slots) if self.state(slot) == state), key=self.sequence)

    def sequence(self, slot: int) -> int:
        """The number under which a slot was last published; numbers rise."""
        return self._words[self._at(slot) + _SEQUENCE]

    def meta(self, slot: int) -> bytes:
        """The bytes a slot was announced by."""
        begin = self._at(slot) * _WORD + _META_AT
        return bytes(self._buffer[begin : begin + self._words[self._at(slot) + _LENGTH]])

    def put(self, slot: int, meta: bytes) -> None:
        """Writes a slot's meta under the next sequence number; its state stays."""
        if len(meta) > META_BYTES:
            raise RingError(f"slot {slot}: meta of {len(meta)} bytes, at most {META_BYTES} fit")
        at = self._at(slot)
        begin = at * _WORD + _META_AT
        self._buffer[begin : begin + len(meta)] = meta
        self._words[at + _LENGTH] = len(meta)
        self._words[_LAST_SEQUENCE] += 1
        self._words[at + _SEQUENCE] = self._words[_LAST_SEQUENCE]

    def move(self, slot: int, before: State, after: State) -> None:
        """One step of a slot. Raises RingError if it is in another state than the step begins with."""
        found = self.state(slot)
        if found != before:
            raise RingError(f"slot {slot}: found {found.name}, expected {before.name}")
        self.set(slot, after)

    def set(self, slot: int, state: State) -> None:
        self._words[self._at(slot) + _STATE] = state

    def _at(self, slot: int) -> int:
        """Index of a slot's first word."""
        if not 0 <= slot < self.slots:
            raise RingError(f"slot {slot}: this ring has {self.slots}")
        return _HEAD_WORDS + slot * (_SLOT_BYTES // _WORD)


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
        epoch = self.ring.epoch
        if not self.ring.find(State.READY):
            return None
        # Looked for again: what was published before a slot seen just now may lie in one looked at earlier.
        ready = self.ring.find(State.READY)
        if not ready:
            return None  # the owner raised the epoch meanwhile
        slot = ready[0]
        self.ring.set(slot, State.HELD)
        if self.ring.epoch != epoch:
            self.ring.set(slot, State.FREE)  # the owner may have freed it before we took it
            return None
        return Taken(slot, epoch, self.ring.sequence(slot), self.ring.meta(slot))

    def release(self, taken: Taken) -> None:
        """Frees a slot; one of an older epoch is no longer ours to free, and nothing happens."""
        found = self.ring.state(taken.slot)
        if taken.epoch != self.ring.epoch:
            return
        # The epoch is raised before slots are freed: a state read before an epoch that is still ours is ours as well.
        if found != State.HELD:
            raise RingError(f"slot {taken.slot}: found {found.name}, expected HELD")
        self.ring.set(taken.slot, State.FREE)


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
