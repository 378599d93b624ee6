"""The shipped runtime for minutes, with prompts that change and workers that are killed: does it stay as it is?

    .venv/bin/python scripts/gpu/soak.py --seconds 300 --json out/soak.json
    .venv/bin/python scripts/gpu/soak.py --config pocket --seconds 20

Starts `orchestrator start`, switches prompts, looks at memory every second, kills each model worker once with SIGKILL,
stops the run and counts the frames of its file. Prints a table; the exit code is 1 where a check fails.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soak_summary as summary
from soak_table import print_report
from soak_watch import Meter, Sample, Watch, meter

from configs.schema import MODEL_STAGES
from ipc.errors import InputError, LongLiveError, UserError
from ipc.messages import Applied
from ipc.processes import resident_bytes
from orchestrator.bench.environment import environment
from orchestrator.bench.runs import LiveRun, Subject, running
from orchestrator.bench.steady import SETTLE, block_rows
from orchestrator.bench.switching import switch, switch_samples, texts
from workers.ffmpeg import find_ffmpeg

UNSETTLED_S = 30.0
"""Of the samples of memory those before are left out; of a short run the first quarter."""
BACK_S = 600.0
"""How long a killed worker may take to be back, and a prompt to be on air."""
RETURN_S = 30.0
"""How long memory may take to be where it was once blocks flow."""
FLOWING = 3
"""Blocks that must be played after a worker is back."""
GONE_S = 20.0
LOOK_S = 0.05
PLAY_S = 900.0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="longlive-1.3b")
    parser.add_argument("--model-path", type=Path, help="folder with the weights; else they are random")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--seconds", type=float, default=300.0, help="before the first worker is killed")
    parser.add_argument("--switch-every", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--pace", choices=("free", "live"), default="free")
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="folder in which the video's own is made")
    parser.add_argument("--no-file", action="store_true", help="make no video")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    given = parser.parse_args()
    if given.json is not None and (given.json.is_dir() or not given.json.parent.is_dir()):
        parser.error(f"--json {given.json}: expected a file in a folder that is there")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out {given.out}: found a file, expected a folder")
    try:
        report = soak(given)
    except LongLiveError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2 if isinstance(error, UserError) else 1)
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)
    sys.exit(1 if report["failed"] else 0)


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """The whole run. Raises LongLiveError."""
    subject, gpu = subject_of(given), meter()
    config = subject.load()
    ffmpeg = None if given.no_file else ffmpeg_here(config.output.ffmpeg)
    folder = None if ffmpeg is None else new_folder(given.out)
    before = gpu.used()
    settings = (f"output.pace={given.pace}",)
    out = "null:" if folder is None else str(folder / "soak.mp4")
    with running(subject, settings=settings, out=out, may_restart=True) as run:
        run.wait_for_block(config.stream.window_blocks + SETTLE)
        first_block, pids = run.last_block, run.recording.pids
        with Watch(gpu, pids) as watch:
            sent = switch_prompts(run, given.seconds, given.switch_every, config.stream.frames_in(1) / config.video.fps)
            steady, last_block = list(watch.samples), run.last_block
            told = asdict_of_status(run)
            rows = [row for row in block_rows(run.recording) if first_block < row.block <= last_block]
            times = summary.block_times(rows, run.recording)
            switches = list(switch_samples(run.recording, sent))
            kills = [kill(run, gpu, stage) for stage in workers(run)]
        restarts = {stage: run.client.status().stages[stage].restarts for stage in MODEL_STAGES}
        family = processes(run)
    series = memory_series(steady, given.seconds)
    played = run.stopped.frames if run.stopped is not None else 0
    left, after = left_of(family), settled(gpu, before, summary.GROWTH_BYTES)
    counted, where = counted_frames(ffmpeg, folder)
    checks = [
        *summary.memory_checks(series),
        *map(summary.kill_check, kills),
        summary.Check(
            "each worker restarted once",
            set(restarts.values()) == {1},
            ", ".join(f"{stage} {n}" for stage, n in restarts.items()),
        ),
        summary.file_check(played, counted, where),
        *summary.left_checks(left, before, after),
    ]
    return {
        "config": config.name,
        "settings": list(subject.overrides),
        "pace": given.pace,
        "seconds": given.seconds,
        "environment": environment().model_dump(mode="json"),
        "memory_by": gpu.name,
        "gpu_before_bytes": before,
        "gpu_after_bytes": after,
        "status": told,
        "blocks": len(rows),
        "block_ms": {kind: {n: d.model_dump() for n, d in found.items()} for kind, found in times.items()},
        "switches": len(switches),
        "switch_ms": summary.switch_times(switches),
        "memory": {name: {**asdict(flat), "growth_bytes": flat.growth_bytes} for name, flat in series.items()},
        "samples": [asdict(sample) for sample in steady],
        "killed": [asdict(killed) for killed in kills],
        "checks": [asdict(check) for check in checks],
        "failed": summary.failed(checks),
    }


def subject_of(given: argparse.Namespace) -> Subject:
    """What runs: the given weights, else the embedded model's, else random ones."""
    weights: tuple[str, ...] = ()
    if given.model_path is not None:
        weights = (f"model.path={given.model_path}",)
    elif given.config != "pocket":
        weights = ("model.random_weights=true",)
    return Subject(given.config, (*weights, *given.set))


def asdict_of_status(run: LiveRun) -> dict[str, Any]:
    """A snapshot, while it runs as it should."""
    status: dict[str, Any] = run.client.status().model_dump(mode="json")
    return status


