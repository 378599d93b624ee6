"""From a run's events to the latencies of a warm stream with a full window. Pure: knows no process and no clock."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from configs.schema import RuntimeConfig
from ipc.errors import InputError, LongLiveError
from orchestrator.bench.recording import Recording
from orchestrator.bench.report import BlockRow, Distribution, Steady, WorkerMemory
from orchestrator.bench.statistics import distribution, misses, trend

STAGES = ("denoiser", "vae_decoder", "output")
"""Stages that work on every block."""
SETTLE = 4
"""Blocks beyond a full window that are not measured: until then latents may wait that were made while it filled."""


def checked_warmup(config: RuntimeConfig, warmup: int) -> None:
    """Raises InputError where the warm-up does not fill the window."""
    if warmup <= config.stream.window_blocks:
        blocks = config.stream.window_blocks
        raise InputError(f"--warmup: found {warmup}, expected more than the window's {blocks} blocks")


def steady_of(recording: Recording, config: RuntimeConfig, warmup: int, pace: str = "free") -> Steady:
    """What a recording says of the blocks from `warmup` on. Raises LongLiveError where there are none."""
    rows = [row for row in block_rows(recording) if row.block >= warmup]
    if len(rows) < 2:
        raise LongLiveError(f"found {len(rows)} blocks after the warm-up of {warmup}, expected 2 or more")
    stamps = [stamp for played in recording.frames if played.block >= warmup for stamp in played.played_ns]
    block_ms = block_intervals(rows)
    pixel_fps = frames_a_second(block_ms, config)
    device: defaultdict[str, list[float]] = defaultdict(list)
    for times in recording.blocks:
        if times.block >= warmup and times.device_ms is not None:
            device[times.stage].append(times.device_ms)
    return Steady(
        blocks=len(rows),
        warmup_blocks=warmup,
        pace=pace,
        stage_ms={stage: known(distribution(stage_times(rows, stage))) for stage in STAGES},
        device_ms={stage: known(distribution(times)) for stage, times in device.items()},
        frame_interval_ms=known(distribution(intervals_ms(stamps))),
        block_interval_ms=known(distribution(block_ms)),
        end_to_end_ms=known(distribution([span_ms(row, "denoiser", "output") for row in rows])),
        misses=tuple(misses(block_ms, config.stream.frames_in(1))),
        block_fps=1000 * len(block_ms) / sum(block_ms),
        pixel_fps=pixel_fps,
        rtf=pixel_fps / config.video.fps,
        memory=tuple(memory_of(recording.memory, recording.device_peaks, warmup)),
        rows=tuple(rows),
    )


def block_rows(recording: Recording) -> list[BlockRow]:
    """Blocks of which every stage told, in order."""
    spans: defaultdict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    versions: dict[int, int] = {}
    for times in recording.blocks:
        spans[times.block][times.stage] = (times.began_ns, times.ended_ns)
    for played in recording.frames:
        spans[played.block]["output"] = (played.played_ns[0], played.played_ns[-1])
        versions[played.block] = played.version
    whole = sorted(block for block, stages in spans.items() if set(STAGES) <= set(stages))
    return [BlockRow(block=block, version=versions[block], spans=spans[block]) for block in whole]


def stage_times(rows: Sequence[BlockRow], stage: str) -> list[float]:
    """Milliseconds of a stage's work on each block."""
    return [span_ms(row, stage, stage) for row in rows]


def span_ms(row: BlockRow, first: str, last: str) -> float:
    """From the start of one stage to the end of another."""
    return (row.spans[last][1] - row.spans[first][0]) / 1e6


def block_intervals(rows: Sequence[BlockRow]) -> list[float]:
    """Milliseconds between the last frames of blocks that follow each other."""
    return [
        (b.spans["output"][1] - a.spans["output"][1]) / 1e6
        for a, b in itertools.pairwise(rows)
        if b.block == a.block + 1
    ]


def frames_a_second(block_ms: Sequence[float], config: RuntimeConfig) -> float:
    """From block to block: frames come in bunches, and a count from frame to frame would leave out a wait."""
    return 1000 * config.stream.frames_in(1) * len(block_ms) / sum(block_ms)


def intervals_ms(stamps: Sequence[int]) -> list[float]:
    """Milliseconds between neighbours."""
    return [(b - a) / 1e6 for a, b in itertools.pairwise(stamps)]


def memory_of(
    memory: Mapping[str, Sequence[tuple[int, int]]], device_peaks: Mapping[str, int], warmup: int
) -> list[WorkerMemory]:
    """Of every worker what it held block by block from the warm-up's end on, and its peaks of the whole run."""
    found = []
    for worker, held in memory.items():
        warm = [(block, size) for block, size in held if block >= warmup]
        blocks, sizes = [block for block, _ in warm], [size for _, size in warm]
        found.append(
            WorkerMemory(
                worker=worker,
                host_peak_bytes=max(size for _, size in held),
                device_peak_bytes=device_peaks.get(worker, 0),
                trend=trend(sizes, blocks),
                blocks=tuple(blocks),
                host_bytes=tuple(sizes),
            )
        )
    return found


def known(value: Distribution | None) -> Distribution:
    """Raises LongLiveError where a run told nothing to summarise."""
    if value is None:
        raise LongLiveError("the run told of too few blocks to summarise")
    return value
