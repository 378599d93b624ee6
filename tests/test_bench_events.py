"""What stages tell so that they can be measured: when each frame was played, and how long a device worked."""

import pytest
import torch
from test_output import NS, Bench

from ipc.messages import FramesPlayed
from workers import device_timer as timers
from workers.device_timer import EventTimer, HostTimer, device_timer


def test_every_block_that_is_played_is_told_once_with_a_stamp_a_frame() -> None:
    bench = Bench("live")
    for block in range(3):
        bench.reader.block(block, version=block // 2)
    bench.run(3.0)
    told = bench.heard(FramesPlayed)
    assert [(t.block, t.version, t.first_frame, len(t.played_ns)) for t in told] == [
        (0, 0, 0, 9),
        (1, 0, 9, 12),
        (2, 1, 21, 12),
    ]
    stamps = [stamp for t in told for stamp in t.played_ns]
    assert stamps == sorted(stamps)
    assert stamps[-1] - stamps[0] == pytest.approx(32 * NS / 16, abs=0.01 * NS)


def test_a_block_that_lost_its_end_is_not_told() -> None:
    """After a seam its stamps must not count for the next block."""
    bench = Bench("free")
    bench.reader.block(0)
    bench.reader.put(1, 9, 4)
    bench.reader.block(2)
    bench.work()
    assert [(t.block, t.first_frame, len(t.played_ns)) for t in bench.heard(FramesPlayed)] == [(0, 0, 9), (2, 21, 12)]


def test_a_limit_inside_a_block_ends_without_it() -> None:
    bench = Bench("free", limit=11)
    for block in range(2):
        bench.reader.block(block)
    bench.work()
    assert [t.block for t in bench.heard(FramesPlayed)] == [0]


class FakeEvent:
    """Notes what was asked of it."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.stream = None

    def record(self, stream: str) -> None:
        self.log.append(f"record {stream}")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: "FakeEvent") -> float:
        self.log.append("read")
        return 12.5


def test_a_device_is_timed_on_its_own_stream_and_read_when_done(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.log.clear()
    monkeypatch.setattr(timers.torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(timers.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timer = EventTimer(torch.device("cuda:1"))
    timer.begin()
    assert timer.end() == 12.5
    assert FakeEvent.log == ["record stream of cuda:1", "record stream of cuda:1", "wait", "read"]


def test_a_cpu_has_no_clock_but_the_hosts() -> None:
    timer = device_timer(torch.device("cpu"))
    assert isinstance(timer, HostTimer)
    timer.begin()
    assert timer.end() is None
