"""Clients: every command meets its own answer, a missing daemon is said in time, and nothing reaches a later daemon."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq
from fake_daemon import FakeDaemon, a_status

from ipc.channel import Gateway
from ipc.errors import NotRunning, ProtocolError, Refused
from ipc.messages import (
    Accepted,
    Applied,
    BlockTimes,
    Cancelled,
    Discontinuity,
    Message,
    OnAir,
    PromptSet,
    Rejected,
    StatusGet,
    Stop,
    Stopped,
    Superseded,
)
from orchestrator.async_client import AsyncClient
from orchestrator.client import Client
from orchestrator.run_directory import RunDirectory


@pytest.fixture
def directory() -> Iterator[RunDirectory]:
    with RunDirectory.temporary() as directory:
        yield directory


def applies_at_once(command: Message) -> Iterator[Message]:
    """Prompts go on air, are accepted and applied, in this order: the worst one for a client that waits for on-air."""
    if isinstance(command, PromptSet):
        block = command.at or 4
        yield OnAir(version=5, block=block, frame=12 * block - 3, ms=812.0)
        yield Accepted(version=5)
        yield Applied(version=5, block=block, frame=12 * block - 3)
    elif isinstance(command, StatusGet):
        yield a_status()
    elif isinstance(command, Stop):
        yield Accepted()
        yield Stopped(frames=480)


def test_a_prompt_is_accepted_then_applied_then_on_air(directory: RunDirectory) -> None:
    with FakeDaemon(directory, applies_at_once) as daemon, Client(directory.path) as client:
        handle = client.prompt("a fox", at=9)
        assert handle.version == 5
        assert handle.result(5) == Applied(version=5, block=9, frame=105)
        assert handle.result(0) == Applied(version=5, block=9, frame=105), "a final answer can be asked for again"
        assert handle.on_air(5).ms == 812.0
        assert daemon.received == [PromptSet(text="a fox", at=9)]


def test_status_and_stop(directory: RunDirectory) -> None:
    with FakeDaemon(directory, applies_at_once), Client(directory.path) as client:
        assert client.status() == a_status()
        assert client.stop(5).frames == 480


@pytest.mark.parametrize(
    "final", [Superseded(version=0, by=1), Cancelled(reason="stopped"), Applied(version=0, block=3, frame=33)]
)
def test_a_final_answer_after_accepted_is_returned(directory: RunDirectory, final: Message) -> None:
    with FakeDaemon(directory, lambda _: [Accepted(version=0), final]), Client(directory.path) as client:
        assert client.prompt("a fox").result(5) == final


def test_rejection_raises_whether_or_not_accepted_came_first(directory: RunDirectory) -> None:
    rejected = Rejected(code="too_long", text="513 tokens")

    def script(command: Message) -> list[Message]:
        return [rejected] if command == PromptSet(text="now") else [Accepted(version=0), rejected]

    with FakeDaemon(directory, script), Client(directory.path) as client:
        with pytest.raises(Refused, match="513 tokens") as at_once:
            client.prompt("now")
        assert at_once.value.code == "too_long"
        handle = client.prompt("later")
        with pytest.raises(Refused, match="513 tokens"):
            handle.result(5)


def test_a_prompt_that_is_cancelled_at_once_has_a_result_but_no_version(directory: RunDirectory) -> None:
    with FakeDaemon(directory, lambda _: [Cancelled(reason="ending")]), Client(directory.path) as client:
        handle = client.prompt("a fox")
        assert handle.version is None
        assert handle.result(0) == Cancelled(reason="ending")
        with pytest.raises(NotRunning):
            handle.on_air(0)


def test_answers_of_other_commands_are_kept_for_them(directory: RunDirectory) -> None:
    with FakeDaemon(directory, applies_at_once), Client(directory.path) as client:
        first, second = client.prompt("first", at=6), client.prompt("second", at=8)
        assert client.status() == a_status()
        assert second.result(5) == Applied(version=5, block=8, frame=93)
        assert first.result(5) == Applied(version=5, block=6, frame=69)


def test_waiting_for_a_result_can_be_given_up_and_taken_up_again(directory: RunDirectory) -> None:
    accepted = [Accepted(version=0)]
    with FakeDaemon(directory, lambda _: accepted) as daemon, Client(directory.path) as client:
        handle = client.prompt("a fox")
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        with pytest.raises(TimeoutError):
            handle.on_air(0.05)
        daemon.publish(OnAir(version=0, block=1, frame=9, ms=5.0))
        assert handle.on_air(5).block == 1


def test_on_air_is_not_lost_among_thousands_of_other_events(directory: RunDirectory) -> None:
    """A full queue drops the newest: the client must subscribe to what it waits for only."""
    noise = [BlockTimes(stage="denoiser", block=n, version=0, began_ns=1, ended_ns=2) for n in range(5000)]

    def script(_: Message) -> list[Message]:
        return [*noise, OnAir(version=0, block=1, frame=9, ms=5.0), Accepted(version=0)]

    with FakeDaemon(directory, script), Client(directory.path) as client:
        assert client.prompt("a fox").on_air(5).ms == 5.0


def test_events_come_in_order_and_end_with_the_deadline(directory: RunDirectory) -> None:
    sent = [Discontinuity(block=n, reason="restart") for n in range(3)]
    with FakeDaemon(directory, applies_at_once) as daemon, Client(directory.path) as client:
        events = client.events(timeout_s=0.5)
        for event in sent:
            daemon.publish(event)
        assert list(events) == sent


def test_events_end_with_the_daemon(directory: RunDirectory) -> None:
    with FakeDaemon(directory, applies_at_once) as daemon, Client(directory.path) as client:
        events = client.events()
        daemon.publish(Discontinuity(block=1, reason="restart"))
        assert next(events) == Discontinuity(block=1, reason="restart")
        daemon.end()
        assert list(events) == []


def test_an_answer_that_came_before_the_daemon_ended_is_still_read(directory: RunDirectory) -> None:
    with FakeDaemon(directory, applies_at_once) as daemon, Client(directory.path) as client:
        handle = client.prompt("a fox")
        assert client.status() == a_status()
        daemon.end()
        assert handle.result(5) == Applied(version=5, block=4, frame=45)


def test_a_daemon_that_ends_is_noticed_without_a_deadline(directory: RunDirectory) -> None:
    with FakeDaemon(directory, lambda _: [Accepted(version=0)]) as daemon, Client(directory.path) as client:
        handle = client.prompt("a fox")
        daemon.end()
        with pytest.raises(NotRunning, match="ended"):
            handle.result()


def test_a_command_never_reaches_a_later_daemon(directory: RunDirectory) -> None:
    with FakeDaemon(directory, applies_at_once) as first, Client(directory.path, timeout_s=1) as client:
        client.status()
        first.end()
        with FakeDaemon(directory, applies_at_once) as second:
            with pytest.raises(NotRunning):
                client.stop(1)
            with Client(directory.path) as fresh:
                assert fresh.status() == a_status()
            assert second.received == [StatusGet()]


def nothing_there(path: Path) -> None:
    """An empty run directory."""


def dead_sockets(path: Path) -> None:
    """What kill -9 leaves."""
    for name in ("control", "events"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path / f"{name}.sock"))


@pytest.mark.parametrize("leave", [nothing_there, dead_sockets])
def test_no_daemon_is_said_at_once(directory: RunDirectory, leave: Callable[[Path], None]) -> None:
    leave(directory.path)
    began = time.monotonic()
    with pytest.raises(NotRunning, match=r"no daemon runs in .*orchestrator start"):
        Client(directory.path, timeout_s=30)
    assert time.monotonic() - began < 5


def test_a_frozen_daemon_is_said_after_the_deadline(directory: RunDirectory) -> None:
    """Its kernel still takes connections; nobody shakes hands."""
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as events:
        for name, listener in (("control", control), ("events", events)):
            listener.bind(str(directory.path / f"{name}.sock"))
            listener.listen(8)
        with pytest.raises(NotRunning, match=r"did not answer within 0\.2 s"):
            Client(directory.path, timeout_s=0.2)


def test_a_client_is_connected_only_when_events_would_reach_it(directory: RunDirectory) -> None:
    """Else the on-air event of its first prompt could pass before its subscription."""
    with (
        zmq.Context() as context,
        closing(Gateway(context, directory.address("control"))),
        socket.socket(socket.AF_UNIX) as events,
    ):
        events.bind(str(directory.path / "events.sock"))
        events.listen(8)
        with pytest.raises(NotRunning, match="did not answer"), Client(directory.path, timeout_s=0.2):
            pass


def test_a_silent_daemon_is_said_after_the_deadline(directory: RunDirectory) -> None:
    with (
        FakeDaemon(directory, lambda _: []),
        Client(directory.path, timeout_s=0.2) as client,
        pytest.raises(NotRunning, match=r"did not answer within 0\.2 s"),
    ):
        client.status()


def test_another_protocol_version_is_refused(directory: RunDirectory) -> None:
    with (
        FakeDaemon(directory, applies_at_once, version=2),
        Client(directory.path) as client,
        pytest.raises(ProtocolError, match="protocol 2"),
    ):
        client.status()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", None),
        (" \n", None),
        ("a\0b", None),
        ("\ud800", None),
        ("x" * 20_001, None),
        ("🦊" * 20_000, None),
        ("a fox", -1),
        ("a fox", 2**63),
    ],
)
def test_prompts_that_no_daemon_takes_are_not_sent(directory: RunDirectory, text: str, at: int | None) -> None:
    with FakeDaemon(directory, applies_at_once) as daemon, Client(directory.path) as client:
        with pytest.raises(Refused):
            client.prompt(text, at)
        assert client.status() == a_status(), "the connection still works"
        assert daemon.received == [StatusGet()]


def test_asyncio_tasks_share_a_client(directory: RunDirectory) -> None:
    async def one(client: AsyncClient, block: int) -> tuple[int, float]:
        handle = await client.prompt(f"prompt {block}", at=block)
        applied = await handle.result(5)
        assert isinstance(applied, Applied)
        return applied.block, (await handle.on_air(5)).ms

    async def all_of_them() -> None:
        async with AsyncClient(directory.path) as client:
            results = await asyncio.gather(*(one(client, block) for block in range(1, 30)))
            assert results == [(block, 812.0) for block in range(1, 30)]
            assert await client.status() == a_status()
            assert (await client.stop(5)).frames == 480

    with FakeDaemon(directory, applies_at_once):
        asyncio.run(all_of_them())


def test_asyncio_events_end_with_the_deadline_and_with_the_daemon(directory: RunDirectory) -> None:
    async def listen(daemon: FakeDaemon) -> None:
        async with AsyncClient(directory.path) as client:
            events = await client.events(timeout_s=0.3)
            daemon.publish(Discontinuity(block=1, reason="restart"))
            assert [event async for event in events] == [Discontinuity(block=1, reason="restart")]
            endless = await client.events()
            await asyncio.to_thread(daemon.end)
            assert [event async for event in endless] == []

    with FakeDaemon(directory, applies_at_once) as daemon:
        asyncio.run(listen(daemon))


def test_asyncio_notices_refusal_silence_and_the_end(directory: RunDirectory) -> None:
    def script(command: Message) -> list[Message]:
        if isinstance(command, StatusGet):
            return []
        return [Accepted(version=0)] if command == PromptSet(text="wait") else [Rejected(code="busy", text="later")]

    async def ask(daemon: FakeDaemon) -> None:
        async with AsyncClient(directory.path, timeout_s=0.3) as client:
            with pytest.raises(Refused, match="later"):
                await client.prompt("a fox")
            with pytest.raises(NotRunning, match="did not answer"):
                await client.status()
            handle = await client.prompt("wait")
            with pytest.raises(TimeoutError):
                await handle.result(0.05)
            await asyncio.to_thread(daemon.end)
            with pytest.raises(NotRunning, match="ended"):
                await handle.result()
            with pytest.raises(NotRunning, match="ended"):
                await client.status()

    with FakeDaemon(directory, script) as daemon:
        asyncio.run(ask(daemon))


def test_asyncio_without_a_daemon(directory: RunDirectory) -> None:
    async def connect() -> None:
        async with AsyncClient(directory.path):
            raise AssertionError("connected to nothing")

    with pytest.raises(NotRunning, match="no daemon runs"):
        asyncio.run(connect())
