"""How rate and latency follow streams side by side, devices, placements, windows, resolutions and steps."""

import threading
from collections.abc import Callable, Iterator

from configs.schema import PATCH, SPATIAL_STRIDE
from ipc.errors import LongLiveError
from orchestrator.bench.environment import gpu_rows
from orchestrator.bench.report import Case, Steady
from orchestrator.bench.runs import Recording, Subject, record
from orchestrator.bench.statistics import distribution
from orchestrator.bench.steady import block_intervals, known, steady_of

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
        sizes = (2, 4, 6) if quick else (2, 3, 4, 6, 8)
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
    """One point: its streams side by side, each with a full window. Raises LongLiveError."""
    _, _, settings, streams = point
    changed = subject.with_settings(*settings)
    config = changed.load()
    warmup = config.stream.window_blocks + 2
    recordings = side_by_side(streams, lambda: record(changed, warmup + blocks, ("output.pace=free",)))
    return case_of(point, [steady_of(recording, config, warmup) for recording in recordings])


def case_of(point: Point, steady: list[Steady]) -> Case:
    """Streams of one point together. Pure."""
    axis, name, settings, streams = point
    return Case(
        axis=axis,
        name=name,
        settings=settings,
        streams=streams,
        pixel_fps=sum(each.pixel_fps for each in steady),
        rtf_each=min(each.rtf for each in steady),
        block_interval_ms=known(distribution([ms for each in steady for ms in block_intervals(each.rows)])),
    )


def side_by_side(count: int, run: Callable[[], Recording]) -> list[Recording]:
    """What as many runs at the same time say. Raises LongLiveError: the first error of one of them."""
    recordings: list[Recording] = []
    errors: list[LongLiveError] = []

    def one() -> None:
        try:
            recordings.append(run())
        except LongLiveError as error:
            errors.append(error)

    threads = [threading.Thread(target=one, name=f"stream {number}") for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return recordings


def _rounded(pixels: float) -> int:
    step = SPATIAL_STRIDE * PATCH
    return max(step, round(pixels / step) * step)
