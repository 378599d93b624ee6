"""What is said of a series of measurements: percentiles, jitter, misses, trends, ratios with their intervals.

Pure functions of numbers; knows no stage, clock or file. Everything that draws is given a seed.
"""

import itertools
import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from statistics import NormalDist, fmean, median, stdev

from orchestrator.bench.report import Distribution, Interval, Misses, Trend

RESAMPLES = 1000
STRETCH = 8
"""Blocks that a bootstrap keeps together: neighbours resemble each other, and drawn one by one they would not."""
LEAK_BYTES = 32 * 1024
"""Growth a block below which nothing is called a leak: 3.5 GiB in a day of blocks that play 0.75 s each."""
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)
"""Student's t at 0.975 for 1, 2, ... 16 degrees of freedom. It falls to 1.96, so the last is a little wide for more."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """A percentile of rising numbers, linear between neighbours (type 7 of Hyndman and Fan 1996)."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(values: Sequence[float]) -> Distribution | None:
    """Summary of a series in the order of time; None where there is none.

    Jitter is the mean difference of neighbours, as RFC 3550 section 6.4.1 means it before smoothing.
    """
    if not values:
        return None
    ordered = sorted(values)
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    return Distribution(
        count=len(values),
        mean=fmean(values),
        p50=percentile(ordered, 0.5),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        p999=percentile(ordered, 0.999),
        max=ordered[-1],
        min=ordered[0],
        jitter=fmean(steps) if steps else 0.0,
    )


def misses(block_ms: Sequence[float], frames: int, rates: Sequence[int] = (16, 25)) -> list[Misses]:
    """How many blocks took longer than the time their `frames` play, at each rate of frames a second."""
    found = []
    for fps in rates:
        deadline = 1000 * frames / fps
        ordered = sorted(block_ms)
        late = len(ordered) - bisect_left(ordered, math.nextafter(deadline, math.inf))
        found.append(Misses(fps=fps, deadline_ms=deadline, missed=late, of=len(ordered)))
    return found


def trend(values: Sequence[float], positions: Sequence[float] | None = None) -> Trend | None:
    """Least squares line through a series, with an error that allows for neighbours that resemble each other.

    The number of independent measurements is taken as n (1 - r) / (1 + r), r the residuals' correlation at lag 1
    (Santer et al. 2000). A leak is a slope that is both sure and worth the name. None for fewer than 8 values.

    Args:
        values: bytes.
        positions: blocks, else 0, 1, ...
    """
    n = len(values)
    if n < 8:
        return None
    x = list(map(float, range(n))) if positions is None else list(positions)
    middle, mean = fmean(x), fmean(values)
    spread = sum((a - middle) ** 2 for a in x)
    slope = sum((a - middle) * (v - mean) for a, v in zip(x, values, strict=True)) / spread
    rest = [v - mean - slope * (a - middle) for a, v in zip(x, values, strict=True)]
    power = sum(r * r for r in rest)
    lag = sum(a * b for a, b in itertools.pairwise(rest)) / power if power > 0 else 0.0
    lag = min(max(lag, 0.0), 1 - 4 / n)
    independent = max(3.0, n * (1 - lag) / (1 + lag))
    error = math.sqrt(power / (independent - 2) / spread)
    quantile = _t_975(int(independent) - 2)
    low = slope - quantile * error
    return Trend(bytes_a_block=slope, low=low, high=slope + quantile * error, leak=low > 0 and slope > LEAK_BYTES)


def ratio(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """How many times as long A takes as B, with a bootstrap 95 % interval; above 1, B is the faster one.

    Round i of A and of B were measured one after the other, so rounds are drawn in pairs, and within a round stretches
    of blocks. The value is the geometric mean of the rounds' ratios of medians. A percentile interval of few rounds is
    too short: its percentiles are expanded (Hesterberg 2015, section 3.3), and it is never shorter than Student's.
    """
    draw = random.Random(seed)
    logs = [math.log(median(x) / median(y)) for x, y in zip(a, b, strict=True)]
    point, rounds = fmean(logs), len(logs)
    drawn = sorted(_resampled(a, b, draw) for _ in range(resamples))
    share = _expanded(rounds)
    margin = _t_975(rounds - 1) * stdev(logs) / math.sqrt(rounds) if rounds > 1 else 0.0
    low = min(percentile(drawn, share), point - margin)
    high = max(percentile(drawn, 1 - share), point + margin)
    return Interval(value=math.exp(point), low=math.exp(low), high=math.exp(high))


def _resampled(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], draw: random.Random) -> float:
    logs = []
    for _ in a:
        index = draw.randrange(len(a))
        logs.append(math.log(median(_stretches(a[index], draw)) / median(_stretches(b[index], draw))))
    return fmean(logs)


def _stretches(values: Sequence[float], draw: random.Random) -> list[float]:
    """As many values, drawn in stretches of neighbours, the last followed by the first (Politis and Romano 1992)."""
    n, length = len(values), min(STRETCH, max(1, len(values) // 4))
    drawn: list[float] = []
    while len(drawn) < n:
        start = draw.randrange(n)
        drawn += [values[(start + i) % n] for i in range(length)]
    return drawn[:n]


def _expanded(n: int) -> float:
    """The lower percentile that gives 95 % for n independent measurements."""
    if n < 2:
        return 0.025
    return NormalDist().cdf(-_t_975(n - 1) * math.sqrt(n / (n - 1)))


def _t_975(freedom: int) -> float:
    """For 0 degrees of freedom that of 1, for more than 16 that of 16."""
    return T_975[min(max(freedom, 1), len(T_975)) - 1]
