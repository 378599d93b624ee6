"""Throughput over a while with the machine's load beside it, and how long a start takes."""

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from configs.schema import RuntimeConfig
from ipc.errors import LongLiveError
from ipc.processes import cpu_seconds, machine_cpu_seconds
from orchestrator.bench.environment import cpu_mhz, gpu_load
from orchestrator.bench.recording import Recording
from orchestrator.bench.report import Load, Start, Throughput
from orchestrator.bench.runs import Subject, running
from orchestrator.bench.steady import frames_a_second, intervals_ms

SAMPLE_S = 1.0


class LoadSampler:
    """Looks at processors and GPUs every second, in a thread of its own.

    Args:
        pids: by worker.
    """

    def __init__(self, pids: dict[str, int]) -> None:
        self.samples: list[Load] = []
        self._pids = pids
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> "LoadSampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        began = before = time.monotonic()
        busy, own = machine_cpu_seconds(), self._workers()
        while not self._ended.wait(SAMPLE_S):
            now, busy_now, own_now = time.monotonic(), machine_cpu_seconds(), self._workers()
            passed = now - before
            self.samples.append(
                Load(
                    at_s=now - began,
                    cpu_cores=(busy_now - busy) / passed,
                    worker_cores={name: (own_now[name] - own.get(name, 0.0)) / passed for name in own_now},
                    cpu_mhz=cpu_mhz(),
                    gpus=gpu_load(),
                )
            )
            before, busy, own = now, busy_now, own_now

    def _workers(self) -> dict[str, float]:
        # A copy: who listens adds to the table meanwhile.
        used = {name: cpu_seconds(pid) for name, pid in dict(self._pids).items()}
        return {name: seconds for name, seconds in used.items() if seconds is not None}


def measure_throughput(subject: Subject, seconds: float) -> Throughput:
    """As fast as frames come, from a full window on. Raises LongLiveError."""
    config = subject.load()
    with running(subject, settings=("output.pace=free",)) as run:
        run.wait_for_block(2 * config.stream.window_blocks)
        began = time.monotonic_ns()
        with LoadSampler(run.recording.pids) as sampler:
            time.sleep(seconds)
        ended = time.monotonic_ns()
    return throughput_of(run.recording, began, ended, config, sampler.samples)


def throughput_of(
    recording: Recording, began_ns: int, ended_ns: int, config: RuntimeConfig, load: Sequence[Load]
) -> Throughput:
    """Frames that were at the sinks between two stamps. Raises LongLiveError where there are fewer than two blocks."""
    ends = recording.block_ends(began_ns, ended_ns)
    if len(ends) < 2:
        raise LongLiveError(f"found {len(ends)} blocks in {(ended_ns - began_ns) / 1e9:.1f} s; measure for longer")
    pixel_fps = frames_a_second(intervals_ms(ends), config)
    stamps = [at for frames in recording.frames for at in frames.played_ns if began_ns <= at < ended_ns]
    by_second = Counter((at - began_ns) // 1_000_000_000 for at in stamps)
    whole = int((ended_ns - began_ns) // 1_000_000_000)
    return Throughput(
        seconds=(ended_ns - began_ns) / 1e9,
        pixel_fps=pixel_fps,
        rtf=pixel_fps / config.video.fps,
        fps_by_second=tuple(by_second[second] for second in range(whole)),
        underruns=recording.underruns,
        load=tuple(load),
    )


def measure_starts(subject: Subject) -> tuple[Start, Start]:
    """A cold start, with compilers' caches empty and the weights out of the page cache, and a warm one."""
    with tempfile.TemporaryDirectory(prefix="longlive-bench-") as folder:
        caches = tuple((name, f"{folder}/{name}") for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"))
        fresh = Subject(subject.config, subject.overrides, (*subject.environment, *caches), subject.program)
        path = subject.load().model.path
        if path is not None:
            forget_files(path)
        return _start(fresh, "cold"), _start(fresh, "warm")


def forget_files(folder: Path) -> None:
    """Asks the kernel to drop a folder's files from the page cache; what somebody else maps stays (posix_fadvise)."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _start(subject: Subject, kind: Literal["cold", "warm"]) -> Start:
    with running(subject) as run:
        run.wait_for_block(0)
    return start_of(run.recording, kind)


def start_of(recording: Recording, kind: Literal["cold", "warm"]) -> Start:
    """Seconds from the command to each moment that the events tell."""
    began = recording.spawned_ns
    return Start(
        kind=kind,
        answers_s=(recording.answered_ns - began) / 1e9,
        generating_s=(recording.states_ns["running"] - began) / 1e9,
        first_frame_s=(recording.frames[0].played_ns[0] - began) / 1e9,
    )
