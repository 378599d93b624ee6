"""What a long run comes to: flat memory, times of blocks with and without a switch, gaps, and the checks.

Pure functions of numbers; knows no process, clock or GPU.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression, median

from orchestrator.bench.recording import Recording
from orchestrator.bench.report import BlockRow, Distribution, SwitchSample
from orchestrator.bench.statistics import distribution
from orchestrator.bench.steady import span_ms

MIB = 2**20
JUDGED_S = 60.0
"""Span from which on a series of memory is judged; a shorter one says too little of a slope."""
GROWTH_BYTES = 64 * MIB
GROWTH_SHARE = 0.01
"""Growth over a whole series up to which it counts as flat, whichever of the two is more."""
RETURN_SHARE = 0.02
"""How far memory may be from where it was before a worker was killed, or before the run."""


@dataclass(frozen=True)
class Flatness:
    """A series of bytes over time; `growth_bytes` is the slope of its least squares line times its span."""

    span_s: float
    mean_bytes: float
    min_bytes: float
    max_bytes: float
    slope_bytes_a_second: float

    @property
    def spread_bytes(self) -> float:
        return self.max_bytes - self.min_bytes

    @property
    def growth_bytes(self) -> float:
        return self.slope_bytes_a_second * self.span_s

    @property
    def flat(self) -> bool | None:
        """None where it is too short to say."""
        if self.span_s < JUDGED_S:
            return None
        return self.growth_bytes <= max(GROWTH_BYTES, GROWTH_SHARE * self.mean_bytes)


@dataclass(frozen=True)
class Killed:
    """A worker that was ended with SIGKILL, and what became of it.

    Attributes:
        ready_s: until its heir was ready, of the process of another number.
        on_air_s: until a prompt that was sent right after was on air.
        gap_s: the longest wait for a frame at the sinks meanwhile.
        before_bytes, after_bytes: memory in use on all GPUs; None without one.
    """

    worker: str
    ready_s: float
    on_air_s: float
    gap_s: float
    before_bytes: int | None
    after_bytes: int | None


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `passed` is None where it could not be judged, and `text` says why."""

    name: str
    passed: bool | None
    text: str


def flatness(at_s: Sequence[float], held: Sequence[float]) -> Flatness | None:
    """Of a series in the order of time; None for fewer than two moments."""
    if len(at_s) < 2:
        return None
    slope = linear_regression(at_s, held).slope
    return Flatness(at_s[-1] - at_s[0], fmean(held), min(held), max(held), slope)


def longest_gap_s(stamps: Iterable[int], began_ns: int, ended_ns: int) -> float:
    """The longest time between neighbours of which the later came within a span, the span's end counted as one."""
    known = sorted(stamps)
    before = [stamp for stamp in known if stamp < began_ns][-1:]
    within = [stamp for stamp in known if began_ns <= stamp <= ended_ns]
    moments = [*(before or [began_ns]), *within, ended_ns]
    return max(b - a for a, b in itertools.pairwise(moments)) / 1e9


def block_times(rows: Sequence[BlockRow], recording: Recording) -> dict[str, dict[str, Distribution]]:
    """Milliseconds of a block, `plain` and with a `switch` apart.

    `denoiser` and `vae_decoder` are the host's, from taking a block to having it done, `… device` what two CUDA events
    around the work say; `interval` is between the last frames of two blocks at the sinks.
    """
    device = {(t.stage, t.block): t.device_ms for t in recording.blocks if t.device_ms is not None}
    found: dict[str, dict[str, list[float]]] = {"plain": {}, "switch": {}}
    for before, row in itertools.pairwise(rows):
        if row.block != before.block + 1:
            continue
        times = found["plain" if row.version == before.version else "switch"]
        for stage in ("denoiser", "vae_decoder"):
            times.setdefault(stage, []).append(span_ms(row, stage, stage))
            if (stage, row.block) in device:
                times.setdefault(f"{stage} device", []).append(device[stage, row.block])
        times.setdefault("interval", []).append((row.spans["output"][1] - before.spans["output"][1]) / 1e6)
    return {
        kind: {name: summary for name, values in times.items() if (summary := distribution(values)) is not None}
        for kind, times in found.items()
    }


def without_wait_ms(sample: SwitchSample) -> float:
    """From the accepted command to the first frame at the sinks, without the wait for the block's boundary.

    Parts are those of `orchestrator bench switch`. A stream that is not paced shows a frame as it leaves the VAE.
    """
    return sum(ms for part, ms in sample.parts.items() if part != "wait")


def switch_times(samples: Sequence[SwitchSample]) -> dict[str, tuple[float, float]]:
    """Median and worst in milliseconds: whole, without the wait, that for cached prompts and new ones, and by part."""
    series = {
        "accepted to sinks": [sample.ms for sample in samples],
        "without the wait": [without_wait_ms(sample) for sample in samples],
        "of these, cached": [without_wait_ms(sample) for sample in samples if sample.cached],
        "of these, new": [without_wait_ms(sample) for sample in samples if not sample.cached],
    }
    for part in samples[0].parts if samples else ():
        series[f"part: {part}"] = [sample.parts[part] for sample in samples]
    return {name: (median(values), max(values)) for name, values in series.items() if values}


def returned(before: int, after: int) -> bool:
    """Whether memory is where it was, or lower."""
    return after <= before * (1 + RETURN_SHARE)


def memory_checks(series: Mapping[str, Flatness]) -> list[Check]:
    """One for each series; too short ones are told and not judged."""
    return [
        Check(
            f"flat memory: {name}",
            flat.flat,
            f"grows {flat.growth_bytes / MIB:+.1f} MiB over {flat.span_s:.0f} s, from most to least"
            f" {flat.spread_bytes / MIB:.1f} MiB" + ("" if flat.flat is not None else "; too short to judge"),
        )
        for name, flat in series.items()
    ]


def kill_check(killed: Killed) -> Check:
    """A worker that is back; whoever is not never gets here."""
    text = f"ready after {killed.ready_s:.1f} s, prompt on air after {killed.on_air_s:.1f} s, gap {killed.gap_s:.1f} s"
    name = f"recovery: {killed.worker}"
    if killed.before_bytes is None or killed.after_bytes is None:
        return Check(name, True, f"{text}; no GPU")
    change = 100 * (killed.after_bytes / max(1, killed.before_bytes) - 1)
    return Check(name, returned(killed.before_bytes, killed.after_bytes), f"{text}; GPU memory {change:+.1f} %")


def file_check(played: int, counted: int | None, where: str) -> Check:
    """Every frame that was played is in the file."""
    if counted is None:
        return Check("frames written", None, f"{played} played; {where}")
    return Check("frames written", played == counted and played > 0, f"{played} played, {counted} in {where}")


def left_checks(alive: Sequence[str], before: int | None, after: int | None) -> list[Check]:
    """Nothing of the run is left, in the table of processes and on GPUs."""
    processes = Check("no process left", not alive, ", ".join(alive) or "none")
    if before is None or after is None:
        return [processes, Check("no GPU memory left", None, "no GPU")]
    more = after - before
    text = f"{more / MIB:+.1f} MiB against before the run"
    return [processes, Check("no GPU memory left", more <= GROWTH_BYTES, text)]


def failed(checks: Iterable[Check]) -> list[str]:
    """Names of those that do not hold; what could not be judged does not fail."""
    return [check.name for check in checks if check.passed is False]
