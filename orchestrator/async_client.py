"""The Python client for asyncio; commands, answers and errors are those of `orchestrator.client`.

async with AsyncClient() as client:
    handle = await client.prompt("a fox in the snow")
    applied = await handle.result()
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from ipc.codec import MAX_BYTES, Codec
from ipc.errors import LongLiveError, NotRunning, ProtocolError
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

Found = TypeVar("Found")


class AsyncClient:
    """A client for one event loop and any number of its tasks. Not thread-safe. Entering the context connects.

    Args and errors: those of `orchestrator.client.Client`.
    """

    def __init__(self, directory: Path | None = None, timeout_s: float = 5.0) -> None:
        self._directory = directory or locate()
        self._timeout_s = timeout_s
        self._conversation = Conversation()
        self._changed = asyncio.Condition()
        self._failure: LongLiveError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[zmq.asyncio.Socket] = []

    async def __aenter__(self) -> Self:
        control, self._events_address = addresses(self._directory)
        self._context = zmq.asyncio.Context()
        try:
            self._control, monitor = await self._connect(zmq.DEALER, control)
            on_air, _ = await self._connect(zmq.SUB, self._events_address, ON_AIR_PREFIX)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._tasks = [
            asyncio.create_task(self._listen(self._control, self._conversation.hear)),
            asyncio.create_task(self._listen(on_air, self._conversation.hear_event)),
            asyncio.create_task(self._watch(monitor)),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in self._sockets:
            socket.disable_monitor()
            socket.close()
        self._context.destroy(linger=0)

    async def prompt(self, text: str, at: int | None = None) -> "AsyncPromptHandle":
        """As `Client.prompt`."""
        identifier = await self._send(prompt_command(text, at))
        first = await self._first_answer(identifier)
        if isinstance(first, Accepted):
            return AsyncPromptHandle(self, identifier, first.version, None)
        return AsyncPromptHandle(self, identifier, None, outcome(first))

    async def status(self) -> Status:
        """As `Client.status`."""
        answer = await self._first_answer(await self._send(StatusGet()))
        if not isinstance(answer, Status):
            raise refusal(answer)
        return answer

    async def stop(self, timeout_s: float | None = 60.0) -> Stopped:
        """As `Client.stop`."""
        identifier = await self._send(Stop())
        answer = await self.next_answer(identifier, timeout_s)
        if isinstance(answer, Accepted):
            answer = await self.next_answer(identifier, timeout_s)
        if not isinstance(answer, Stopped):
            raise refusal(answer)
        return answer

    async def events(self, timeout_s: float | None = None) -> "AsyncEventStream":
        """As `Client.events`: subscribed when this returns, so that nothing that happens after it is missed."""
        socket, monitor = await self._connect(zmq.SUB, self._events_address, b"")
        return AsyncEventStream(socket, monitor, timeout_s)

    async def next_answer(self, identifier: str, timeout_s: float | None) -> Message:
        """As `Client.next_answer`."""
        return await self._until(lambda: self._conversation.next_answer(identifier), timeout_s)

    async def wait_on_air(self, version: int, timeout_s: float | None) -> OnAir:
        """As `Client.wait_on_air`."""
        return await self._until(lambda: self._conversation.on_air(version), timeout_s)

    async def _connect(
        self, kind: int, address: str, subscribe: bytes | None = None
    ) -> tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]:
        """A socket and its monitor, after the handshake. Raises NotRunning."""
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, NO_RECONNECT_MS)
        if subscribe is not None:
            socket.setsockopt(zmq.SUBSCRIBE, subscribe)
        monitor = socket.get_monitor_socket(CONNECTION_EVENTS)
        socket.connect(address)
        if not await monitor.poll(round(self._timeout_s * 1000)):
            raise silent(self._directory, self._timeout_s)
        return socket, monitor

    async def _send(self, command: Message) -> str:
        if self._failure is not None:
            raise self._failure
        identifier, data = self._conversation.ask(command)
        try:
            await self._control.send(data)
        except zmq.Again as error:
            raise silent(self._directory, 0) from error
        return identifier

    async def _first_answer(self, identifier: str) -> Message:
        try:
            return await self.next_answer(identifier, self._timeout_s)
        except TimeoutError as error:
            self._conversation.forget(identifier)
            raise silent(self._directory, self._timeout_s) from error

    async def _until(self, look: Callable[[], Found | None], timeout_s: float | None) -> Found:
        """What `look` finds, as soon as it finds something. Raises TimeoutError, NotRunning, ProtocolError."""
        async with self._changed, asyncio.timeout(timeout_s):
            while (found := look()) is None:
                if self._failure is not None:
                    raise self._failure
                await self._changed.wait()
        return found

    async def _listen(self, socket: zmq.asyncio.Socket, hear: Callable[[bytes], None]) -> None:
        """Hears what comes on a socket, for ever; a message that is none ends the client's work."""
        try:
            while True:
                hear(await socket.recv())
                await self._tell()
        except ProtocolError as error:
            await self._fail(error)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Waits for the daemon to go; what came before that is heard first."""
        while (await recv_monitor_message(monitor))["event"] != zmq.EVENT_DISCONNECTED:
            continue
        while await self._control.poll(0):
            await asyncio.sleep(0)
        await self._fail(gone(self._directory))

    async def _fail(self, error: LongLiveError) -> None:
        self._failure = error
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class AsyncPromptHandle:
    """A prompt that the daemon accepted; as `orchestrator.client.PromptHandle`."""

    def __init__(self, client: AsyncClient, identifier: str, version: int | None, final: Outcome | None) -> None:
        self.version = version
        self._client = client
        self._identifier = identifier
        self._final = final

    async def result(self, timeout_s: float | None = None) -> Outcome:
        """As `PromptHandle.result`; for one task at a time."""
        if self._final is None:
            self._final = outcome(await self._client.next_answer(self._identifier, timeout_s))
        return self._final

    async def on_air(self, timeout_s: float | None = None) -> OnAir:
        """As `PromptHandle.on_air`."""
        if self.version is None:
            raise NotRunning("the stream ended before the prompt got a version; it will not go on air")
        return await self._client.wait_on_air(self.version, timeout_s)


class AsyncEventStream(AsyncIterator[Message]):
    """Events as they come; ends at its deadline or with the daemon. Its client closes it."""

    def __init__(self, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket, timeout_s: float | None) -> None:
        self._socket = socket
        self._monitor = monitor
        self._timeout_ms = None if timeout_s is None else round(timeout_s * 1000)
        self._codec = Codec(EVENTS)
        self._over = False

    async def __anext__(self) -> Message:
        poller = zmq.asyncio.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while not await self._socket.poll(0):
            if not self._over and not await poller.poll(self._timeout_ms):
                raise StopAsyncIteration
            self._over = self._over or await self._daemon_went()
            if self._over and not await self._socket.poll(0):
                raise StopAsyncIteration
        return self._codec.decode(await self._socket.recv())

    async def _daemon_went(self) -> bool:
        while await self._monitor.poll(0):
            if (await recv_monitor_message(self._monitor))["event"] == zmq.EVENT_DISCONNECTED:
                return True
        return False
