"""Sides interleaved in one run, round by round, and their ratios with intervals; ablations are such comparisons."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from configs.load import preset_names
from configs.schema import MODEL_STAGES, RuntimeConfig
from ipc.errors import ConfigError, InputError
from orchestrator.bench.report import Comparison, Side
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.statistics import distribution, ratio
from orchestrator.bench.steady import SETTLE, block_intervals, block_rows, known, stage_times

Times = Mapping[str, Sequence[float]]
"""Milliseconds of each block of one round, by what was timed: `block`, or a stage."""
Key = tuple[str, int]
"""What is measured, and which of several that are equal."""
METRICS = ("block", "denoiser", "vae_decoder")


@dataclass(frozen=True)
class Contender:
    """One side: its name, what tells it apart, and a round of it.

    Attributes:
        identity: the same for sides that compute the same.
    """

    name: str
    settings: tuple[str, ...]
    identity: str
    measure: Callable[[], Times]


@dataclass(frozen=True)
class Contest:
    """Sides that are compared with the first of them. Raises InputError: fewer than two, or two of one name."""

    title: str
    sides: Sequence[Contender]
    rounds: int

    def __post_init__(self) -> None:
        names = [side.name for side in self.sides]
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"found sides {', '.join(names) or 'none'}, expected two or more with names of their own")

    @property
    def keys(self) -> list[Key]:
        """Of each side the key of its times. What is equal in one contest is measured as often as it is there."""
        seen: Counter[str] = Counter()
        keys = []
        for side in self.sides:
            keys.append((side.identity, seen[side.identity]))
            seen[side.identity] += 1
        return keys


def contender(name: str, subject: Subject, blocks: int) -> Contender:
    """The shipped runtime under a configuration. Raises ConfigError."""
    free = Subject(subject.config, ("output.pace=free", *subject.overrides), subject.environment, subject.program)
    warmup = free.load().stream.window_blocks + SETTLE

    def measure() -> Times:
        rows = [row for row in block_rows(record(free, warmup + blocks)) if row.block >= warmup]
        return {"block": block_intervals(rows), **{stage: stage_times(rows, stage) for stage in METRICS[1:]}}

    return Contender(name, subject.overrides, identity(free), measure)


def identity(subject: Subject) -> str:
    """The same for configurations that compute the same: the preset's name matters only where presets change."""
    config = subject.load()
    if not config.adaptive.is_on:
        config = config.model_copy(update={"preset": None})
    return config.model_dump_json()


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


def compare(contests: Sequence[Contest], seed: int, say: Callable[[str], None]) -> Iterator[tuple[Comparison, ...]]:
    """A, B, then B, A, and so on: after each round what all rounds so far say.

    Sides take turns, so that a slow moment strikes all, and every second round is in the reverse order, so that a
    machine that grows slower all the while favours none. What several contests compare is measured once a round.
    """
    times: dict[Key, list[Times]] = {}
    rounds = max(contest.rounds for contest in contests)
    for number in range(rounds):
        due: dict[Key, Contender] = {}
        for contest in contests:
            if number < contest.rounds:
                due |= {key: side for key, side in zip(contest.keys, contest.sides, strict=True) if key not in due}
        for key in due if number % 2 == 0 else reversed(due):
            say(f"round {number + 1} of {rounds}: {due[key].name}")
            times.setdefault(key, []).append(due[key].measure())
        yield tuple(comparison_of(contest, times, seed) for contest in contests)


def comparison_of(contest: Contest, times: Mapping[Key, Sequence[Times]], seed: int) -> Comparison:
    """What the rounds of a contest say, of those that there are. Pure."""
    rounds = [times[key][: contest.rounds] for key in contest.keys]
    ratios = {
        metric: {
            side.name: ratio([t[metric] for t in rounds[0]], [t[metric] for t in own], seed)
            for side, own in zip(contest.sides[1:], rounds[1:], strict=True)
        }
        for metric in METRICS
    }
    return Comparison(
        title=contest.title,
        rounds=len(rounds[0]),
        blocks=min(len(t["block"]) for own in rounds for t in own),
        sides=tuple(_side(side, own) for side, own in zip(contest.sides, rounds, strict=True)),
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
EXACT = ("execution.kv=model", "execution.linears=model", "execution.fp8_keep=[]", "execution.attend=model")
OFF: dict[str, tuple[str, ...]] = {
    "no static blocks": (*PLAIN, *EXACT),
    "no native VAE operations": ("execution.native=false",),
    "attention by SDPA": ("model.attention=sdpa",),
    "no CUDA graphs": ("execution.graphs=false",),
    "no fused kernels": ("execution.kernels=torch",),
    "no attention in 8 bits": ("execution.attend=model",),
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
