"""Every message crosses the wire unchanged, and nothing else does."""

import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ipc import messages
from ipc.codec import Codec, pack_envelope, packed, unpack_envelope
from ipc.errors import ProtocolError
from ipc.messages import ANSWERS, COMMANDS, EVENTS, PROTOCOL_VERSION, TO_DAEMON, TO_STAGE, Message
from orchestrator.gateway import ClientDesk

TABLES = {"commands": COMMANDS, "answers": ANSWERS, "events": EVENTS, "to stage": TO_STAGE, "to daemon": TO_DAEMON}
TYPES = sorted({kind for table in TABLES.values() for kind in table}, key=lambda kind: kind.type)


def values(annotation: Any, metadata: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Values of a field's type within its limits."""
    if annotation is int:
        return st.integers(0, 2**63 - 1)
    if annotation is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)
    if annotation is bytes:
        return st.binary(max_size=64)
    if get_origin(annotation) in (types.UnionType, Union):
        return st.one_of(*(values(part, ()) for part in get_args(annotation)))
    if annotation is type(None):
        return st.none()
    if get_origin(annotation) is list:
        return st.lists(values(get_args(annotation)[0], ()), max_size=4)
    if get_origin(annotation) is dict:
        return st.dictionaries(st.text(max_size=8), values(get_args(annotation)[1], ()), max_size=3)
    if hasattr(annotation, "__metadata__"):
        return values(annotation.__origin__, annotation.__metadata__)
    if isinstance(annotation, type) and issubclass(annotation, Message):
        return instances(annotation)
    raise AssertionError(f"no values for {annotation}")


def instances(kind: type[Message]) -> st.SearchStrategy[Message]:
    fields = {name: values(f.annotation, tuple(f.metadata)) for name, f in kind.model_fields.items()}
    return st.builds(kind, **fields)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.type)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip(kind: type[Message], data: st.DataObject) -> None:
    codec = Codec([kind])
    message = data.draw(instances(kind))
    decoded = codec.decode(codec.encode(message))
    assert decoded == message
    assert type(decoded) is kind


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.type)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_further_missing_and_ill_typed_fields_are_refused(kind: type[Message], data: st.DataObject) -> None:
    codec = Codec([kind])
    body = data.draw(instances(kind)).model_dump()
    bad = [body | {"further": 1}]
    bad += [{k: v for k, v in body.items() if k != name} for name, f in kind.model_fields.items() if f.is_required()]
    bad += [body | {name: ["no", {"such": 1}, "type"]} for name in body]
    for wrong in bad:
        with pytest.raises(ProtocolError, match=kind.type):
            codec.decode(packed({"type": kind.type, "body": wrong}))


def limit(kind: type[Message], name: str, word: str) -> Any:
    """A limit of a field, such as `max_length`, or None."""
    return next((getattr(m, word) for m in kind.model_fields[name].metadata if hasattr(m, word)), None)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.type)
@settings(max_examples=1, deadline=None)
@given(data=st.data())
def test_limits_are_kept_on_both_sides(kind: type[Message], data: st.DataObject) -> None:
    """A number or a text at its limit passes, one beyond it is refused."""
    codec = Codec([kind])
    body = data.draw(instances(kind)).model_dump()
    good, bad = [], []
    for name, field in kind.model_fields.items():
        if field.annotation is int:
            good += [body | {name: 0}, body | {name: 2**63 - 1}]
            bad += [body | {name: -1}, body | {name: 2**63}, body | {name: True}, body | {name: 1.0}]
        if field.annotation is str and (longest := limit(kind, name, "max_length")) is not None:
            good.append(body | {name: "x" * longest})
            bad.append(body | {name: "x" * (longest + 1)})
        if field.annotation is str and limit(kind, name, "min_length"):
            bad.append(body | {name: ""})
        if field.annotation is float:
            bad += [body | {name: float("nan")}, body | {name: float("inf")}]
    for right in good:
        assert codec.decode(packed({"type": kind.type, "body": right})).model_dump() == right
    for wrong in bad:
        with pytest.raises(ProtocolError, match=kind.type):
            codec.decode(packed({"type": kind.type, "body": wrong}))


class Wire:
    """A gateway of one request, and a daemon that carries nothing out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.replies: list[Message] = []

    def drain(self, take: Callable[[bytes, bytes], None]) -> None:
        take(b"peer", self._data)

    def send(self, peer: bytes, data: bytes) -> None:
        envelope = unpack_envelope(data)
        self.replies.append(Codec(ANSWERS).build(envelope.type, envelope.body))


@pytest.mark.parametrize("command", [messages.PromptSet(text="a"), messages.StatusGet(), messages.Stop()], ids=repr)
@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 2**63])
def test_another_protocol_version_is_refused(command: Message, version: int) -> None:
    """By the daemon, in one answer that says which it speaks; nothing is carried out."""
    wire = Wire(pack_envelope(version, "id", command))
    ClientDesk(wire, publisher=None, commanded=None).serve()
    (answer,) = wire.replies
    assert isinstance(answer, messages.Rejected)
    assert answer.code == "unsupported_version"
    assert f"speaks {PROTOCOL_VERSION}" in answer.text


@pytest.mark.parametrize("name", TABLES)
def test_a_type_has_one_meaning(name: str) -> None:
    """No two messages of a table share a name, and every message is in a table or part of one that is."""
    names = [kind.type for kind in TABLES[name]]
    assert len(names) == len(set(names))


def test_every_message_is_in_a_table() -> None:
    classes = [value for value in vars(messages).values() if isinstance(value, type)]
    defined = {kind for kind in classes if issubclass(kind, Message)} - {Message}
    assert {kind.type for kind in defined - set(TYPES)} == {"stage_status", "sink_status"}


def test_messages_cannot_be_changed() -> None:
    message = messages.Credit(block=3)
    with pytest.raises(ValidationError):
        message.block = 4  # type: ignore[misc]


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValidationError):
        messages.OnAir(version=0, block=0, frame=0, ms=float("nan"))
    with pytest.raises(ValidationError):
        messages.Credit(block=-1)
    with pytest.raises(ValidationError):
        messages.Credit(block=True)


def test_a_message_is_one_map() -> None:
    data = msgpack.unpackb(Codec(()).encode(messages.Credit(block=3)))
    assert data == {"type": "credit", "body": {"block": 3}}
