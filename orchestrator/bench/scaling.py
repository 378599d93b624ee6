"""How rate and latency follow streams side by side, devices, placements, windows, resolutions and steps."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from configs.schema import PATCH, SPATIAL_STRIDE, RuntimeConfig
from orchestrator.bench.environment import gpu_rows
from orchestrator.bench.report import Case
from orchestrator.bench.runs import Subject, running
from orchestrator.bench.statistics import distribution
from orchestrator.bench.steady import SETTLE, frames_a_second, intervals_ms, known

Point = tuple[str, str, tuple[str, ...], int]
"""Axis, name, settings, streams."""


def points(subject: Subject, axes: tuple[str, ...], quick: bool) -> Iterator[Point]:
    """What is measured along each axis; devices as many as nvidia-smi shows."""
    config = subject.load()
    stream, video = config.stream, config.video
    gpus = len(gpu_rows(("name",)))
    if "streams" in axes:
        for count in (1, 2) if quick else (1, 2, 4):
            yield "streams", f"{count}", (), count
    if "device" in axes and gpus:
        for device in ("cpu", "cuda:0") if config.name == "pocket" else ("cuda:0",):
            yield "device", device, (f"device={device}",), 1
    if "placement" in axes:
        for placement in ("process", "thread"):
            yield "placement", placement, (f"placement={placement}",), 1
        if gpus > 1:
            devices = ("device=cuda:0", "stages.vae_decoder.device=cuda:1")
            yield "placement", "two devices", ("placement=process", *devices), 1
    if "window" in axes:
        block = stream.frames_per_block
        sizes = (2, 4) if quick else (2, 3, 4, 6, 8)
        for window in (size * block for size in sizes if size * block >= stream.sink + block):
            yield "window", f"{window} latent frames", (f"stream.window={window}",), 1
    if "resolution" in axes:
        for share in (0.5, 1.0) if quick else (0.5, 1.0, 1.5):
            height, width = (_rounded(side * share) for side in (video.height, video.width))
            yield "resolution", f"{width}x{height}", (f"video.height={height}", f"video.width={width}"), 1
    if "steps" in axes:
        for count in (1, 4) if quick else range(1, len(stream.steps) + 1):
            steps = stream.steps[:count]
            yield "steps", f"{len(steps)}", (f"stream.steps={list(steps)}",), 1


def measure_point(subject: Subject, point: Point, blocks: int) -> Case:
    """One point: its streams side by side, from when every window is full until each made its blocks.

    A stream that is ahead goes on until the others are there, so that none is measured alone. Raises LongLiveError.
    """
    _, _, settings, streams = point
    changed = subject.with_settings(*settings)
    config = changed.load()
    with ExitStack() as stack:
        runs = [stack.enter_context(running(changed, settings=("output.pace=free",))) for _ in range(streams)]
        for run in runs:
            run.wait_for_block(config.stream.window_blocks + SETTLE)
        began = time.monotonic_ns()
        for run, last in [(run, run.last_block + 1 + blocks) for run in runs]:
            run.wait_for_block(last)
        ended = time.monotonic_ns()
    return case_of(point, config, [run.recording.block_ends(began, ended) for run in runs])


def case_of(point: Point, config: RuntimeConfig, ends: Sequence[Sequence[int]]) -> Case:
    """Streams of one point together, from the stamps at which their blocks ended. Pure."""
    axis, name, settings, streams = point
    block_ms = [intervals_ms(each) for each in ends]
    rates = [frames_a_second(each, config) for each in block_ms]
    return Case(
        axis=axis,
        name=name,
        settings=settings,
        streams=streams,
        pixel_fps=sum(rates),
        rtf_each=min(rates) / config.video.fps,
        block_interval_ms=known(distribution([ms for each in block_ms for ms in each])),
    )


def _rounded(pixels: float) -> int:
    step = SPATIAL_STRIDE * PATCH
    return max(step, round(pixels / step) * step)
