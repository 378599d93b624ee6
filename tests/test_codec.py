"""Whatever bytes come, decoding ends in a message or in ProtocolError."""

import random
from collections.abc import Callable
from contextlib import suppress

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.codec import MAX_BYTES, Codec, pack_envelope, packed, unpack_envelope
from ipc.errors import ProtocolError
from ipc.messages import COMMANDS, PROTOCOL_VERSION, PromptSet, StatusGet

GOOD = Codec(()).encode(PromptSet(text="a red circle", at=3))
CODEC = Codec(COMMANDS)


def test_every_prefix_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ProtocolError):
            CODEC.decode(GOOD[:length])
    assert CODEC.decode(GOOD) == PromptSet(text="a red circle", at=3)


def test_random_bytes_are_refused() -> None:
    generator = random.Random(0)
    for _ in range(5000):
        data = generator.randbytes(generator.randrange(200))
        with pytest.raises(ProtocolError):
            CODEC.decode(data)
        with pytest.raises(ProtocolError):
            unpack_envelope(data)


def test_damaged_messages_never_raise_anything_else() -> None:
    generator = random.Random(1)
    for _ in range(5000):
        data = bytearray(GOOD)
        data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            CODEC.decode(bytes(data))
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 5000,
        packed({"type": "status.get", "body": [[[[[[]]]]]]}),
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgpack.packb({"type": "status.get", "body": msgpack.ExtType(5, b"x")}),
        msgpack.packb({1: 2}),
        msgpack.packb({"type": "status.get", "body": {}, "more": 1}),
        msgpack.packb({"type": ["status.get"], "body": {}}),
        msgpack.packb({"type": "credit", "body": {"block": 1}}),
        msgpack.packb("text"),
        bytes(MAX_BYTES + 1),
        b"\x82\xa4type\xaastatus.get\xa4body\xa1\xff",
    ],
    ids=[
        "deep",
        "list body",
        "endless map",
        "endless bytes",
        "extension",
        "number keys",
        "further key",
        "list type",
        "type of another table",
        "no map",
        "too long",
        "not UTF-8",
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        CODEC.decode(data)
    assert len(str(caught.value)) < 500


def test_an_error_does_not_repeat_the_payload() -> None:
    with pytest.raises(ProtocolError) as caught:
        CODEC.decode(packed({"type": "prompt.set", "body": {"text": 1, "secret": "rtmp://key"}}))
    assert "rtmp" not in str(caught.value)


LONG_KEY = {"v": 1, "id": "a", "type": "status.get", "body": {}, "key" * 10_000: 1}


@pytest.mark.parametrize(
    "decode",
    [
        lambda: CODEC.decode(packed({"type": "prompt.set", "body": {"text": "a", "key" * 10_000: 1}})),
        lambda: CODEC.decode(packed({"type": "prompt.set", "body": {"text": "a", "rtmp://key": 1}})),
        lambda: unpack_envelope(packed(LONG_KEY)),
    ],
    ids=["long key", "secret key", "envelope"],
)
def test_an_error_does_not_repeat_unknown_keys(decode: Callable[[], object]) -> None:
    """What comes from a peer as a key is payload too."""
    with pytest.raises(ProtocolError) as caught:
        decode()
    assert len(str(caught.value)) < 500
    assert "key" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_drawn_bytes_end_in_a_message_or_in_an_error(data: bytes) -> None:
    for decode in (CODEC.decode, unpack_envelope):
        with suppress(ProtocolError):
            decode(data)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from([command.type for command in COMMANDS]), body=PLAIN)
def test_drawn_bodies_end_in_a_message_or_in_an_error(kind: str, body: object) -> None:
    """Well-formed MessagePack of any shape, under a type that is known."""
    for value in ({"type": kind, "body": body}, {"v": 1, "id": "a", "type": kind, "body": body}, body):
        for decode in (CODEC.decode, unpack_envelope):
            with suppress(ProtocolError):
                decode(packed(value))


def test_the_longest_message_is_taken_and_no_longer_one() -> None:
    overhead = len(packed({"type": "x" * 100, "body": b"y" * 60_000})) - 60_100
    fits = packed({"type": "x" * 100, "body": b"y" * (MAX_BYTES - overhead - 100)})
    assert len(fits) == MAX_BYTES
    with pytest.raises(ProtocolError, match="unknown message type"):
        CODEC.decode(fits)
    with pytest.raises(ProtocolError, match=f"at most {MAX_BYTES}"):
        CODEC.decode(fits + b"\x00")


def test_envelope_round_trip() -> None:
    envelope = unpack_envelope(pack_envelope(PROTOCOL_VERSION, "id-1", StatusGet()))
    assert (envelope.v, envelope.id, envelope.type, envelope.body) == (PROTOCOL_VERSION, "id-1", "status.get", {})


def test_an_envelope_holds_no_extension_types() -> None:
    """Its body is any plain data until its type is known."""
    with pytest.raises(ProtocolError):
        unpack_envelope(packed({"v": 1, "id": "a", "type": "stop", "body": {"x": msgpack.ExtType(5, b"x")}}))


@pytest.mark.parametrize(
    "change", [{"id": ""}, {"id": "x" * 65}, {"v": "1"}, {"type": ""}, {"body": None}, {"more": 1}]
)
def test_bad_envelopes_are_refused(change: dict) -> None:
    good = {"v": 1, "id": "a", "type": "status.get", "body": {}}
    with pytest.raises(ProtocolError):
        unpack_envelope(packed(good | change))
