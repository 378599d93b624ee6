"""Playout in time and generation not too far ahead: decisions, with told times."""

import pytest

from configs.schema import OutputConfig, StreamConfig, VideoConfig
from workers.playout import NS, UNLIMITED, CreditPolicy, PlayoutClock, Rate

STREAM = StreamConfig()
VIDEO = VideoConfig(height=64, width=64)
MS = 1_000_000


def policy(pace: str = "live") -> CreditPolicy:
    return CreditPolicy(OutputConfig(pace=pace), STREAM, VIDEO)


def test_frames_are_due_at_the_rate_and_do_not_drift() -> None:
    clock = PlayoutClock(16)
    assert clock.due_ns is None
    clock.play(1000)
    for number in range(1, 16 * 3600):
        assert clock.due_ns == 1000 + number * NS // 16
        clock.play(clock.due_ns + 3 * MS)
    assert clock.underruns == 0


def test_a_late_frame_is_one_underrun_and_shifts_what_follows() -> None:
    clock = PlayoutClock(16)
    clock.play(0)
    clock.play(NS)
    assert clock.underruns == 1
    assert clock.due_ns == NS + NS // 16
    clock.play(NS + NS // 16)
    assert clock.underruns == 1


def test_underruns_of_the_first_second_are_told_apart() -> None:
    clock = PlayoutClock(16)
    now = 0
    for number in range(40):
        clock.play(now)
        now = (clock.due_ns or 0) + (NS if number in (3, 30) else 0)
    assert (clock.underruns, clock.underruns_after_first_second) == (2, 1)


def test_jitter_of_less_than_a_frame_is_no_underrun() -> None:
    clock = PlayoutClock(16)
    clock.play(0)
    for _ in range(50):
        clock.play((clock.due_ns or 0) + NS // 17)
    assert clock.underruns == 0


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.fps == 0
    for number in range(200):
        rate.add(number * NS // 10)
    for number in range(200):
        rate.add(20 * NS + number * NS // 30)
    assert rate.fps == pytest.approx(30, rel=0.01)


def test_free_pace_never_waits() -> None:
    assert policy("free").credit == UNLIMITED


def test_serial_pace_begins_a_block_when_the_one_before_is_out() -> None:
    credits = policy("serial")
    assert credits.credit == 0
    credits.arrived(0, 4, 0)
    assert credits.credit == 0
    credits.arrived(0, 8, 0)
    assert credits.credit == 1
    credits.arrived(1, 20, 0)
    assert credits.credit == 2


def test_live_pace_begins_a_block_when_playout_begins_the_one_before() -> None:
    credits = policy()
    assert credits.credit == 1
    seen = []
    for frame in range(40):
        credits.playing(frame, frame * NS // 16)
        seen.append(credits.credit)
    assert seen == [1] * 9 + [2] * 12 + [3] * 12 + [4] * 7


def test_a_slow_pipeline_may_begin_earlier_by_what_is_missing() -> None:
    """Latency 1 s, a block plays 750 ms: with 20 % to spare the next credit comes 450 ms before the block ends."""
    credits = policy()
    credits.playing(9, 0)
    assert credits.credit == 2
    credits.arrived(2, 32, NS)
    early = next(frame for frame in range(9, 21) if (credits.playing(frame, NS), credits.credit)[1] == 3)
    assert (early - 9) / 16 == pytest.approx(0.3, abs=0.07)


def test_never_more_than_two_blocks_ahead() -> None:
    credits = policy()
    for block in range(1, 20):
        frame = STREAM.first_frame(block)
        credits.playing(frame, block * NS)
        credits.arrived(block + 1, STREAM.first_frame(block + 2) - 1, block * NS + 100 * NS)
        credits.playing(frame + 11, block * NS)
        assert credits.credit <= block + 2
