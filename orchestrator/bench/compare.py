"""Sides interleaved in one run, round by round, and their ratios with intervals; ablations are such comparisons."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from configs.load import preset_names
from configs.schema import MODEL_STAGES, RuntimeConfig
from ipc.errors import ConfigError, InputError
from orchestrator.bench.report import Comparison, Side
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.statistics import distribution, ratio
from orchestrator.bench.steady import block_intervals, block_rows, known, stage_times

Times = Mapping[str, Sequence[float]]
"""Milliseconds of each block of one round, by what was timed: `block`, or a stage."""
METRICS = ("block", "denoiser", "vae_decoder")
SETTLE = 4
"""Blocks beyond a full window that are not measured."""


@dataclass(frozen=True)
class Contender:
    """One side: its name, what tells it apart, and a round of it."""

    name: str
    settings: tuple[str, ...]
    measure: Callable[[], Times]


def contender(name: str, subject: Subject, blocks: int) -> Contender:
    """The shipped runtime under a configuration. Raises ConfigError."""
    free = Subject(subject.config, ("output.pace=free", *subject.overrides), subject.environment, subject.program)
    warmup = free.load().stream.window_blocks + SETTLE

    def measure() -> Times:
        rows = [row for row in block_rows(record(free, warmup + blocks)) if row.block >= warmup]
        return {"block": block_intervals(rows), **{stage: stage_times(rows, stage) for stage in METRICS[1:]}}

    return Contender(name, subject.overrides, measure)


def named_subject(text: str, base: Subject) -> Subject:
    """A side as a person writes it: a preset, or a configuration, and behind it changes such as `stream.window=6`.

    Raises:
        InputError: no word, or one that is no change.
    """
    words = text.split()
    if not words or any("=" not in word for word in words[1:]):
        raise InputError(
            f"side {text!r}: expected a preset or configuration and changes, such as 'balanced stream.window=6'"
        )
    if words[0] in preset_names():
        return base.with_settings(f"preset={words[0]}", *words[1:])
    if "=" in words[0]:
        return base.with_settings(*words)
    return Subject(words[0], base.overrides, base.environment, base.program).with_settings(*words[1:])


def compare(
    title: str, contenders: Sequence[Contender], rounds: int, seed: int, say: Callable[[str], None]
) -> Comparison:
    """A, B, ..., A, B, ...: one round of each after the other, so that a slow moment strikes all.

    Raises:
        InputError: fewer than two sides, or two of one name.
    """
    names = [side.name for side in contenders]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"found sides {', '.join(names) or 'none'}, expected two or more with names of their own")
    times: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(rounds):
        for side in contenders:
            say(f"round {number + 1} of {rounds}: {side.name}")
            times[side.name].append(side.measure())
    return comparison_of(title, contenders, times, seed)


def comparison_of(
    title: str, contenders: Sequence[Contender], times: Mapping[str, Sequence[Times]], seed: int
) -> Comparison:
    """What the rounds say. Pure."""
    first = contenders[0].name
    ratios = {
        metric: {
            side.name: ratio([t[metric] for t in times[first]], [t[metric] for t in times[side.name]], seed)
            for side in contenders[1:]
        }
        for metric in METRICS
    }
    return Comparison(
        title=title,
        rounds=len(times[first]),
        blocks=min(len(t["block"]) for t in times[first]),
        sides=tuple(_side(side, times[side.name]) for side in contenders),
        ratios=ratios,
    )


def _side(side: Contender, rounds: Sequence[Times]) -> Side:
    return Side(
        name=side.name,
        settings=side.settings,
        block_interval_ms=known(distribution([ms for times in rounds for ms in times["block"]])),
        rounds_ms=tuple(median(times["block"]) for times in rounds),
    )


PLAIN = ("execution.denoiser=plain", "execution.kernels=auto", "execution.compile=false")
EXACT = ("execution.kv=model", "execution.linears=model", "execution.fp8_keep=[]")
OFF: dict[str, tuple[str, ...]] = {
    "no static blocks": (*PLAIN, *EXACT),
    "no native VAE operations": ("execution.native=false",),
    "attention by SDPA": ("model.attention=sdpa",),
    "no CUDA graphs": ("execution.graphs=false",),
    "no fused kernels": ("execution.kernels=torch",),
    "nothing in 8 bits": EXACT,
    "no overlap": ("output.pace=serial",),
}
"""One optimisation off, from a preset."""
ON: dict[str, tuple[str, ...]] = {
    "static blocks": ("execution.denoiser=static",),
    "native VAE operations": ("execution.native=true",),
    "fastest attention": ("model.attention=auto",),
    "CUDA graphs": ("execution.denoiser=static", "execution.graphs=true"),
    "fused kernels": ("execution.denoiser=static", "execution.kernels=triton"),
}
"""One optimisation on, from `reference`; what works inside static blocks alone brings them."""
ON_A_GPU = {"no CUDA graphs", "no fused kernels", "attention by SDPA", "CUDA graphs", "fused kernels"}
"""Steps that change nothing on a CPU."""


def ablations(base: Subject, steps: Mapping[str, tuple[str, ...]]) -> list[tuple[str, Subject]]:
    """The base with each step that can be taken and changes something where it runs."""
    config = base.load()
    found = []
    for name, settings in steps.items():
        changed = base.with_settings(*settings)
        if (name not in ON_A_GPU or on_gpu(config)) and _changes(changed, config):
            found.append((name, changed))
    return found


def geometry_ablations(base: Subject) -> list[tuple[str, Subject]]:
    """Windows of 2 to 4 blocks, and the other precision of each network; every one measured with its window full."""
    config = base.load()
    block, sink = config.stream.frames_per_block, config.stream.sink
    windows = [frames for frames in range(sink + block, 4 * block + 1, block) if frames != config.stream.window]
    found = [(f"window {frames}", base.with_settings(f"stream.window={frames}")) for frames in windows]
    for key, dtype in (("model.dtype", config.model.dtype), ("model.vae_dtype", config.model.vae_dtype)):
        others = [other for other in ("float32", "bfloat16") if other != dtype]
        found += [(f"{key} {other}", base.with_settings(f"{key}={other}")) for other in others]
    return found


def on_gpu(config: RuntimeConfig) -> bool:
    """Whether a stage runs on a GPU."""
    return any((config.stage(name).device or "cpu").startswith("cuda") for name in MODEL_STAGES)


def _changes(changed: Subject, config: RuntimeConfig) -> bool:
    try:
        return changed.load() != config
    except ConfigError:
        return False
