"""The microbenchmarks for a GPU run to their end on a CPU, at a size at which no figure means anything."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from configs.load import load_config
from gpu.micro.attention import in_float32, sizes
from gpu.micro.bench import Bench, off_by
from gpu.micro.denoiser import drawn_transformer, flops_of_a_block
from gpu.micro.rows import Row, table
from gpu.microbench import FULL, SECTIONS, TINY
from workers.models.static import attention

pytestmark = pytest.mark.timeout(240)
SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu" / "microbench.py"
EXPECTED = {
    "env": ["torch", "commit"],
    "ceilings": ["float32, 64 cubed", "e4m3, 64 cubed, one scale", "copy of 0.06 MiB"],
    "attention": ["flash3", "flash3 in e4m3", "sdpa, 6 queries, 24 keys", "math, 18 queries, 18 keys"],
    "gemm": ["ffn up, 6 rows, float32 with bias, ends with gelu", "ffn down, 18 rows, e4m3"],
    "elementwise": ["gate_norm_modulate, rows in e4m3, triton", "write_qkv, torch", "write_qkv, kept in int8, triton"],
    "noise": ["a block's noise drawn on the host", "replay against eager", "replay against replay"],
    "block": [f"{preset}, a block" for preset in ("reference", "quality", "balanced", "speed")],
    "vae": ["all convolutions", "plain class, conv3d", "static, torch", "tiny decoder"],
}


class Ran(NamedTuple):
    """What a run left."""

    said: str
    found: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All sections, as a person starts them, away from the checkout."""
    folder = tmp_path_factory.mktemp("micro")
    files = ["--json", "found/micro.json", "--markdown", "found/micro.md"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--commit", "abc", *files],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]} {done.stderr}"
    rows, page = (folder / "found" / name for name in ("micro.json", "micro.md"))
    return Ran(done.stdout, json.loads(rows.read_text()), page.read_text())


def test_every_section_makes_its_rows(ran: Ran) -> None:
    """None fails or runs out of time."""
    assert ran.found["environment"]["commit"] == "abc"
    assert EXPECTED.keys() == SECTIONS.keys()
    for section, names in EXPECTED.items():
        rows = {row["name"]: row for row in ran.found["rows"] if row["section"] == section}
        assert names == [name for name in names if name in rows], section
    problems = [row for row in ran.found["rows"] if row["note"].startswith(("failed", "left out"))]
    assert problems == []


def test_what_is_measured_is_right(ran: Ran) -> None:
    """What rounds to float32 is no further off than that; codes in e4m3, which the interpreter cuts, not far."""
    for row in ran.found["rows"]:
        if row["error"] is not None:
            coded = "e4m3" in row["name"] or row["name"].startswith("speed")
            assert row["error"] < (0.2 if coded else 1e-3), row
        assert row["ms"] is None or row["ms"] > 0


def test_a_replayed_block_has_the_bits_of_a_launched_one(ran: Ran) -> None:
    notes = {row["name"]: row["note"] for row in ran.found["rows"] if row["section"] == "noise"}
    assert notes["replay against eager"].endswith(": equal to the bit")
    assert notes["replay against replay"].endswith(": equal to the bit")
    assert notes["the device's generator after a replay"] == "where it was"


def test_the_page_has_every_row(ran: Ran) -> None:
    for row in ran.found["rows"]:
        assert f"| {row['name']} |" in ran.page
        assert row["name"] in ran.said
    assert "| commit | abc |" in ran.page


def test_an_unknown_section_is_refused() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "vea"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "found vea, expected one of env, " in done.stderr


def test_a_section_that_fails_says_so_and_the_next_goes_on() -> None:
    said: list[str] = []
    bench = Bench(load_config("longlive-1.3b", [*FULL, *TINY, "device=cpu"]), said.append)
    with bench.section("gemm", 10.0):
        bench.measure("one", [lambda: torch.ones(2) @ torch.ones(3)])
        raise ImportError("no such thing\nand more")
    with bench.section("vae", 10.0):
        bench.measure("two", [lambda: torch.ones(2)], flops=1.0)
    with bench.section("noise", -1.0):
        bench.measure("three", [lambda: torch.ones(2)])
    one, failed, two, late = bench.rows
    assert one.ms is None and one.note.startswith("failed: RuntimeError")
    assert failed == Row("gemm", "section", note="failed: ImportError: no such thing")
    assert two.section == "vae" and two.ms is not None and two.tflops is not None
    assert late.note == "left out: the section's time was over"


def test_a_table_has_no_empty_column() -> None:
    rows = [Row("vae", "a", ms=0.5), Row("vae", "b", ms=1234.4, note="x|y")]
    assert table(rows) == ["| what | ms | note |", "|---|---|---|", "| a | 0.5000 |  |", "| b | 1234 | x\\|y |"]


def test_full_size_is_longlive() -> None:
    """Queries, keys and operations that documents give for LongLive-1.3B."""
    config = load_config("longlive-1.3b", [*FULL, "device=cpu"])
    bench = Bench(config, lambda line: None)
    assert sizes(bench) == [(4680, 4680), (4680, 9360), (4680, 14040), (4680, 18720), (14040, 14040)]
    assert flops_of_a_block(config) == pytest.approx(141.5e12, rel=1e-3)


def test_attention_in_float32_is_softmax_with_its_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (torch.randn(*size, generator=generator) for size in ((5, 2, 8), (7, 2, 8), (7, 2, 8), (1, 7)))
    assert off_by(in_float32(q, k, v, bias), attention(q, k, v, bias)) < 1e-6


def test_drawn_weights_fill_the_model() -> None:
    """Each tensor, in the dtype that is asked for, the same every time."""
    config = load_config("longlive-1.3b", [*FULL, *TINY, "device=cpu"]).model.transformer
    first, again = (drawn_transformer(config, torch.device("cpu"), torch.bfloat16) for _ in range(2))
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert one.dtype == torch.bfloat16 and one.float().abs().max() > 0
        assert torch.equal(one, other)
