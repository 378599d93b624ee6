"""The ring's header: who owns a slot when, in which order slots are read, and what deaths leave behind."""

import multiprocessing
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.errors import RingError
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import META_BYTES, Consumer, Owner, Producer, SlotRing, State, header_nbytes
from workers.spec import PassedFd


def new_ring(slots: int = 3) -> SlotRing:
    ring = SlotRing(SharedMemory.create("test", header_nbytes(slots)), slots)
    ring.initialise()
    return ring


@pytest.fixture
def ring() -> SlotRing:
    return new_ring()


def fill(producer: Producer, meta: bytes) -> int:
    slot = producer.acquire()
    assert slot is not None
    producer.publish(slot, meta)
    return slot


def test_a_slot_goes_round(ring: SlotRing) -> None:
    """FREE, FILLING, READY, HELD, FREE; its meta arrives as it was written."""
    producer, consumer = Producer(ring), Consumer(ring)
    slot = producer.acquire()
    assert slot is not None
    assert ring.state(slot) is State.FILLING
    producer.publish(slot, b"about it")
    assert ring.state(slot) is State.READY
    taken = consumer.take()
    assert taken is not None
    assert (taken.slot, taken.meta, taken.epoch) == (slot, b"about it", 1)
    assert ring.state(slot) is State.HELD
    consumer.release(taken)
    assert ring.states() == [State.FREE] * 3


def test_two_views_of_one_memory_agree() -> None:
    """A consumer that attached by descriptor sees what the producer did."""
    memory = SharedMemory.create("test", header_nbytes(2))
    ring = SlotRing(memory, 2)
    ring.initialise()
    fill(Producer(ring), b"x")
    taken = Consumer(SlotRing(memory, 2)).take()
    assert taken is not None
    assert taken.meta == b"x"


def test_full_ring_gives_no_slot(ring: SlotRing) -> None:
    producer = Producer(ring)
    for _ in range(3):
        fill(producer, b"")
    assert producer.acquire() is None
    assert Consumer(ring).take() is not None
    assert producer.acquire() is None


def test_slots_are_read_in_the_order_of_publication(ring: SlotRing) -> None:
    producer, consumer = Producer(ring), Consumer(ring)
    first, second = producer.acquire(), producer.acquire()
    assert first is not None
    assert second is not None
    producer.publish(second, b"1")
    producer.publish(first, b"2")
    assert [consumer.take().meta for _ in range(2)] == [b"1", b"2"]  # type: ignore[union-attr]


@pytest.mark.parametrize("step", ["publish", "abandon"])
def test_only_the_owner_of_a_slot_moves_it(ring: SlotRing, step: str) -> None:
    producer = Producer(ring)
    with pytest.raises(RingError, match="found FREE, expected FILLING"):
        producer.publish(0, b"") if step == "publish" else producer.abandon(0)


def test_released_twice_is_refused(ring: SlotRing) -> None:
    fill(Producer(ring), b"")
    consumer = Consumer(ring)
    taken = consumer.take()
    assert taken is not None
    consumer.release(taken)
    with pytest.raises(RingError, match="found FREE, expected HELD"):
        consumer.release(taken)


def test_abandoned_slot_is_free(ring: SlotRing) -> None:
    producer = Producer(ring)
    slot = producer.acquire()
    assert slot is not None
    producer.abandon(slot)
    assert ring.states() == [State.FREE] * 3


def test_meta_that_does_not_fit_is_refused_and_nothing_published(ring: SlotRing) -> None:
    producer = Producer(ring)
    slot = producer.acquire()
    assert slot is not None
    with pytest.raises(RingError, match="at most"):
        producer.publish(slot, bytes(META_BYTES + 1))
    assert Consumer(ring).take() is None
    producer.publish(slot, bytes(META_BYTES))


def test_header_of_another_ring_is_refused() -> None:
    memory = SharedMemory.create("test", header_nbytes(3))
    with pytest.raises(RingError, match="found magic"):
        Producer(SlotRing(memory, 3))
    with pytest.raises(RingError, match="bytes"):
        SlotRing(memory, 4)
    with pytest.raises(RingError, match="this ring has 3"):
        SlotRing(memory, 3).state(3)


def test_dead_consumer_loses_nothing(ring: SlotRing) -> None:
    """What it held comes again, before what came later."""
    producer = Producer(ring)
    for meta in (b"a", b"b", b"c"):
        fill(producer, meta)
    dead = Consumer(ring)
    dead.take()
    dead.take()
    assert Owner(ring).requeue_held() == 2
    heir = Consumer(ring)
    assert [heir.take().meta for _ in range(3)] == [b"a", b"b", b"c"]  # type: ignore[union-attr]


def test_dead_producer_of_surviving_memory_frees_what_it_was_filling(ring: SlotRing) -> None:
    dead = Producer(ring)
    fill(dead, b"done")
    dead.acquire()
    assert Owner(ring).free_filling() == 1
    assert sorted(ring.states()) == [State.FREE, State.FREE, State.READY]


