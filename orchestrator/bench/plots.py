"""Plots as SVG text, drawn by hand so that a report needs nothing beside it. Pure; knows numbers and no report."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 860, 280
LEFT, RIGHT, TOP, BOTTOM = 80, 180, 30, 40
"""Margins; names of lines stand in the right one."""
COLOURS = ("#3366cc", "#dc7a1e", "#2e9b57", "#a23fb0", "#c03945", "#5b6b7a", "#8a6d1f", "#17888f")
MOST_POINTS = 1500
"""Points of a line; of more, the least and the largest of each stretch are drawn."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Where a value lies between two pixels."""

    low: float
    high: float
    from_px: float
    to_px: float
    log: bool = False
    ticked: bool = True

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.from_px + share * (self.to_px - self.from_px)

    @property
    def ticks(self) -> list[float]:
        """Round numbers, if any are wanted: powers of ten, or some four to eight steps of 1, 2 or 5."""
        if not self.ticked:
            return []
        if self.log:
            return [10.0**n for n in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]
        step = _round_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def histogram(values: Sequence[float], title: str, unit: str, marks: Mapping[str, float]) -> str:
    """How often which value came; `marks` are vertical lines, such as percentiles."""
    low, high = min(values), max([*values, *marks.values()])
    count = min(60, max(10, round(math.sqrt(len(values)) * 2)))
    width = (high - low) / count or 1.0
    bins = [0] * count
    for value in values:
        bins[min(int((value - low) / width), count - 1)] += 1
    x, y = _x(low, low + count * width), _y(0, max(bins))
    bars = [
        f'<rect x="{x.at(low + i * width):.1f}" y="{y.at(n):.1f}" fill="{COLOURS[0]}"'
        f' width="{max(0.5, x.at(low + (i + 1) * width) - x.at(low + i * width) - 0.5):.1f}"'
        f' height="{y.at(0) - y.at(n):.1f}"/>'
        for i, n in enumerate(bins)
        if n
    ]
    lines = [
        _mark(x, value, f"{name} {_short(round(value, 1))}", level) for level, (name, value) in enumerate(marks.items())
    ]
    return _picture(title, x, y, unit, "blocks", [*bars, *lines])


def lines(
    series: Mapping[str, Points],
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[float] = (),
) -> str:
    """A line for each series above zero; `marks` are places on the x axis, such as blocks with a prompt switch."""
    points = [point for line in series.values() for point in line]
    xs, ys = [a for a, _ in points], [b for _, b in points]
    x, y = _x(min(xs), max(xs)), _y(0, max(ys) * 1.05 or 1.0)
    drawn = [
        f'<line class="mark" x1="{x.at(m):.1f}" x2="{x.at(m):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for m in marks
    ]
    for number, line in enumerate(series.values()):
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in _thinned(line))
        drawn.append(f'<polyline fill="none" stroke="{_colour(number)}" stroke-width="1.3" points="{path}"/>')
        if len(line) <= 20:
            drawn += [
                f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5" fill="{_colour(number)}"/>' for a, b in line
            ]
    return _picture(title, x, y, x_label, y_label, drawn, list(series))


def bars(values: Mapping[str, float], title: str, y_label: str) -> str:
    """A bar for each name, from zero, with its value on it."""
    x, y = _x(0, len(values)), _y(0, max(values.values()) * 1.1 or 1.0)
    wide = (x.at(1) - x.at(0)) * 0.6
    drawn = []
    for number, (name, value) in enumerate(values.items()):
        middle, top = x.at(number + 0.5), y.at(value)
        drawn.append(
            f'<rect x="{middle - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{y.at(0) - top:.1f}"'
            f' fill="{COLOURS[0]}"/>'
            f'<text class="tick" x="{middle:.1f}" y="{top - 4:.1f}" text-anchor="middle">'
            f"{_short(round(value, 1))}</text>"
            f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(name)}</text>'
        )
    return _picture(title, replace(x, ticked=False), y, "", y_label, drawn)


