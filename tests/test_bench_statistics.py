"""What a report says of a series is right: against definitions, and against series whose truth is known."""

import math
import random
import statistics as known

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench import statistics

MIB = 2**20


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    """`quantiles` with 1000 parts, inclusive, is type 7 too."""
    cuts = known.quantiles(values, n=1000, method="inclusive")
    found = statistics.distribution(values)
    assert found is not None
    wanted = {"p50": cuts[499], "p95": cuts[949], "p99": cuts[989], "p999": cuts[998]}
    for name, value in wanted.items():
        assert math.isclose(getattr(found, name), value, rel_tol=1e-9, abs_tol=1e-6), name
    assert found.min <= found.p50 <= found.p95 <= found.p99 <= found.p999 <= found.max


def test_jitter_is_the_mean_step_and_needs_the_order_of_time() -> None:
    steady, alternating = [1.0, 1.0, 3.0, 3.0], [1.0, 3.0, 1.0, 3.0]
    assert statistics.distribution(steady).jitter == pytest.approx(2 / 3)
    assert statistics.distribution(alternating).jitter == 2.0
    assert statistics.distribution([]) is None


def test_a_block_is_late_when_it_takes_longer_than_its_frames_play() -> None:
    """12 frames are 750 ms at 16 fps and 480 ms at 25; exactly that long is in time."""
    found = statistics.misses([480.0, 480.1, 750.0, 750.1], frames=12)
    assert [(m.fps, m.deadline_ms, m.missed, m.of) for m in found] == [(16, 750.0, 1, 4), (25, 480.0, 3, 4)]


def wandering(draw: random.Random, blocks: int, growth: float) -> list[float]:
    """Memory of a worker that grows, with a noise of which each value keeps most of the one before."""
    noise, values = 0.0, []
    for block in range(blocks):
        noise = 0.8 * noise + draw.gauss(0, 2 * MIB)
        values.append(400 * MIB + growth * block + noise)
    return values


def test_a_leak_of_one_mib_a_block_is_reported_and_its_size_is_right() -> None:
    for seed in range(50):
        found = statistics.trend(wandering(random.Random(seed), 100, MIB))
        assert found.leak
        assert found.bytes_a_block == pytest.approx(MIB, rel=0.2)


def test_memory_that_wanders_is_seldom_called_a_leak() -> None:
    """Errors that took neighbours for independent would call a quarter of these leaks."""
    leaks = sum(statistics.trend(wandering(random.Random(seed), 100, 0.0)).leak for seed in range(200))
    assert leaks <= 10


def test_growth_that_is_sure_and_small_is_no_leak() -> None:
    found = statistics.trend([1000.0 * block for block in range(200)])
    assert found.low > 0
    assert not found.leak
    assert statistics.trend([1.0] * 7) is None


def rounds(draw: random.Random, count: int, ms: float) -> list[list[float]]:
    """Runs of the same work: each has a speed of its own, and blocks about it that differ less."""
    speeds = [ms * math.exp(draw.gauss(0, 0.02)) for _ in range(count)]
    return [[speed * math.exp(draw.gauss(0, 0.01)) for _ in range(10)] for speed in speeds]


@pytest.mark.parametrize("count", [3, 5, 7])
def test_intervals_of_equal_sides_hold_one(count: int) -> None:
    """More than 9 of 10; of 200, so that a plain percentile interval, which holds it in 8 or 9, is told apart."""
    held = 0
    for seed in range(200):
        draw = random.Random(seed)
        found = statistics.ratio(rounds(draw, count, 100.0), rounds(draw, count, 100.0), seed, resamples=60)
        held += found.low <= 1.0 <= found.high
    assert held >= 186


def test_a_ratio_says_how_many_times_as_fast_the_second_is() -> None:
    draw = random.Random(1)
    found = statistics.ratio(rounds(draw, 7, 200.0), rounds(draw, 7, 100.0))
    assert found.low <= 2.0 <= found.high
    assert found.value == pytest.approx(2.0, rel=0.05)
    assert found.high / found.low < 1.2


def test_a_pair_that_was_slow_together_does_not_widen_the_interval() -> None:
    """Interleaving is worth its name: a slow minute strikes both sides of a round."""
    a = [[100.0] * 20, [300.0] * 20, [100.0] * 20, [100.0] * 20]
    b = [[value / 2 for value in one] for one in a]
    found = statistics.ratio(a, b)
    assert (found.low, found.value, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_same_seed_gives_the_same_interval() -> None:
    a, b = rounds(random.Random(1), 1, 100.0), rounds(random.Random(2), 1, 100.0)
    assert statistics.ratio(a, b, seed=3) == statistics.ratio(a, b, seed=3)
    assert statistics.ratio(a, b, seed=3) != statistics.ratio(a, b, seed=4)
