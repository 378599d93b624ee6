"""The Python client: switch prompts, ask for the status, listen to events, stop the daemon.

Knows the wire and the run directory, nothing of the model. `orchestrator.async_client` is the same for asyncio.

    with Client() as client:
        applied = client.prompt("a fox in the snow").result()
"""

import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.codec import MAX_BYTES, Codec
from ipc.errors import NotRunning
from ipc.messages import EVENTS, Accepted, Message, OnAir, Status, StatusGet, Stop, Stopped
from orchestrator.conversation import (
    CONNECTION_EVENTS,
    NO_RECONNECT_MS,
    ON_AIR_PREFIX,
    Conversation,
    Outcome,
    addresses,
    gone,
    outcome,
    prompt_command,
    refusal,
    silent,
)
from orchestrator.run_directory import locate


class Client:
    """A blocking client. Not thread-safe: one client for each thread. A lost connection stays lost: make a new one.

    Args:
        directory: the daemon's run directory; None for the one `orchestrator start` uses.
        timeout_s: how long the daemon has to answer at once; work that takes longer has deadlines of its own.

    Raises:
        NotRunning: no daemon answers there.
    """

    def __init__(self, directory: Path | None = None, timeout_s: float = 5.0) -> None:
        self._directory = directory or locate()
        self._timeout_s = timeout_s
        self._conversation = Conversation()
        self._streams: list[EventStream] = []
        control, self._events_address = addresses(self._directory)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # A client that nobody closed must not make the garbage collector wait for a daemon that is gone.
        self._finalizer = weakref.finalize(self, self._context.destroy, 0)
        try:
            self._control = _Link(self._context, zmq.DEALER, control, self._directory)
            self._on_air = _Link(self._context, zmq.SUB, self._events_address, self._directory, ON_AIR_PREFIX)
            self._control.wait_up(timeout_s)
            self._on_air.wait_up(timeout_s)
        except BaseException:
            self._finalizer()
            raise

    def prompt(self, text: str, at: int | None = None) -> "PromptHandle":
        """Puts a prompt in force at the next block, or at the block `at`; returns when the daemon accepted it.

        Raises:
            Refused: the daemon does not take it; nothing changed.
            NotRunning: no answer in time.
        """
        self._hear_on_air()
        identifier = self._send(prompt_command(text, at))
        first = self._first_answer(identifier)
        if isinstance(first, Accepted):
            return PromptHandle(self, identifier, first.version, None)
        return PromptHandle(self, identifier, None, outcome(first))

    def status(self) -> Status:
        """A snapshot of the run. Raises NotRunning."""
        answer = self._first_answer(self._send(StatusGet()))
        if not isinstance(answer, Status):
            raise refusal(answer)
        return answer

    def stop(self, timeout_s: float | None = 60.0) -> Stopped:
        """Ends the run and waits until its outputs are closed. Raises NotRunning, Refused, TimeoutError."""
        identifier = self._send(Stop())
        answer = self.next_answer(identifier, timeout_s)
        if isinstance(answer, Accepted):
            answer = self.next_answer(identifier, timeout_s)
        if not isinstance(answer, Stopped):
            raise refusal(answer)
        return answer

    def events(self, timeout_s: float | None = None) -> "EventStream":
        """Events of all types from now on; ends when none came for `timeout_s`, or when the daemon ends."""
        link = _Link(self._context, zmq.SUB, self._events_address, self._directory, b"")
        stream = EventStream(link, timeout_s)
        self._streams.append(stream)
        link.wait_up(self._timeout_s)
        return stream

    def next_answer(self, identifier: str, timeout_s: float | None) -> Message:
        """The next answer of a command; answers of others that come meanwhile are kept for them.

        Raises:
            TimeoutError: none yet; ask again.
            NotRunning: the daemon is gone.
        """
        deadline = _Deadline(timeout_s)
        while (answer := self._conversation.next_answer(identifier)) is None:
            self._conversation.hear(self._control.recv(deadline))
        return answer

    def wait_on_air(self, version: int, timeout_s: float | None) -> OnAir:
        """The on-air event of a prompt of this client. Raises TimeoutError, NotRunning."""
        deadline = _Deadline(timeout_s)
        while (event := self._conversation.on_air(version)) is None:
            self._conversation.hear_event(self._on_air.recv(deadline))
        return event

    def close(self) -> None:
        """Closes all connections, those of event streams too."""
        for stream in self._streams:
            stream.close()
        self._control.close()
        self._on_air.close()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, command: Message) -> str:
        identifier, data = self._conversation.ask(command)
        self._control.send(data)
        return identifier

    def _first_answer(self, identifier: str) -> Message:
        """The answer that the daemon owes at once."""
        try:
            return self.next_answer(identifier, self._timeout_s)
        except TimeoutError as error:
            self._conversation.forget(identifier)
            raise silent(self._directory, self._timeout_s) from error

    def _hear_on_air(self) -> None:
        """Takes what has come, so that a client that only sends prompts does not fill its queue."""
        for data in self._on_air.arrived():
            self._conversation.hear_event(data)