def gantt(spans: Mapping[str, Sequence[tuple[float, float, str]]], title: str) -> str:
    """A lane for each name with spans (from, to, label) in milliseconds."""
    every = [span for lane in spans.values() for span in lane]
    x = _x(min(begin for begin, _, _ in every), max(end for _, end, _ in every))
    height = (HEIGHT - TOP - BOTTOM) / len(spans)
    drawn = []
    for lane, (name, pieces) in enumerate(spans.items()):
        top = TOP + lane * height
        drawn.append(
            f'<text class="tick" x="{LEFT - 4}" y="{top + height / 2:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        for number, (begin, end, label) in enumerate(pieces):
            at, wide = x.at(begin), max(1.0, x.at(end) - x.at(begin))
            fill = _colour(lane)
            drawn.append(
                f'<rect x="{at:.1f}" y="{top + 4:.1f}" width="{wide:.1f}" height="{height - 8:.1f}" fill="{fill}"'
                f' fill-opacity="{0.9 if number % 2 else 0.65}">'
                f"<title>{escape(label)}: {end - begin:.1f} ms</title></rect>"
            )
            if wide > 24:
                drawn.append(f'<text class="on" x="{at + 3:.1f}" y="{top + height / 2 + 4:.1f}">{escape(label)}</text>')
    return _picture(title, x, None, "ms", "", drawn)


def roof(
    ceilings: Mapping[str, float], bytes_per_s: float, stages: Mapping[str, tuple[float, float]], title: str
) -> str:
    """Ceilings in operations a second over intensity; each stage at (operations a byte, operations a second)."""
    intensities = [place for place, _ in stages.values()]
    balance = max(ceilings.values()) / bytes_per_s
    x = _x(min([*intensities, balance]) / 10, max([*intensities, balance]) * 10, log=True)
    reached = [rate for _, rate in stages.values()]
    y = _y(min([*reached, x.low * bytes_per_s]) / 2, max(ceilings.values()) * 2, log=True)
    drawn, names = [], []
    for number, (name, rate) in enumerate(ceilings.items()):
        corner = rate / bytes_per_s
        path = [(x.low, x.low * bytes_per_s), (corner, rate), (x.high, rate)]
        points = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in path)
        drawn.append(f'<polyline fill="none" stroke="{_colour(number)}" stroke-width="1.5" points="{points}"/>')
        names.append(f"limit, {name}")
    for number, (name, (place, rate)) in enumerate(stages.items(), start=len(ceilings)):
        drawn.append(f'<circle cx="{x.at(place):.1f}" cy="{y.at(rate):.1f}" r="5" fill="{_colour(number)}"/>')
        names.append(name)
    return _picture(title, x, y, "floating point operations a byte", "FLOP/s", drawn, names)


def intervals(values: Mapping[str, tuple[float, float, float]], title: str, label: str) -> str:
    """Value, low and high of each name as a point with whiskers; a line at 1."""
    x = _x(
        min(1.0, *(low for _, low, _ in values.values())) * 0.95,
        max(1.0, *(high for *_, high in values.values())) * 1.05,
    )
    height = (HEIGHT - TOP - BOTTOM) / len(values)
    drawn = [_mark(x, 1.0, "", 0)]
    for lane, (name, (value, low, high)) in enumerate(values.items()):
        y = TOP + (lane + 0.5) * height
        drawn.append(
            f'<line x1="{x.at(low):.1f}" x2="{x.at(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{COLOURS[0]}"'
            f' stroke-width="2"/><circle cx="{x.at(value):.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>'
            f'<text class="tick" x="{LEFT + 4}" y="{y - 6:.1f}">'
            f"{escape(name)}: {value:.2f} [{low:.2f}, {high:.2f}]</text>"
        )
    return _picture(title, x, None, label, "", drawn)


def _picture(
    title: str, x: Axis, y: Axis | None, x_label: str, y_label: str, drawn: Sequence[str], names: Sequence[str] = ()
) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
    ]
    for tick in x.ticks:
        parts.append(
            f'<text class="tick" x="{x.at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>'
        )
    if y is not None:
        parts.append(f'<text class="tick" x="{LEFT - 74}" y="{TOP - 4}">{escape(y_label)}</text>')
        for tick in y.ticks:
            at = y.at(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    parts += drawn
    for number, name in enumerate(names):
        place = f'x="{WIDTH - RIGHT + 8}" y="{TOP + 12 + 14 * number}"'
        parts.append(f'<text class="tick" {place} style="fill:{_colour(number)}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _mark(x: Axis, value: float, text: str, level: int) -> str:
    at = x.at(value)
    label = f'<text class="tick" x="{at + 3:.1f}" y="{TOP + 10 + 12 * level}">{escape(text)}</text>' if text else ""
    return f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{label}'


def _thinned(line: Points) -> Points:
    """At most `MOST_POINTS`, none of the peaks lost."""
    if len(line) <= MOST_POINTS:
        return line
    size = math.ceil(2 * len(line) / MOST_POINTS)
    height: Callable[[tuple[float, float]], float] = lambda point: point[1]  # noqa: E731
    kept = []
    for begin in range(0, len(line), size):
        piece = line[begin : begin + size]
        kept += sorted({min(piece, key=height), max(piece, key=height)})
    return kept


def _x(low: float, high: float, log: bool = False) -> Axis:
    return Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT, log)


def _y(low: float, high: float, log: bool = False) -> Axis:
    return Axis(low, high if high > low else low + 1, HEIGHT - BOTTOM, TOP, log)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if letter == 'k' else size):g}{letter}"
    return f"{round(value, 6):g}"