def test_new_epoch_voids_what_was_before(ring: SlotRing) -> None:
    """A slot taken before cannot be released into the new epoch."""
    fill(Producer(ring), b"old")
    consumer = Consumer(ring)
    old = consumer.take()
    assert old is not None
    assert Owner(ring).raise_epoch() == 2
    assert ring.states() == [State.FREE] * 3
    slot = fill(Producer(ring), b"new")
    new = consumer.take()
    assert new is not None
    assert (new.slot, new.epoch, new.meta) == (slot, 2, b"new")
    consumer.release(old)
    assert ring.state(new.slot) is State.HELD


class Interrupted(SlotRing):
    """A view of a ring during which another process acts: once, right after its n-th look at a slot's state."""

    def __init__(self, memory: SharedMemory, slots: int, acts: Callable[[], object], look: int = 1) -> None:
        super().__init__(memory, slots)
        self._acts = acts
        self._looks_left = look

    def state(self, slot: int) -> State:
        found = super().state(slot)
        self._looks_left -= 1
        if self._looks_left == 0:
            self._acts()
        return found


def test_what_is_published_during_a_look_is_not_read_out_of_order() -> None:
    """The consumer saw slot 0 not yet ready; then 0 and 1 became ready, in this order."""
    memory = SharedMemory.create("test", header_nbytes(2))
    ring = SlotRing(memory, 2)
    ring.initialise()
    producer = Producer(ring)
    consumer = Consumer(Interrupted(memory, 2, lambda: [fill(producer, meta) for meta in (b"1", b"2")]))
    assert [consumer.take().meta for _ in range(2)] == [b"1", b"2"]  # type: ignore[union-attr]


@pytest.mark.parametrize("look", [1, 2, 3, 4])
def test_an_epoch_raised_during_a_take_voids_it(look: int) -> None:
    """The producer's death is no error of the consumer, and no slot stays held in the new epoch."""
    memory = SharedMemory.create("test", header_nbytes(2))
    ring = SlotRing(memory, 2)
    ring.initialise()
    fill(Producer(ring), b"old")
    consumer = Consumer(Interrupted(memory, 2, Owner(ring).raise_epoch, look))
    assert consumer.take() is None
    assert ring.states() == [State.FREE] * 2


def test_an_epoch_raised_during_a_release_voids_it() -> None:
    memory = SharedMemory.create("test", header_nbytes(1))
    ring = SlotRing(memory, 1)
    ring.initialise()
    fill(Producer(ring), b"old")
    old = Consumer(ring).take()
    assert old is not None
    Consumer(Interrupted(memory, 1, Owner(ring).raise_epoch)).release(old)
    assert ring.states() == [State.FREE]


def takes_and_gives_back(header: PassedFd) -> None:
    """Moves the only slot between READY and HELD until killed."""
    ring = SlotRing(SharedMemory.attach(header.fd, header_nbytes(1)), 1)
    while True:
        ring.move(0, State.READY, State.HELD)
        ring.move(0, State.HELD, State.READY)


def test_a_step_shows_no_third_state_to_another_process() -> None:
    """A slot that goes from READY to HELD is never FREE in between: its producer would fill it under the reader."""
    memory = SharedMemory.create("test", header_nbytes(1))
    ring = SlotRing(memory, 1)
    ring.initialise()
    producer = Producer(ring)
    fill(producer, b"")
    consumer = multiprocessing.get_context("spawn").Process(
        target=takes_and_gives_back, args=(PassedFd(memory.fd),), daemon=True
    )
    consumer.start()
    while ring.state(0) is not State.HELD:
        os.sched_yield()
        assert consumer.is_alive()
    seen = {ring.state(0) for _ in range(300_000)}
    consumer.kill()
    consumer.join()
    assert seen <= {State.READY, State.HELD}


EVENTS = st.lists(
    st.sampled_from(["acquire", "publish", "abandon", "take", "release", "kill p", "kill c"]), max_size=80
)


@settings(max_examples=200, deadline=None)
@given(slots=st.integers(1, 5), events=EVENTS)
def test_any_interleaving_keeps_order_and_loses_nothing(slots: int, events: list[str]) -> None:
    """Every published slot is read at least once, in order, also when either side dies; no slot has two owners."""
    ring = new_ring(slots)
    producer, consumer, owner = Producer(ring), Consumer(ring), Owner(ring)
    filling: list[int] = []
    held: list = []
    published = 0
    released: list[int] = []
    for event in events:
        if event == "acquire" and (slot := producer.acquire()) is not None:
            assert slot not in filling
            assert slot not in [taken.slot for taken in held]
            filling.append(slot)
        elif event == "publish" and filling:
            producer.publish(filling.pop(0), str(published).encode())
            published += 1
        elif event == "abandon" and filling:
            producer.abandon(filling.pop())
        elif event == "take" and (taken := consumer.take()) is not None:
            held.append(taken)
        elif event == "release" and held:
            taken = held.pop(0)
            released.append(int(taken.meta))
            consumer.release(taken)
        elif event == "kill p":
            filling.clear()
            owner.free_filling()
            producer = Producer(ring)
        elif event == "kill c":
            held.clear()
            owner.requeue_held()
            consumer = Consumer(ring)
        assert len(filling) == len(ring.find(State.FILLING))
    owner.requeue_held()
    consumer = Consumer(ring)
    while (taken := consumer.take()) is not None:
        released.append(int(taken.meta))
        consumer.release(taken)
    assert released == list(range(published))