class PromptHandle:
    """A prompt that the daemon accepted.

    Attributes:
        version: its number in the stream; None if the stream ended before it got one.
    """

    def __init__(self, client: Client, identifier: str, version: int | None, final: Outcome | None) -> None:
        self.version = version
        self._client = client
        self._identifier = identifier
        self._final = final

    def result(self, timeout_s: float | None = None) -> Outcome:
        """The final answer: applied, superseded or cancelled. None waits for ever.

        Raises:
            Refused: the text encoder cannot use the prompt.
            TimeoutError: not yet; ask again.
            NotRunning: the daemon ended without an answer.
        """
        if self._final is None:
            self._final = outcome(self._client.next_answer(self._identifier, timeout_s))
        return self._final

    def on_air(self, timeout_s: float | None = None) -> OnAir:
        """The event that the prompt's first frame left playout, also if that was before the call.

        A prompt that is superseded or cancelled never goes on air: ask `result` first.

        Raises:
            TimeoutError: not yet.
            NotRunning: the daemon ended, or the prompt never got a version.
        """
        if self.version is None:
            raise NotRunning("the stream ended before the prompt got a version; it will not go on air")
        return self._client.wait_on_air(self.version, timeout_s)


class EventStream(Iterator[Message]):
    """Events as they come; ends at its deadline or with the daemon. Its client closes it, or `close`."""

    def __init__(self, link: "_Link", timeout_s: float | None) -> None:
        self._link = link
        self._timeout_s = timeout_s
        self._codec = Codec(EVENTS)

    def __next__(self) -> Message:
        try:
            return self._codec.decode(self._link.recv(_Deadline(self._timeout_s)))
        except (TimeoutError, NotRunning):
            raise StopIteration from None

    def close(self) -> None:
        self._link.close()


class _Deadline:
    """A moment from now; None is never."""

    def __init__(self, timeout_s: float | None) -> None:
        self._at = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_ms(self) -> int | None:
        return None if self._at is None else max(0, round((self._at - time.monotonic()) * 1000))


class _Link:
    """A connected socket and the monitor that tells when its peer comes and goes.

    Args:
        directory: for the text of errors.
        subscribe: for a SUB socket, how the messages it wants begin.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        address: str,
        directory: Path,
        subscribe: bytes | None = None,
    ) -> None:
        self._directory = directory
        self._lost = False
        self._socket = context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, NO_RECONNECT_MS)
        if subscribe is not None:
            self._socket.setsockopt(zmq.SUBSCRIBE, subscribe)
        self._monitor = self._socket.get_monitor_socket(CONNECTION_EVENTS)
        self._socket.connect(address)

    def wait_up(self, timeout_s: float) -> None:
        """Returns when the peer has shaken hands. Raises NotRunning."""
        if not self._monitor.poll(round(timeout_s * 1000)):
            raise silent(self._directory, timeout_s)
        self._read_monitor()

    def send(self, data: bytes) -> None:
        """Raises NotRunning where the peer is gone or takes nothing."""
        self._read_monitor()
        if self._lost:
            raise gone(self._directory)
        try:
            self._socket.send(data)
        except zmq.Again as error:
            raise silent(self._directory, 0) from error

    def recv(self, deadline: _Deadline) -> bytes:
        """The next message, also one that came before the peer went. Raises TimeoutError, NotRunning."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while not self._socket.poll(0):
            if self._lost:
                raise gone(self._directory)
            if not poller.poll(deadline.left_ms):
                raise TimeoutError("the daemon has not answered yet")
            self._read_monitor()
        return self._socket.recv()

    def arrived(self) -> Iterator[bytes]:
        """Messages that are there now."""
        while self._socket.poll(0):
            yield self._socket.recv()

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            self._lost |= recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
