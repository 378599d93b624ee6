"""What both clients share: the bookkeeping of commands and answers, where the daemon is, how its absence is told.

Opens no ZeroMQ socket and waits for nothing, so that the blocking and the asyncio client are thin.
"""

import socket
import uuid
from collections import OrderedDict, deque
from pathlib import Path

import zmq

from ipc.channel import endpoint
from ipc.codec import MAX_BYTES, Codec, pack_envelope, packed, unpack_envelope
from ipc.errors import NotRunning, ProtocolError, Refused
from ipc.messages import (
    ANSWERS,
    EVENTS,
    PROTOCOL_VERSION,
    Accepted,
    Applied,
    Cancelled,
    Message,
    OnAir,
    PromptSet,
    Rejected,
    Superseded,
)
from orchestrator.run_directory import CONTROL, EVENTS_SOCKET
from orchestrator.session import check_text

Outcome = Applied | Superseded | Cancelled
"""Final answers of a prompt; `rejected` is raised as Refused instead."""
ON_AIR_PREFIX = b"\x82" + packed("type") + packed(OnAir.type)
"""How the bytes of an on-air event begin: a subscription to it does not fill up with other events."""
CONNECTION_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
REMEMBERED = 256
"""On-air events kept until somebody asks for them."""
NO_RECONNECT_MS = 10**9
"""A command must never reach a later daemon than the one it was meant for, so a lost connection stays lost. ZeroMQ's
own word for that, -1, would also drop answers that have arrived and are not read yet."""


class Conversation:
    """Commands that wait for answers, and answers that wait for who asked. Pure: no socket, no clock."""

    def __init__(self) -> None:
        self._answers = Codec(ANSWERS)
        self._events = Codec(EVENTS)
        self._open: dict[str, deque[Message]] = {}
        self._on_air: OrderedDict[int, OnAir] = OrderedDict()

    def ask(self, command: Message) -> tuple[str, bytes]:
        """A new command's id and bytes. Raises Refused where it is longer than a message may be."""
        identifier = uuid.uuid4().hex
        data = pack_envelope(PROTOCOL_VERSION, identifier, command)
        if len(data) > MAX_BYTES:
            raise Refused("too_long", f"{command.type}: found {len(data)} bytes, at most {MAX_BYTES} are taken")
        self._open[identifier] = deque()
        return identifier, data

    def hear(self, data: bytes) -> None:
        """Keeps an answer for its command; one that nobody waits for is dropped. Raises ProtocolError."""
        envelope = unpack_envelope(data)
        if envelope.v != PROTOCOL_VERSION:
            raise ProtocolError(f"the daemon speaks protocol {envelope.v}, this client {PROTOCOL_VERSION}")
        if envelope.id in self._open:
            self._open[envelope.id].append(self._answers.build(envelope.type, envelope.body))

    def hear_event(self, data: bytes) -> None:
        """Keeps an on-air event. Raises ProtocolError."""
        event = self._events.decode(data)
        if isinstance(event, OnAir):
            self._on_air[event.version] = event
            while len(self._on_air) > REMEMBERED:
                self._on_air.popitem(last=False)

    def next_answer(self, identifier: str) -> Message | None:
        """The oldest answer of a command that nobody took yet. One that is not `accepted` is its last."""
        answers = self._open.get(identifier)
        if not answers:
            return None
        answer = answers.popleft()
        if not isinstance(answer, Accepted):
            del self._open[identifier]
        return answer

    def forget(self, identifier: str) -> None:
        """Nobody waits for this command any more."""
        self._open.pop(identifier, None)

    def on_air(self, version: int) -> OnAir | None:
        """The on-air event of a prompt, if it has come."""
        return self._on_air.get(version)


def prompt_command(text: str, at: int | None) -> PromptSet:
    """The command for a prompt. Raises Refused: a text or a block that no daemon takes."""
    check_text(text)
    if at is not None and not 0 <= at < 2**63:
        raise Refused("bad_block", f"prompt: found block {at}, expected a number from 0 on")
    return PromptSet(text=text, at=at)


def outcome(answer: Message) -> Outcome:
    """The final answer of a prompt. Raises Refused, ProtocolError."""
    if isinstance(answer, Applied | Superseded | Cancelled):
        return answer
    raise refusal(answer)


def refusal(answer: Message) -> Refused | ProtocolError:
    """What to raise for an answer that is not the one hoped for."""
    if isinstance(answer, Rejected):
        return Refused(answer.code, answer.text)
    if isinstance(answer, Cancelled):
        return Refused("cancelled", answer.reason)
    return ProtocolError(f"the daemon answered {answer.type}, which this command does not have")


def addresses(directory: Path) -> tuple[str, str]:
    """Endpoints of the command and the event socket. Raises NotRunning where nobody listens, without waiting."""
    for name in (CONTROL, EVENTS_SOCKET):
        path = Path(endpoint(directory, name).removeprefix("ipc://"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except BlockingIOError:
                continue
            except OSError as error:
                raise NotRunning(f"no daemon runs in {directory}; start one with `orchestrator start`") from error
    return endpoint(directory, CONTROL), endpoint(directory, EVENTS_SOCKET)


def silent(directory: Path, timeout_s: float) -> NotRunning:
    """The error for a daemon that is there and says nothing."""
    return NotRunning(f"the daemon in {directory} did not answer within {timeout_s:g} s; it may hang or be stopped")


def gone(directory: Path) -> NotRunning:
    """The error for a daemon that ended."""
    return NotRunning(f"the daemon in {directory} ended, or closed the connection, before it answered")
