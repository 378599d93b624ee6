"""The output stage with told time: order, limits, versions, credits, and an end that comes exactly once."""

import hashlib
from collections import deque
from collections.abc import Callable

import pytest

from configs.load import load_config
from configs.schema import RuntimeConfig
from ipc.messages import Credit, Drained, EndOfStream, FramesReady, Message, PlayoutReport, SinkStatus, VersionPlayed
from workers.output import OutputStage
from workers.playout import NS, UNLIMITED

SIZE = 16 * 16 * 3


class Reader:
    """Frames that the test puts in; a frame's bytes are its number."""

    def __init__(self) -> None:
        self.waiting: deque[FramesReady] = deque()
        self.released: list[FramesReady] = []

    def put(self, block: int, first: int, count: int, version: int = 0) -> None:
        self.waiting.append(
            FramesReady(
                ring="frames", epoch=1, slot=0, block=block, version=version, first_frame=first, count=count, sent_ns=0
            )
        )

    def block(self, block: int, version: int = 0) -> None:
        """A whole block, latent frame by latent frame."""
        for latent in range(block * 3, block * 3 + 3):
            self.put(block, 0 if latent == 0 else 4 * latent - 3, 1 if latent == 0 else 4, version)

    def take(self) -> tuple[FramesReady, FramesReady] | None:
        if not self.waiting:
            return None
        message = self.waiting.popleft()
        return message, message

    def view(self, token: FramesReady) -> memoryview:
        return memoryview(b"".join(picture(token.first_frame + i) for i in range(4)))

    def release(self, token: FramesReady) -> None:
        self.released.append(token)


class Sink:
    """Keeps what it is offered."""

    def __init__(self, live: bool = False, lossless: bool = False) -> None:
        self.live, self.lossless = live, lossless
        self.frames: list[int] = []
        self.room = True
        self.done = False

    def has_room(self) -> bool:
        return self.room

    def offer(self, frame: bytes) -> None:
        self.frames.append(frame[0])

    def finish(self) -> None:
        self.done = True

    def abort(self) -> None:
        self.done = True

    def status(self) -> SinkStatus:
        return SinkStatus(target="test", state="open", frames=len(self.frames), dropped=0)


def picture(number: int) -> bytes:
    return bytes([number % 256]) * SIZE


class Bench:
    """A stage, its time, and what it said."""

    def __init__(self, pace: str, limit: int | None = None, sinks: tuple[Sink, ...] = ()) -> None:
        config: RuntimeConfig = load_config("pocket", ["video.height=16", "video.width=16", f"output.pace={pace}"])
        self.now = 0
        self.reader = Reader()
        self.said: list[Message] = []
        self.credits: list[int] = []
        self.sinks = list(sinks) or [Sink()]
        self.stage = OutputStage(config, self.reader, self.said.append, self._credit, limit, clock=lambda: self.now)
        self.stage._sinks = list(self.sinks)

    def _credit(self, message: Message) -> None:
        assert isinstance(message, Credit)
        self.credits.append(message.block)

    def work(self) -> None:
        while self.stage.process():
            pass

    def run(self, seconds: float, step_s: float = 0.005) -> None:
        """Lets time pass."""
        for _ in range(round(seconds / step_s)):
            self.now += int(step_s * NS)
            self.work()

    def heard(self, kind: type[Message]) -> list:
        return [message for message in self.said if isinstance(message, kind)]


def test_free_pace_plays_all_in_order_and_ends_once() -> None:
    bench = Bench("free")
    for block in range(3):
        bench.reader.block(block)
    bench.work()
    bench.stage.receive(EndOfStream(blocks=3))
    bench.run(0.1)
    assert bench.sinks[0].frames == list(range(33))
    assert len(bench.reader.released) == 9
    (drained,) = bench.heard(Drained)
    expected = hashlib.sha256(b"".join(picture(number) for number in range(33))).hexdigest()
    assert (drained.frames, drained.sha256) == (33, expected)
    assert bench.credits[0] == UNLIMITED


def test_live_pace_plays_at_sixteen_frames_a_second() -> None:
    bench = Bench("live")
    bench.reader.block(0)
    bench.reader.block(1)
    bench.run(0.5)
    assert len(bench.sinks[0].frames) == 8
    bench.run(0.5)
    assert len(bench.sinks[0].frames) == 16


