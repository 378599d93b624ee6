"""Messages to bytes and back: a closed table of types, MessagePack with limits, each message validated on arrival.

No pickle, no code from the wire. What does not fit raises ProtocolError; its text never repeats the payload.
"""

from collections.abc import Iterable
from typing import Any

import msgpack
from pydantic import ValidationError

from ipc.errors import ProtocolError
from ipc.messages import Envelope, Message

MAX_BYTES = 64 * 1024


def _unpack(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes, at most {MAX_BYTES} are taken")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_BYTES,
            max_bin_len=MAX_BYTES,
            max_array_len=4096,
            max_map_len=1024,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a MessagePack message: {type(error).__name__}") from error


def _first_problem(error: ValidationError) -> str:
    """Where and what. A key that no message has comes from the peer, so it is payload and never repeated."""
    problem = error.errors(include_input=False, include_url=False)[0]
    place = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
    where = ".".join(str(part) for part in place) or "message"
    return f"{where[:200]}: {problem['msg']}"


class Codec:
    """Encodes messages and decodes those of a table.

    Args:
        types: the message types that may arrive.
    """

    def __init__(self, types: Iterable[type[Message]]) -> None:
        self._types = {kind.type: kind for kind in types}

    def encode(self, message: Message) -> bytes:
        """One MessagePack map `{type, body}`."""
        return packed({"type": message.type, "body": message.model_dump()})

    def decode(self, data: bytes) -> Message:
        """Raises ProtocolError: not MessagePack, a type outside the table, a missing, unknown or ill-typed field."""
        value = _unpack(data)
        if not isinstance(value, dict) or set(value) != {"type", "body"}:
            raise ProtocolError("a message is a map of type and body")
        return self.build(value["type"], value["body"])

    def build(self, kind: Any, body: Any) -> Message:
        """The message of a type name and a body."""
        known = self._types.get(kind) if isinstance(kind, str) else None
        if known is None:
            raise ProtocolError(f"unknown message type; known here: {', '.join(sorted(self._types))}")
        try:
            return known.model_validate(body)
        except ValidationError as error:
            raise ProtocolError(f"{known.type}: {_first_problem(error)}") from error


def packed(value: Any) -> bytes:
    """MessagePack bytes of plain data."""
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def pack_envelope(version: int, identifier: str, message: Message) -> bytes:
    """The client envelope `{v, id, type, body}` of a message."""
    return packed({"v": version, "id": identifier, "type": message.type, "body": message.model_dump()})


def unpack_envelope(data: bytes) -> Envelope:
    """The envelope in client bytes; its body is not validated yet. Raises ProtocolError."""
    try:
        return Envelope.model_validate(_unpack(data))
    except ValidationError as error:
        raise ProtocolError(f"envelope: {_first_problem(error)}") from error
