"""The benchmark on the real runtime finds faults that were put in, and none where there is none.

Times of a machine that does other work too prove nothing, so what depends on them runs with QUIET_MACHINE=1 alone;
`tests/test_bench_commands.py` and `tests/test_bench_statistics.py` hold the same with times that are made up.
"""

import os
import sys
from pathlib import Path
from statistics import median

import pytest
from faulty_daemon import is_late
from stage_case import tiny_config
from tiny_files import TINY

from orchestrator.bench.compare import Contest, compare, contender
from orchestrator.bench.recording import Recording
from orchestrator.bench.report import Steady
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.steady import stage_times, steady_of

pytestmark = pytest.mark.timeout(300)
FAULTY = (sys.executable, str(Path(__file__).parent / "faulty_daemon.py"))
SMALL = (*TINY, "video.height=32", "video.width=32", "model.vae.base_dim=8")
WARMUP = 8
quiet = pytest.mark.skipif("QUIET_MACHINE" not in os.environ, reason="needs a quiet machine: QUIET_MACHINE=1")


def recorded(fault: str, blocks: int, pace: str = "free") -> Recording:
    return record(Subject("pocket", SMALL, (("FAULT", fault),), FAULTY), WARMUP + blocks, (f"output.pace={pace}",))


def test_a_leak_is_found_in_the_worker_that_has_it() -> None:
    """1 MiB a block in the VAE decoder; every stage told of every block on the way."""
    found = steady_of(recorded("leak", 24), tiny_config(), WARMUP)
    assert found.blocks == 24
    assert [memory.worker for memory in found.leaks] == ["vae_decoder"]
    (leaking,) = found.leaks
    assert leaking.trend.bytes_a_block == pytest.approx(2**20, rel=0.15)
    assert [row.block for row in found.rows] == list(range(WARMUP, WARMUP + 24))


@quiet
def test_a_delay_of_5_ms_shows_in_its_stage_only() -> None:
    """Within 10 %. The delay comes and goes in one run, because two runs of one thing differ by as much.

    One stage at a time: of stages that share cores and their caches, one that waits makes the others faster.
    """
    found = steady_of(recorded("delay", 600, "serial"), tiny_config(), WARMUP)
    assert found.blocks == 600
    assert added(found, "denoiser") == pytest.approx(5.0, rel=0.1)
    assert abs(added(found, "vae_decoder")) < 0.5
    assert abs(added(found, "output")) < 0.5


def added(found: Steady, stage: str) -> float:
    """Milliseconds by which late blocks are above the ones before and after, in the median."""
    times = stage_times(found.rows, stage)
    late = [at for at in range(1, len(times) - 1) if is_late(found.rows[at].block)]
    return median(times[at] - (times[at - 1] + times[at + 1]) / 2 for at in late)


@quiet
@pytest.mark.timeout(3600)
def test_equal_configurations_compare_to_one() -> None:
    """In 9 of 10 comparisons, each of new runs."""
    subject = Subject("pocket", SMALL)
    held = 0
    for seed in range(10):
        contest = Contest("equal", [contender(name, subject, 40) for name in ("one", "other")], 5)
        *_, (comparison,) = compare([contest], seed, lambda line: None)
        interval = comparison.ratios["block"]["other"]
        held += interval.low <= 1.0 <= interval.high
    assert held >= 9
