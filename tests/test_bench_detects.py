"""The benchmark on the real runtime finds faults that were put in, and none where there is none.

Times of a machine that does other work too prove nothing, so what depends on them runs with QUIET_MACHINE=1 alone;
`tests/test_bench_commands.py` and `tests/test_bench_statistics.py` hold the same with times that are made up.
"""

import os
import sys
from pathlib import Path
from statistics import median

import pytest
from stage_case import tiny_config
from tiny_files import TINY

from orchestrator.bench.compare import compare, contender
from orchestrator.bench.report import Steady
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.steady import steady_of

pytestmark = pytest.mark.timeout(300)
FAULTY = (sys.executable, str(Path(__file__).parent / "faulty_daemon.py"))
SMALL = (*TINY, "video.height=32", "video.width=32", "model.vae.base_dim=8")
WARMUP = 8
quiet = pytest.mark.skipif("QUIET_MACHINE" not in os.environ, reason="needs a quiet machine: QUIET_MACHINE=1")


def steady(fault: str, blocks: int) -> Steady:
    recording = record(Subject("pocket", SMALL, (("FAULT", fault),), FAULTY), WARMUP + blocks)
    return steady_of(recording, tiny_config(), WARMUP)


def test_a_leak_is_found_in_the_worker_that_has_it() -> None:
    """1 MiB a block in the VAE decoder; every stage told of every block on the way."""
    found = steady("leak", 24)
    assert found.blocks == 24
    assert [(memory.worker, memory.trend.leak) for memory in found.memory if memory.trend.leak] == [
        ("vae_decoder", True)
    ]
    (leaking,) = found.leaks
    assert leaking.trend.bytes_a_block == pytest.approx(2**20, rel=0.15)
    assert [row.block for row in found.rows] == list(range(WARMUP, WARMUP + 24))


@quiet
def test_a_delay_of_5_ms_shows_in_its_stage_only() -> None:
    """Within 10 %; runs in turn, because two runs of one thing differ too."""
    runs = [(steady("", 150), steady("delay", 150)) for _ in range(3)]
    added = {
        stage: median(late.stage_ms[stage].p50 - plain.stage_ms[stage].p50 for plain, late in runs)
        for stage in ("denoiser", "vae_decoder")
    }
    assert added["denoiser"] == pytest.approx(5.0, rel=0.1)
    assert abs(added["vae_decoder"]) < 0.5


@quiet
@pytest.mark.timeout(3600)
def test_equal_configurations_compare_to_one() -> None:
    subject = Subject("pocket", SMALL)
    held = 0
    for seed in range(10):
        sides = [contender(name, subject, 40) for name in ("one", "other")]
        interval = compare("equal", sides, 5, seed, lambda line: None).ratios["block"]["other"]
        held += interval.low <= 1.0 <= interval.high
    assert held >= 9
