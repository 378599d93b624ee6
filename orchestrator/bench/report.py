"""What a measurement says: the schema of `report.json`, frozen and versioned.

A field that is added raises nothing; one that changes its meaning or goes raises `SCHEMA_VERSION`. Times are in
milliseconds unless a name says otherwise, stamps in nanoseconds of the machine-wide monotonic clock. Knows no way to
measure or to show anything.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ipc.errors import InputError

SCHEMA_VERSION: Literal[2] = 2


class Record(BaseModel):
    """A part of a report. Numbers that are none do not belong in one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Distribution(Record):
    """A series: `jitter` is the mean difference of neighbours in time."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    p999: float
    max: float
    min: float
    jitter: float


class Interval(Record):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class Misses(Record):
    """Blocks that took longer than their frames play at a rate."""

    fps: int
    deadline_ms: float
    missed: int
    of: int


class Trend(Record):
    """Growth of a worker's memory a block, with its 95 % interval; `leak` where it is sure and worth the name."""

    bytes_a_block: float
    low: float
    high: float
    leak: bool


class Machine(Record):
    """Where it was measured. Clocks as they were when the report was made."""

    cpu: str
    cores: int
    cpu_mhz: float | None
    memory_bytes: int
    kernel: str
    gpus: tuple[dict[str, str], ...] = ()


class Software(Record):
    """What was measured: `commit` ends in `+` where files were changed since; None outside a checkout."""

    commit: str | None
    versions: dict[str, str]


class Environment(Record):
    """Machine and software of a report."""

    machine: Machine
    software: Software


class BlockRow(Record):
    """One block: spans [began, ended] of the stages, and of its first and last frame at the sinks."""

    block: int
    version: int
    spans: dict[str, tuple[int, int]]


class WorkerMemory(Record):
    """Memory of a worker: `host_bytes` a block, resident, shared pages included; peaks are those of the whole run."""

    worker: str
    host_peak_bytes: int
    device_peak_bytes: int
    trend: Trend | None
    blocks: tuple[int, ...]
    host_bytes: tuple[int, ...]


class Steady(Record):
    """A warm stream with a full window.

    Attributes:
        stage_ms: a stage's work on a block by the host's clock; `output` from a block's first frame to its last.
        device_ms: the same by CUDA events, for stages on a GPU.
        frame_interval_ms, block_interval_ms: between frames, and between the last frames of blocks, at the sinks.
        end_to_end_ms: from the start of a block's denoising to its last frame at the sinks.
        rtf: pixel_fps over the video's rate.
    """

    blocks: int
    warmup_blocks: int
    pace: str
    stage_ms: dict[str, Distribution]
    device_ms: dict[str, Distribution]
    frame_interval_ms: Distribution
    block_interval_ms: Distribution
    end_to_end_ms: Distribution
    misses: tuple[Misses, ...]
    block_fps: float
    pixel_fps: float
    rtf: float
    memory: tuple[WorkerMemory, ...]
    rows: tuple[BlockRow, ...]

    @property
    def leaks(self) -> tuple[WorkerMemory, ...]:
        return tuple(memory for memory in self.memory if memory.trend is not None and memory.trend.leak)


class SwitchSample(Record):
    """One prompt switch: `ms` whole, from acceptance to its first frame at the sinks, and `parts` that add up to it."""

    prompt: int
    version: int
    block: int
    cached: bool
    ms: float
    parts: dict[str, float]


class SwitchCase(Record):
    """Switches of one way to switch; `cold` prompts were encoded, `hot` ones came from the cache."""

    recache: str
    switch: str
    hot: Distribution | None
    cold: Distribution | None
    parts: dict[str, Distribution]
    samples: tuple[SwitchSample, ...]
    rows: tuple[BlockRow, ...]


class Load(Record):
    """One look at the machine: cores that were busy in all, by worker, clocks; of a GPU what nvidia-smi says."""

    at_s: float
    cpu_cores: float
    worker_cores: dict[str, float]
    cpu_mhz: float | None
    gpus: tuple[dict[str, float], ...]


class Throughput(Record):
    """A stream that runs as fast as it can for a while; `fps_by_second` counts frames at the sinks."""

    seconds: float
    pixel_fps: float
    rtf: float
    fps_by_second: tuple[int, ...]
    underruns: int
    load: tuple[Load, ...]

    def gpu_samples(self) -> list[dict[str, list[tuple[float, float]]]]:
        """Of each GPU, by name, pairs of `at_s` and a value; a look that nvidia-smi did not answer is missing."""
        found: list[dict[str, list[tuple[float, float]]]] = []
        for load in self.load:
            for number, gpu in enumerate(load.gpus):
                if number == len(found):
                    found.append({})
                for name, value in gpu.items():
                    found[number].setdefault(name, []).append((load.at_s, value))
        return found


class Start(Record):
    """One start: seconds from the command to each moment."""

    kind: Literal["cold", "warm"]
    answers_s: float
    generating_s: float
    first_frame_s: float


class Case(Record):
    """One point of a scaling curve: streams together make `pixel_fps`."""

    axis: str
    name: str
    settings: tuple[str, ...]
    streams: int
    pixel_fps: float
    rtf_each: float
    block_interval_ms: Distribution


class Side(Record):
    """One of the things compared: its blocks, round by round."""

    name: str
    settings: tuple[str, ...]
    block_interval_ms: Distribution
    rounds_ms: tuple[float, ...]


class Comparison(Record):
    """Several sides interleaved in one run.

    Attributes:
        ratios: by what was timed (`block` or a stage) and by side: how many times as long the first side takes.
    """

    title: str
    rounds: int
    blocks: int
    sides: tuple[Side, ...]
    ratios: dict[str, dict[str, Interval]]


class RooflinePart(Record):
    """A stage under the device's limits; `share` is limit over measured.

    `flops`, `bytes` and `limit_ms` are of its products, convolutions and attentions: all else can be fused into them.
    """

    stage: str
    flops: float
    bytes: float
    measured_ms: float
    limit_ms: float
    share: float


class Roofline(Record):
    """Ceilings measured on the device by a matmul and a copy, and the stages under them."""

    device: str
    threads: int
    dtype_flops_per_s: dict[str, float]
    bytes_per_s: float
    parts: tuple[RooflinePart, ...]


class Report(Record):
    """All that one command measured; a part that it did not measure is missing.

    Attributes:
        made_at: UTC, ISO 8601.
        config: the whole configuration, as `orchestrator config show` prints it.
        seeds: of the stream's noise and of the bootstrap.
        notes: what the reader must know, such as a machine that was busy.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    command: str
    made_at: str
    wall_s: float
    environment: Environment
    config: dict[str, Any]
    seeds: dict[str, int]
    steady: Steady | None = None
    switching: tuple[SwitchCase, ...] = ()
    throughput: Throughput | None = None
    startup: tuple[Start, ...] = ()
    scaling: tuple[Case, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    roofline: Roofline | None = None
    operations: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def read_report(path: Path) -> Report:
    """Raises InputError."""
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: no report of schema version {SCHEMA_VERSION}: {where}: {first['msg']}") from error
