"""The client side of the daemon: commands in, exactly one final answer each out, events to whoever listens.

Knows envelopes and answers; what a command does is told to it by the daemon as functions.
"""

from typing import Protocol

from ipc.channel import Gateway, Publisher
from ipc.codec import Codec, pack_envelope, unpack_envelope
from ipc.errors import ProtocolError, Refused
from ipc.messages import (
    COMMANDS,
    PROTOCOL_VERSION,
    Accepted,
    Message,
    PromptSet,
    Rejected,
    Status,
    StatusGet,
    Stop,
    Stopped,
)
from orchestrator.session import Answer, CommandBook


class Commanded(Protocol):
    """Who carries commands out."""

    def set_prompt(self, text: str, at: int | None, command: str) -> int:
        """Accepts a prompt and gives its version. Raises Refused."""

    def snapshot(self) -> Status:
        """The status now."""

    def stop(self) -> None:
        """Begins to end the run."""


class ClientDesk:
    """Answers clients.

    Args:
        gateway: where commands come from.
        publisher: where events go.
    """

    def __init__(self, gateway: Gateway, publisher: Publisher, commanded: Commanded) -> None:
        self._gateway = gateway
        self._publisher = publisher
        self._commanded = commanded
        self._codec = Codec(COMMANDS)
        self._commands = CommandBook()
        self._stops: list[str] = []

    def serve(self) -> None:
        """Takes the commands that have come."""
        self._gateway.drain(self._take)

    def answer(self, answers: list[Answer]) -> None:
        """Sends final answers of earlier commands."""
        for identifier, message in answers:
            self._answer(identifier, message)

    def publish(self, event: Message) -> None:
        self._publisher.send(event)

    def stopped(self, frames: int) -> None:
        """Gives everybody who asked for the end their final answer."""
        for identifier in self._stops:
            self._answer(identifier, Stopped(frames=frames))
        self._stops.clear()

    def _take(self, peer: bytes, data: bytes) -> None:
        try:
            envelope = unpack_envelope(data)
        except ProtocolError:
            return  # without an id there is no command to answer
        if envelope.type == StatusGet.type and envelope.v == PROTOCOL_VERSION:
            self._gateway.send(peer, pack_envelope(PROTOCOL_VERSION, envelope.id, self._commanded.snapshot()))
            return
        known = self._commands.open(envelope.id, peer)
        if known is not None:
            for message in known:
                self._gateway.send(peer, pack_envelope(PROTOCOL_VERSION, envelope.id, message))
            return
        try:
            self._carry_out(envelope.v, envelope.id, envelope.type, envelope.body)
        except Refused as refusal:
            self._answer(envelope.id, Rejected(code=refusal.code, text=str(refusal)))
        except ProtocolError as error:
            self._answer(envelope.id, Rejected(code="bad_message", text=str(error)[:1000]))

    def _carry_out(self, version: int, identifier: str, kind: str, body: dict[str, object]) -> None:
        if version != PROTOCOL_VERSION:
            raise Refused("unsupported_version", f"protocol {version}: this daemon speaks {PROTOCOL_VERSION}")
        if kind not in {command.type for command in COMMANDS}:
            raise Refused("unknown_type", f"{kind[:64]!r}: no such command")
        command = self._codec.build(kind, body)
        match command:
            case PromptSet():
                accepted = self._commanded.set_prompt(command.text, command.at, identifier)
                self._answer(identifier, Accepted(version=accepted))
            case Stop():
                self._stops.append(identifier)
                self._answer(identifier, Accepted())
                self._commanded.stop()

    def _answer(self, identifier: str, message: Message) -> None:
        peer = self._commands.answer(identifier, message)
        if peer is not None:
            self._gateway.send(peer, pack_envelope(PROTOCOL_VERSION, identifier, message))
