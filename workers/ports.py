"""A stage's ends of the rings: slots are acquired, filled and published, or taken, read and released.

The slot's header carries the announcing message, so a message lost on its way loses nothing. Knows no model and no
process; where the memory lies is the business of the `Slots` it is given.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from ipc.codec import Codec
from ipc.messages import Message, SlotFreed
from ipc.slot_ring import Consumer, Producer, Taken

if TYPE_CHECKING:
    from ipc.tensor_ring import Slots

Send = Callable[[Message], object]
M = TypeVar("M", bound=Message)


class RingWriter:
    """The producer's end of a ring.

    Args:
        producer: the header.
        when_complete: calls back once everything queued on the device so far is done.
        wake: tells the consumer.
    """

    def __init__(self, producer: Producer, when_complete: Callable[[Callable[[], None]], object], wake: Send) -> None:
        self._producer = producer
        self._when_complete = when_complete
        self._wake = wake
        self._codec = Codec(())

    @property
    def epoch(self) -> int:
        return self._producer.ring.epoch

    def acquire(self) -> int | None:
        """A free slot to fill, or None while the consumer holds all."""
        return self._producer.acquire()

    def publish(self, slot: int, message: Message) -> None:
        """Hands a filled slot over under the message that describes it, once its bytes are complete."""
        self._when_complete(lambda: self._hand_over(slot, message))

    def send_last(self, message: Message) -> None:
        """Sends a message that takes no slot, after everything published so far."""
        self._when_complete(lambda: self._wake(message))

    def _hand_over(self, slot: int, message: Message) -> None:
        self._producer.publish(slot, self._codec.encode(message))
        self._wake(message)


class RingReader(Generic[M]):
    """The consumer's end of a ring whose slots are announced by messages of one type.

    Args:
        ring: its name.
        consumer: the header.
        kind: the announcing message's type.
        wake: tells the producer that a slot is free.
    """

    def __init__(self, ring: str, consumer: Consumer, kind: type[M], wake: Send) -> None:
        self._ring = ring
        self._consumer = consumer
        self._kind = kind
        self._codec = Codec((kind,))
        self._wake = wake

    def take(self) -> tuple[Taken, M] | None:
        """The oldest slot that is ready, with its message; it is ours until released."""
        taken = self._consumer.take()
        if taken is None:
            return None
        message = self._codec.decode(taken.meta)
        assert isinstance(message, self._kind)
        return taken, message

    def release(self, taken: Taken) -> None:
        """Gives a slot back."""
        self._consumer.release(taken)
        self._wake(SlotFreed(ring=self._ring))


class LocalRings:
    """Where stages that are threads of one process find each other's device slots, by the ring's name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[str, Slots] = {}

    def put(self, ring: str, slots: "Slots") -> None:
        with self._lock:
            self._slots[ring] = slots

    def get(self, ring: str) -> "Slots | None":
        with self._lock:
            return self._slots.get(ring)
