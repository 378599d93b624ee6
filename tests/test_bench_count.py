"""What `scripts/bench count` says of LongLive-1.3B's geometry, counted without a device."""

import pytest
from bench_count import Row, denoiser_rows, vae_rows

from configs.load import load_config
from configs.schema import RuntimeConfig


@pytest.fixture(scope="module")
def config() -> RuntimeConfig:
    return load_config("longlive-1.3b", ["model.path=null", "model.random_weights=true"])


def by_way(rows: list[Row]) -> dict[str, Row]:
    return {row.way: row for row in rows}


def test_a_block_is_the_operations_that_the_model_is_made_of(config: RuntimeConfig) -> None:
    """By hand, 390 GFLOP of linears, 538 of self- and 15 of cross-attention, in 30 layers of 5 passes."""
    rows = by_way(denoiser_rows(config))
    by_hand = 5 * 30 * (390e9 + 538e9 + 14.7e9)
    assert rows["denoiser, plain"].counted.flops == pytest.approx(by_hand, rel=0.01)
    assert rows["denoiser"].counted.flops < rows["denoiser, plain"].counted.flops
    assert rows["denoiser"].counted.bytes <= 150e9
    kernels = [rows[way].counted.kernels for way in ("denoiser", "denoiser, plain", "denoiser, straightforward")]
    assert kernels[0] < kernels[1] / 4 < kernels[2] / 8


def test_the_decoder_moves_less(config: RuntimeConfig) -> None:
    rows = by_way(vae_rows(config))
    straight, fast = rows["VAE, straightforward"].counted, rows["VAE"].counted
    assert straight.flops == pytest.approx(40.5e12, rel=0.02)
    assert fast.flops < straight.flops
    assert fast.bytes < straight.bytes / 2
