"""Channels deliver, survive a receiver's restart, and never block who sends."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from command import until

from ipc.channel import MAX_IPC_PATH, Gateway, Inbox, Outbox, Publisher, endpoint, remove_stale_socket
from ipc.codec import MAX_BYTES, Codec
from ipc.errors import ConfigError, ProtocolError
from ipc.messages import Begin, Credit, Drain, StateChanged

TYPES = (Credit, Drain)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_messages_arrive_in_order(context: zmq.Context, tmp_path: Path) -> None:
    inbox = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    for block in range(100):
        assert outbox.send(Credit(block=block))
    assert [inbox.recv(5) for _ in range(100)] == [Credit(block=block) for block in range(100)]
    assert inbox.recv(0) is None
    assert list(inbox.drain()) == []


def test_a_receiver_may_come_later_and_come_back(context: zmq.Context, tmp_path: Path) -> None:
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    outbox.send(Credit(block=1))
    first = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    assert first.recv(10) == Credit(block=1)
    first.close()
    again = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    received = []

    def arrives() -> bool:
        outbox.send(Drain())
        received.extend(again.drain())
        return bool(received)

    until(arrives, 20)


def test_sending_to_nobody_never_blocks(context: zmq.Context, tmp_path: Path) -> None:
    """What finds no room is dropped and said: the rings' headers decide, messages only wake."""
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    results = [outbox.send(Drain()) for _ in range(6000)]
    assert results[0]
    assert not results[-1]


