"""What `scripts/gpu/soak.py` makes of a run, and one whole run of it with a model of a width of 24."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soak_summary as summary
from command import REPOSITORY
from soak_summary import MIB, Killed
from soak_watch import Watch
from tiny_files import TINY

from ipc.messages import BlockTimes
from orchestrator.bench.recording import Recording
from orchestrator.bench.report import BlockRow, SwitchSample

MS = 1_000_000


def series(growth_mib: float, seconds: int = 120) -> summary.Flatness:
    """Memory around 1000 MiB that grows evenly, with a spike that says nothing."""
    held = [MIB * (1000 + growth_mib * i / seconds) for i in range(seconds + 1)]
    held[seconds // 2] += 10 * MIB
    flat = summary.flatness(range(seconds + 1), held)
    assert flat is not None
    return flat


def test_memory_that_grows_is_not_flat_and_a_spike_is() -> None:
    assert series(200).growth_bytes == pytest.approx(200 * MIB, rel=0.02)
    assert [series(growth).flat for growth in (-200, 0, 60, 70)] == [True, True, True, False]
    assert series(0).spread_bytes == pytest.approx(10 * MIB)


def test_a_short_series_is_not_judged() -> None:
    (check,) = summary.memory_checks({"GPU, all": series(500, seconds=20)})
    assert check.passed is None and "too short" in check.text
    assert summary.failed([check]) == []
    assert summary.flatness([1.0], [5]) is None


def test_a_gap_is_counted_from_the_frame_before_the_kill_to_the_end() -> None:
    """Also where no frame came any more, or none had come before."""
    s = 1_000_000_000
    assert summary.longest_gap_s([0, 1 * s, 7 * s, 8 * s], 2 * s, 8 * s) == 6
    assert summary.longest_gap_s([0, 1 * s], 2 * s, 11 * s) == 10
    assert summary.longest_gap_s([], 2 * s, 5 * s) == 3
    assert summary.longest_gap_s([0, 90 * s, 91 * s], 90 * s + 1, 92 * s) == 1


def row(block: int, version: int, denoiser_ms: int, end_ms: int) -> BlockRow:
    spans = {"denoiser": (0, denoiser_ms * MS), "vae_decoder": (0, 5 * MS), "output": (0, end_ms * MS)}
    return BlockRow(block=block, version=version, spans=spans)


def test_blocks_with_a_switch_are_apart_and_no_interval_spans_a_hole() -> None:
    rows = [row(3, 0, 10, 100), row(4, 0, 11, 120), row(5, 1, 30, 160), row(6, 1, 12, 180), row(9, 1, 13, 900)]
    device = BlockTimes(stage="denoiser", block=5, version=1, began_ns=0, ended_ns=1, device_ms=25.0)
    times = summary.block_times(rows, Recording(blocks=[device]))
    assert (times["switch"]["interval"].max, times["switch"]["denoiser"].max) == (40, 30)
    assert times["switch"]["denoiser device"].max == 25
    assert (times["plain"]["interval"].count, times["plain"]["interval"].max) == (2, 20)
    assert times["plain"]["denoiser"].max == 12


def test_a_switch_is_counted_without_its_wait_for_the_boundary() -> None:
    def sample(version: int, wait: float, decode: float, cached: bool) -> SwitchSample:
        parts = {"encode": 1.0, "wait": wait, "switch": 2.0, "denoise": 3.0, "decode": decode}
        return SwitchSample(prompt=0, version=version, block=9, cached=cached, ms=sum(parts.values()), parts=parts)

    times = summary.switch_times([sample(1, 500, 4, False), sample(2, 5, 10, True), sample(3, 50, 6, False)])
    assert times["without the wait"] == (12, 16)
    assert times["of these, cached"] == (16, 16)
    assert times["accepted to sinks"] == (62, 510)
    assert summary.switch_times([]) == {}


def test_a_worker_that_left_memory_behind_fails_its_check() -> None:
    def killed(before: int | None, after: int | None) -> bool | None:
        return summary.kill_check(Killed("denoiser", 1.0, 2.0, 2.0, before, after)).passed

    assert killed(None, None) is True
    assert [killed(1000, after) for after in (500, 1000, 1019, 1021)] == [True, True, True, False]


def test_lost_frames_and_what_is_left_fail() -> None:
    assert [summary.file_check(12, n, "f").passed for n in (12, 11, 13, None)] == [True, False, False, None]
    assert summary.file_check(0, 0, "f").passed is False
    assert [c.passed for c in summary.left_checks([], 0, 10 * MIB)] == [True, True]
    assert [c.passed for c in summary.left_checks(["denoiser (7)"], 0, 100 * MIB)] == [False, False]
    assert summary.failed(summary.left_checks([], None, None)) == []


class Memory:
    """A GPU whose memory grows with every look."""

    name = "fake"

    def __init__(self) -> None:
        self.looks = 0

    def used(self) -> int:
        self.looks += 1
        return self.looks

    def by_process(self) -> dict[int, int]:
        return {1: 7, 99: 8}


def test_a_watch_tells_of_workers_it_knows_and_of_none_that_is_gone() -> None:
    with Watch(Memory(), {"init": 1, "gone": 2**22 + 1}, every_s=0.01) as watch:
        while len(watch.samples) < 2:
            watch._ended.wait(0.01)
    first, second = watch.samples[:2]
    assert (first.gpu, second.gpu, first.gpu_by_worker) == (1, 2, {"init": 7})
    assert first.resident["init"] > 0 and "gone" not in first.resident


@pytest.mark.timeout(300)
def test_a_whole_run_holds_all_its_checks(tmp_path: Path) -> None:
    """Stages that share a process are killed once and come back, every frame is in the file, nothing is left."""
    report, script = tmp_path / "soak.json", REPOSITORY / "scripts" / "gpu" / "soak.py"
    small = (*TINY, "placement=thread", "video.height=64", "video.width=96", "model.vae.base_dim=8")
    sizes = [word for setting in small for word in ("--set", setting)]
    words = ("--config", "pocket", "--seconds", "2", "--switch-every", "0.5", "--out", tmp_path, "--json", report)
    ran = subprocess.run([sys.executable, script, *words, *sizes], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(report.read_text())
    checks = {check["name"]: check["passed"] for check in told["checks"]}
    kept = ("recovery: text_encoder", "each worker restarted once", "frames written", "no process left")
    assert [checks[name] for name in kept] == [True] * 4
    assert len(told["killed"]) == 1 and told["killed"][0]["gap_s"] > 0
    assert told["switches"] >= 1 and told["block_ms"]["plain"]["interval"]["count"] >= 1
    assert "no GPU" in ran.stdout