def switch_prompts(run: LiveRun, seconds: float, every_s: float, block_s: float) -> dict[int, int]:
    """Prompts one after the other, each at a random moment of a block; versions and which prompt each was."""
    draw, sent, shown = random.Random(0), {}, 0
    end = time.monotonic() + seconds
    for prompt, text in texts(sys.maxsize):
        wait_s = min(every_s + draw.uniform(0, block_s), end - time.monotonic())
        if wait_s > 0:
            time.sleep(wait_s)
        if time.monotonic() >= end:
            break
        on_air = switch(run, text)
        sent[on_air.version], shown = prompt, on_air.block
    run.wait_for_block(shown)
    return sent


def workers(run: LiveRun) -> list[str]:
    """A model stage of each process: stages that share one are started again together."""
    status = run.client.status()
    return list({status.stages[stage].pid: stage for stage in reversed(MODEL_STAGES)}.values())[::-1]


def kill(run: LiveRun, gpu: Meter, stage: str) -> summary.Killed:
    """Ends a stage's process and waits until all is as before. Raises LongLiveError where it is not back in time."""
    old, before = run.client.status().stages[stage], gpu.used()
    killed_ns = time.monotonic_ns()
    os.kill(old.pid, signal.SIGKILL)
    handle = run.client.prompt(f"sent while {stage} was dead")

    def is_back() -> bool:
        now = run.client.status().stages[stage]
        return now.restarts > old.restarts and now.pid != old.pid and now.state in {"ready", "busy", "idle"}

    until(is_back, BACK_S, f"{stage} to be back")
    ready_ns = time.monotonic_ns()
    try:
        answer = handle.result(BACK_S)
        if not isinstance(answer, Applied):
            raise LongLiveError(f"prompt sent while {stage} was dead: expected applied, found {answer.type}")
        handle.on_air(BACK_S)
    except TimeoutError as error:
        raise LongLiveError(f"prompt sent while {stage} was dead: not on air within {BACK_S:g} s") from error
    on_air_ns = time.monotonic_ns()
    run.wait_for_block(run.last_block + FLOWING)
    stamps = itertools.chain.from_iterable(frames.played_ns for frames in list(run.recording.frames))
    return summary.Killed(
        worker=stage,
        ready_s=(ready_ns - killed_ns) / 1e9,
        on_air_s=(on_air_ns - killed_ns) / 1e9,
        gap_s=summary.longest_gap_s(stamps, killed_ns, time.monotonic_ns()),
        before_bytes=before,
        after_bytes=settled(gpu, before, int(summary.RETURN_SHARE * (before or 0))),
    )


def settled(gpu: Meter, before: int | None, more: int) -> int | None:
    """Memory in use on GPUs, once it is at most so much more than before; else what it is after `RETURN_S`."""
    end = time.monotonic() + RETURN_S
    while True:
        now = gpu.used()
        if now is None or before is None or now <= before + more or time.monotonic() > end:
            return now
        time.sleep(LOOK_S)


def processes(run: LiveRun) -> dict[int, str]:
    """The run's by number: the daemon, its workers, and where psutil can be imported all others, as ffmpeg."""
    found = {pid: name for name, pid in dict(run.recording.pids).items()}
    found |= {stage.pid: name for name, stage in run.client.status().stages.items()}
    try:
        import psutil
    except ImportError:
        return found
    children = psutil.Process(run.pid).children(recursive=True)
    return {child.pid: child.name() for child in children} | found | {run.pid: "orchestrator"}


def left_of(family: dict[int, str]) -> list[str]:
    """Those that still run some seconds after the end."""
    end = time.monotonic() + GONE_S
    while True:
        left = [f"{name} ({pid})" for pid, name in family.items() if resident_bytes(pid)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(LOOK_S)


def memory_series(samples: list[Sample], seconds: float) -> dict[str, summary.Flatness]:
    """By what holds it, from when it has settled on."""
    late = [sample for sample in samples if sample.at_s >= min(UNSETTLED_S, seconds / 4)]
    series: dict[str, list[tuple[float, int]]] = {}
    for sample in late:
        held = {f"host, {name}": size for name, size in sample.resident.items()}
        held |= {f"GPU, {name}": size for name, size in sample.gpu_by_worker.items()}
        if sample.gpu is not None:
            held["GPU, all"] = sample.gpu
        for name, size in held.items():
            series.setdefault(name, []).append((sample.at_s, size))
    found = {name: summary.flatness(*zip(*values, strict=True)) for name, values in series.items()}
    return {name: flat for name, flat in found.items() if flat is not None}


def ffmpeg_here(explicit: Path | None) -> Path | None:
    """The program that the runtime would use; None without one."""
    try:
        return find_ffmpeg(explicit)
    except InputError:
        return None


def new_folder(parent: Path) -> Path:
    """An empty one."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=parent))


def counted_frames(ffmpeg: Path | None, folder: Path | None) -> tuple[int | None, str]:
    """Frames that ffmpeg decodes of all files of a folder, and where they lie; None without a file to count."""
    if ffmpeg is None or folder is None:
        return None, "no ffmpeg, or no file wanted"
    counted = 0
    for path in sorted(folder.glob("*.mp4")):
        command = [str(ffmpeg), "-hide_banner", "-nostdin", "-xerror", "-i", str(path)]
        command += ["-map", "0:v", "-f", "null", "-"]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=PLAY_S, check=False)
        except subprocess.TimeoutExpired:
            return 0, f"{path}, not decoded within {PLAY_S:g} s"
        frames = re.findall(r"frame=\s*(\d+)", ran.stderr)
        if ran.returncode != 0 or not frames:
            return 0, f"{path}, which does not play"
        counted += int(frames[-1])
    return counted, str(folder)


def until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    """Waits for a condition. Raises LongLiveError when it does not hold in time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise LongLiveError(f"waited {within_s:g} s for {what}")
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