def test_threads_may_share_an_outbox(context: zmq.Context, tmp_path: Path) -> None:
    inbox = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    threads = [threading.Thread(target=lambda: [outbox.send(Credit(block=7)) for _ in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [inbox.recv(5) for _ in range(1200)] == [Credit(block=7)] * 1200


def test_a_message_of_another_table_is_refused(context: zmq.Context, tmp_path: Path) -> None:
    inbox = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    outbox.send(Begin(block=0))
    with pytest.raises(ProtocolError, match="unknown message type"):
        inbox.recv(5)


def test_the_gateway_answers_each_peer(context: zmq.Context, tmp_path: Path) -> None:
    """Also when another peer is gone, or sends something that is no request."""
    gateway = Gateway(context, endpoint(tmp_path, "g"))
    peers = [context.socket(zmq.DEALER) for _ in range(3)]
    for number, peer in enumerate(peers):
        peer.connect(endpoint(tmp_path, "g"))
        peer.send_multipart([b"a", b"b", b"c"])
        peer.send(str(number).encode())
    requests: list[tuple[bytes, bytes]] = []
    until(lambda: gateway.drain(lambda *request: requests.append(request)) or len(requests) == 3, 10)
    peers[0].close(linger=0)
    for peer, data in requests:
        gateway.send(peer, b"re " + data)
    gateway.send(b"never seen", b"x")
    for number in (1, 2):
        assert peers[number].poll(5000)
        assert peers[number].recv() == f"re {number}".encode()


def test_a_client_that_never_reads_delays_nobody(context: zmq.Context, tmp_path: Path) -> None:
    """Its replies are lost once its queue is full; sending to it returns at once, and others get theirs."""
    gateway = Gateway(context, endpoint(tmp_path, "g"))
    silent, reader = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    silent.setsockopt(zmq.RCVHWM, 1)
    for name, peer in (("silent", silent), ("reader", reader)):
        peer.connect(endpoint(tmp_path, "g"))
        peer.send(name.encode())
    peers: dict[bytes, bytes] = {}
    until(lambda: gateway.drain(lambda peer, data: peers.update({data: peer})) or len(peers) == 2, 10)
    began = time.monotonic()
    for _ in range(5000):
        gateway.send(peers[b"silent"], bytes(1000))
    gateway.send(peers[b"reader"], b"served")
    assert time.monotonic() - began < 10
    assert reader.poll(5000)
    assert reader.recv() == b"served"


def test_a_client_that_says_nothing_is_nothing(context: zmq.Context, tmp_path: Path) -> None:
    """Neither a ZeroMQ peer without a request nor a bare connection keeps the gateway from others."""
    gateway = Gateway(context, endpoint(tmp_path, "g"))
    mute = context.socket(zmq.DEALER)
    mute.connect(endpoint(tmp_path, "g"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bare:
        bare.connect(str(tmp_path / "g.sock"))
        speaker = context.socket(zmq.DEALER)
        speaker.connect(endpoint(tmp_path, "g"))
        speaker.send(b"hello")
        heard: list[bytes] = []
        until(lambda: gateway.drain(lambda peer, data: heard.append(data)) or heard, 10)
        assert heard == [b"hello"]


def test_a_flood_is_taken_in_portions(context: zmq.Context, tmp_path: Path) -> None:
    """The daemon has other work between: one visit takes a bounded number of requests."""
    gateway = Gateway(context, endpoint(tmp_path, "g"))
    peer = context.socket(zmq.DEALER)
    peer.connect(endpoint(tmp_path, "g"))
    for _ in range(60):
        peer.send(b"x")
    taken: list[int] = []

    def visit() -> bool:
        before = sum(taken)
        portion: list[bytes] = []
        gateway.drain(lambda _, data: portion.append(data), at_most=10)
        taken.append(len(portion))
        return before + len(portion) == 60

    until(visit, 30)
    assert max(taken) == 10


def test_a_message_too_long_cuts_off_its_sender_alone(context: zmq.Context, tmp_path: Path) -> None:
    """ZeroMQ drops the connection at MAXMSGSIZE; what others send still arrives."""
    inbox = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    rude = context.socket(zmq.PUSH)
    rude.connect(endpoint(tmp_path, "a"))
    rude.send(bytes(MAX_BYTES + 1))
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    outbox.send(Credit(block=1))
    assert inbox.recv(10) == Credit(block=1)
    assert inbox.recv(0.2) is None


def test_a_lost_sender_leaves_its_messages_and_no_trace(context: zmq.Context, tmp_path: Path) -> None:
    inbox = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    lost, other = Outbox(context, endpoint(tmp_path, "a")), Outbox(context, endpoint(tmp_path, "a"))
    lost.send(Credit(block=1))
    lost.close(linger_s=5)
    assert inbox.recv(10) == Credit(block=1)
    other.send(Credit(block=2))
    assert inbox.recv(10) == Credit(block=2)


def test_a_closing_sender_may_let_its_last_words_leave(context: zmq.Context, tmp_path: Path) -> None:
    """With a linger they still reach a receiver that comes after the close."""
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    outbox.send(Credit(block=1))
    outbox.close(linger_s=30)
    assert Inbox(context, endpoint(tmp_path, "a"), TYPES).recv(10) == Credit(block=1)


def test_receiving_ends_at_its_deadline(context: zmq.Context, tmp_path: Path) -> None:
    inbox = Inbox(context, endpoint(tmp_path, "a"), TYPES)
    began = time.monotonic()
    assert inbox.recv(0.1) is None
    inbox.wait(0.1)
    assert 0.18 < time.monotonic() - began < 5


def test_events_reach_who_listens(context: zmq.Context, tmp_path: Path) -> None:
    publisher = Publisher(context, endpoint(tmp_path, "e"))
    listener = context.socket(zmq.SUB)
    listener.subscribe(b"")
    listener.connect(endpoint(tmp_path, "e"))
    event = StateChanged(state="running", text="x")
    until(lambda: publisher.send(event) or listener.poll(20), 10)
    assert Codec([StateChanged]).decode(listener.recv()) == event


def test_too_long_a_path_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"at most {MAX_IPC_PATH}"):
        endpoint(tmp_path / ("x" * 100), "control")


def test_only_sockets_are_removed(context: zmq.Context, tmp_path: Path) -> None:
    foreign = tmp_path / "a.sock"
    foreign.write_text("mine")
    with pytest.raises(ConfigError, match="found another file"):
        remove_stale_socket(foreign)
    assert foreign.read_text() == "mine"
    inbox = Inbox(context, endpoint(tmp_path, "b"), TYPES)
    remove_stale_socket(tmp_path / "b.sock")
    remove_stale_socket(tmp_path / "never.sock")
    assert not (tmp_path / "b.sock").exists()
    inbox.close()
