"""Sides that are measured in turn: in which order, how often, and what a machine that drifts does to their ratio."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest

from ipc.errors import InputError
from orchestrator.bench.compare import METRICS, Contender, Contest, compare, identity
from orchestrator.bench.report import Comparison
from orchestrator.bench.runs import Subject

Round = Callable[[str], float]


def quiet(line: str) -> None:
    """Nobody is told."""


def side(name: str, ms: Round, identity: str | None = None) -> Contender:
    """One whose rounds are of blocks that all take what `ms` says then."""
    return Contender(name, (), identity or name, lambda: dict.fromkeys(METRICS, [ms(name)] * 5))


def last(rounds: Iterator[tuple[Comparison, ...]]) -> tuple[Comparison, ...]:
    *_, found = rounds
    return found


def drifting(share: float) -> Round:
    """A machine on which every run takes that much longer than the one before."""
    number = itertools.count()
    return lambda name: 100.0 * math.exp(share * next(number))


@pytest.mark.parametrize("rounds", [2, 3, 4, 7])
def test_a_machine_that_grows_slower_favours_none(rounds: int) -> None:
    """Always in one order, the second of equal sides would be the slower one by a drift, surely: no interval is short
    enough to hold 1 where every round says the same."""
    ms = drifting(0.02)
    (found,) = last(compare([Contest("equal", [side("a", ms), side("b", ms)], rounds)], 0, quiet))
    interval = found.ratios["block"]["b"]
    assert interval.low <= 1.0 <= interval.high
    assert abs(math.log(interval.value)) <= 0.02 / rounds + 1e-9


def test_every_second_round_is_in_the_reverse_order() -> None:
    order: list[str] = []

    def measured(name: str) -> float:
        order.append(name)
        return 1.0

    contest = Contest("three", [side(name, measured) for name in "abc"], 3)
    said = [comparisons[0].rounds for comparisons in compare([contest], 0, quiet)]
    assert "".join(order) == "abccbaabc"
    assert said == [1, 2, 3]


def test_what_several_contests_compare_is_measured_once_a_round() -> None:
    """And what is equal within one as often as it is there, for it is that difference which is asked for."""
    order: list[str] = []

    def measured(name: str) -> float:
        order.append(name)
        return {"plain": 30.0, "fast": 10.0}.get(name, 20.0)

    plain, fast = side("plain", measured), side("fast", measured)
    contests = [
        Contest("long", [plain, fast], 2),
        Contest("short", [side("the same as fast", measured, "fast"), side("other", measured), plain], 1),
        Contest("equal", [fast, side("again", measured, "fast")], 1),
    ]
    long, short, equal = last(compare(contests, 0, quiet))
    assert order == ["plain", "fast", "other", "again", "fast", "plain"]
    assert [comparison.rounds for comparison in (long, short, equal)] == [2, 1, 1]
    assert long.ratios["block"]["fast"].value == pytest.approx(3.0)
    assert short.ratios["block"]["other"].value == pytest.approx(0.5)
    assert short.ratios["block"]["plain"].value == pytest.approx(1 / 3)
    assert equal.ratios["block"]["again"].value == pytest.approx(0.5)


def test_a_contest_needs_two_names() -> None:
    with pytest.raises(InputError, match="found sides a, a, expected two or more with names of their own"):
        Contest("", [side("a", drifting(0)), side("a", drifting(0))], 1)


def test_the_name_of_a_preset_tells_nothing_apart() -> None:
    """`pocket` is `balanced` written out; with a target the preset is where the changes begin."""
    pocket = Subject("pocket")
    assert identity(pocket) == identity(pocket.with_settings("preset=balanced"))
    assert identity(pocket) != identity(pocket.with_settings("preset=quality"))
    target = pocket.with_settings("adaptive.target_rtf=1.2")
    assert identity(target.with_settings("preset=balanced")) != identity(target.with_settings("preset=quality"))