def test_the_limit_is_exact_and_surplus_is_released() -> None:
    bench = Bench("free", limit=12)
    bench.reader.block(0)
    bench.reader.block(1)
    bench.run(0.1)
    assert bench.sinks[0].frames == list(range(12))
    assert [drained.frames for drained in bench.heard(Drained)] == [12]
    assert len(bench.reader.released) == 6


def test_a_limited_live_run_keeps_its_pace_to_the_end() -> None:
    bench = Bench("live", limit=21)
    bench.reader.block(0)
    bench.reader.block(1)
    bench.work()
    bench.stage.receive(EndOfStream(blocks=2))
    bench.run(1.0)
    assert len(bench.sinks[0].frames) < 21
    assert not bench.heard(Drained)
    bench.run(0.5)
    assert len(bench.sinks[0].frames) == 21
    assert len(bench.heard(Drained)) == 1


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_run_that_somebody_ends_plays_the_rest_at_once(limit: int | None) -> None:
    bench = Bench("live", limit=limit)
    bench.reader.block(0)
    bench.reader.block(1)
    bench.work()
    bench.stage.receive(EndOfStream(blocks=2))
    bench.run(0.05)
    assert len(bench.sinks[0].frames) == 21
    assert bench.heard(Drained)[0].frames == 21


def test_the_first_frame_of_a_version_is_told() -> None:
    bench = Bench("free")
    bench.reader.block(0)
    bench.reader.block(1, version=4)
    bench.reader.block(2, version=4)
    bench.work()
    told = [(m.version, m.block, m.frame) for m in bench.heard(VersionPlayed)]
    assert told == [(0, 0, 0), (4, 1, 9)]


def test_frames_that_come_again_are_passed_over() -> None:
    """After a restart a block may be decoded twice."""
    bench = Bench("free")
    for block in (0, 1, 1, 2):
        bench.reader.block(block)
    bench.work()
    assert bench.sinks[0].frames == list(range(33))


def test_a_gap_is_played_over() -> None:
    bench = Bench("free")
    bench.reader.block(0)
    bench.reader.block(2)
    bench.work()
    bench.stage.receive(EndOfStream(blocks=3))
    bench.run(0.05)
    assert bench.sinks[0].frames == [*range(9), *range(21, 33)]
    assert len(bench.heard(Drained)) == 1


def test_a_full_file_holds_free_playout_back() -> None:
    full, other = Sink(lossless=True), Sink()
    bench = Bench("free", sinks=(full, other))
    full.room = False
    bench.reader.block(0)
    bench.run(0.1)
    assert full.frames == other.frames == []
    full.room = True
    bench.work()
    assert full.frames == other.frames == list(range(9))


def test_streams_get_the_last_picture_again_and_files_do_not() -> None:
    """While nothing comes a stream's time goes on; a recording holds real frames alone."""
    file, stream = Sink(), Sink(live=True)
    bench = Bench("live", sinks=(file, stream))
    bench.reader.block(0)
    bench.run(2.0)
    assert file.frames == list(range(9))
    assert stream.frames[:9] == file.frames
    assert len(stream.frames) == pytest.approx(32, abs=3)
    assert set(stream.frames[9:]) == {8}


def test_underruns_are_reported() -> None:
    bench = Bench("live")
    bench.reader.block(0)
    bench.run(2.0)
    bench.reader.block(1)
    bench.run(1.5)
    report = bench.heard(PlayoutReport)[-1]
    assert (report.frames, report.underruns, report.first_frame_ns is not None) == (21, 1, True)


def test_credits_are_said_again() -> None:
    """A lost message costs half a second, not the stream."""
    bench = Bench("live")
    bench.run(2.0)
    assert bench.credits == [1] * len(bench.credits)
    assert 4 <= len(bench.credits) <= 6


def test_the_end_does_not_wait_for_frames_that_never_come() -> None:
    bench = Bench("live")
    bench.stage.receive(EndOfStream(blocks=0))
    bench.run(0.05)
    assert bench.heard(Drained)[0].frames == 0


def test_waiting_ends_before_the_next_frame_is_due() -> None:
    bench = Bench("live")
    bench.reader.block(0)
    bench.work()
    wait: Callable[[], float] = bench.stage.wait_s
    assert 0 < wait() <= 0.05
    bench.now += NS // 16 - NS // 1000
    assert wait() == pytest.approx(0.001, abs=1e-4)
