"""Channels: send, receive with a deadline, close. Nobody outside this file sees a socket.

A stage has one inbox, which everybody who talks to it connects to; clients reach the daemon's gateway; events are
published to whoever listens. Every socket lingers 0, refuses messages above 64 KiB and has a bounded queue. A message
that finds no room is dropped: between stages messages only wake, the rings' headers decide.
"""

import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import zmq

from ipc.codec import MAX_BYTES, Codec
from ipc.errors import ConfigError
from ipc.messages import Message

MAX_IPC_PATH = 107
"""Bytes a UNIX socket path may have (sockaddr_un)."""


def endpoint(directory: Path, name: str) -> str:
    """The ZeroMQ address of a named socket in a directory. Raises ConfigError where the path is too long."""
    path = directory / f"{name}.sock"
    if len(str(path).encode()) > MAX_IPC_PATH:
        raise ConfigError(
            f"run directory {directory}: {path.name} makes a socket path of {len(str(path).encode())} bytes, at most"
            f" {MAX_IPC_PATH} are allowed; set LONGLIVE_RUN_DIR to a shorter one"
        )
    return f"ipc://{path}"


def remove_stale_socket(path: Path) -> None:
    """Deletes what a dead owner left. Only under the run directory's lock. Raises ConfigError for a foreign file."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{path}: expected a socket or nothing, found another file; move it away")
    path.unlink()


def _configured(socket: zmq.Socket[bytes], queue: int) -> zmq.Socket[bytes]:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.SNDTIMEO, 0)
    return socket


class Inbox:
    """Where a stage or the daemon receives messages of its table.

    Args:
        context: one for each process.
        address: an ipc:// endpoint to bind.
        types: messages that may arrive.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, types: Iterable[type[Message]]) -> None:
        self._codec = Codec(types)
        self._socket = _configured(context.socket(zmq.PULL), 4096)
        self._socket.bind(address)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a poller that waits on several channels."""
        return self._socket

    def recv(self, timeout_s: float) -> Message | None:
        """The next message, or None after the deadline. Raises ProtocolError."""
        if not self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return self._codec.decode(self._socket.recv())

    def wait(self, timeout_s: float) -> None:
        """Returns when a message is there or the time is over."""
        self._socket.poll(max(0, round(timeout_s * 1000)))

    def drain(self) -> Iterator[Message]:
        """All messages that are there now. Raises ProtocolError."""
        while (message := self.recv(0)) is not None:
            yield message

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """Sends messages to one inbox, which may not be there yet or may come back after a restart.

    May be shared by threads: a completion thread wakes the consumer while the stage sends.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._codec = Codec(())
        self._lock = threading.Lock()
        self._socket = _configured(context.socket(zmq.PUSH), 4096)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._socket.connect(address)

    def send(self, message: Message) -> bool:
        """Queues a message; False where the queue was full and it was dropped."""
        data = self._codec.encode(message)
        with self._lock:
            try:
                self._socket.send(data)
            except zmq.Again:
                return False
        return True

    def close(self, linger_s: float = 0.0) -> None:
        """Closes; with a linger, what is queued still has that long to leave."""
        with self._lock:
            self._socket.close(linger=round(linger_s * 1000))


class Gateway:
    """The daemon's end of the client socket: raw requests of many peers, raw replies."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = _configured(context.socket(zmq.ROUTER), 1000)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        self._socket.bind(address)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a poller that waits on several channels."""
        return self._socket

    def drain(self, take: Callable[[bytes, bytes], None], at_most: int = 256) -> None:
        """Hands (peer, data) of the requests that are there to `take`; other shapes are dropped."""
        for _ in range(at_most):
            if not self._socket.poll(0):
                return
            parts = self._socket.recv_multipart()
            if len(parts) == 2:
                take(parts[0], parts[1])

    def send(self, peer: bytes, data: bytes) -> None:
        """Replies; a peer that is gone or does not read loses its reply, nobody else waits for it."""
        try:
            self._socket.send_multipart([peer, data])
        except zmq.Again:
            return

    def close(self, linger_s: float = 0.0) -> None:
        self._socket.close(linger=round(linger_s * 1000))


class Publisher:
    """Sends every event to all who listen; a slow listener loses events, never delays anybody."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._codec = Codec(())
        self._socket = _configured(context.socket(zmq.PUB), 1000)
        self._socket.bind(address)

    def send(self, message: Message) -> None:
        self._socket.send(self._codec.encode(message))

    def close(self, linger_s: float = 0.0) -> None:
        self._socket.close(linger=round(linger_s * 1000))
