"""A daemon for client tests: answers each command as its script says, over the real sockets, without any model."""

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import zmq

from ipc.channel import Gateway, Publisher
from ipc.codec import Codec, pack_envelope, unpack_envelope
from ipc.messages import COMMANDS, EVENTS, PROTOCOL_VERSION, Message, SinkStatus, StageStatus, Status
from orchestrator.run_directory import CONTROL, EVENTS_SOCKET, RunDirectory

Script = Callable[[Message], Iterable[Message]]
"""A command's answers in order; an event among them is published instead."""


class FakeDaemon:
    """Serves in a thread until the context ends.

    Attributes:
        received: commands in the order of their arrival.
    """

    def __init__(self, directory: RunDirectory, script: Script, version: int = PROTOCOL_VERSION) -> None:
        self.received: list[Message] = []
        self._directory = directory
        self._script = script
        self._version = version
        self._codec = Codec(COMMANDS)
        self._later: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._bound = threading.Event()
        self._peers: dict[type[Message], list[tuple[bytes, str]]] = {}
        self._thread = threading.Thread(target=self._serve, name="fake-daemon")

    def publish(self, event: Message) -> None:
        """Sends an event from the daemon's thread."""
        self._later.put(event)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._bound.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Closes the sockets, after what was sent has left."""
        self._ended.set()
        self._thread.join()

    def _serve(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gateway = Gateway(context, self._directory.address(CONTROL))
        self._publisher = Publisher(context, self._directory.address(EVENTS_SOCKET))
        self._bound.set()
        while not self._ended.is_set():
            self._gateway.socket.poll(5)
            self._gateway.drain(self._take)
            while not self._later.empty():
                self._publisher.send(self._later.get())
        self._gateway.close(1.0)
        self._publisher.close(1.0)
        context.term()

    def _take(self, peer: bytes, data: bytes) -> None:
        envelope = unpack_envelope(data)
        command = self._codec.build(envelope.type, envelope.body)
        self.received.append(command)
        for message in self._script(command):
            if isinstance(message, EVENTS):
                self._publisher.send(message)
            else:
                self._gateway.send(peer, pack_envelope(self._version, envelope.id, message))


def a_status(prompt: str = "a red circle moving right") -> Status:
    """A plausible snapshot."""
    stage = StageStatus(
        state="running", pid=12, restarts=1, device="cpu", block_ms=120.5, memory_bytes=2**28, device_memory_bytes=0
    )
    return Status(
        state="running",
        config="pocket",
        preset="balanced",
        pid=11,
        width=224,
        height=128,
        pace="live",
        placement="process",
        seed=0,
        prompt=prompt,
        version=3,
        block=7,
        frame=81,
        fps=16.0,
        rtf=1.0,
        block_ms=130.0,
        underruns=1,
        underruns_after_first_second=0,
        cache_hits=2,
        cache_misses=3,
        memory_bytes=2**30,
        device_memory_bytes=0,
        uptime_s=12.5,
        first_frame_s=2.5,
        abstract_picture=True,
        stages={"denoiser": stage, "text_encoder": stage.model_copy(update={"block_ms": None})},
        sinks=[SinkStatus(target="null:", state="open", frames=81, dropped=0)],
        last_error=None,
    )
