"""Eight bits for keys and values: how much they err, what they weigh, and that attention sees nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import cases, load
from stream_case import CPU, SMALL, embeds, tiny_transformer
from teacher_forced import worst_error

from configs.schema import StreamConfig
from workers.models.denoise import Rollout
from workers.models.kernels import LARGEST, quantised
from workers.models.kv_store import QuantisedKVStore, new_store
from workers.models.noise import DrawnNoise
from workers.models.static_passes import StaticPasses

STREAMS = cases("stream")
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
BARS = {"int8": 1e-2, "fp8": 5e-2}
kinds = pytest.mark.parametrize("kind", CODES)


@kinds
@pytest.mark.parametrize("path", STREAMS, ids=lambda path: f"golden-{path.name}-static")
def test_eight_bits_stay_near_float32(path: Path, kind: str, tmp_path: Path) -> None:
    """Teacher-forced; and they are really used, so some error there is."""

    def eight_bits(*parts: Any) -> StaticPasses:
        passes = StaticPasses(*parts, kv=kind)  # type: ignore[arg-type]
        assert isinstance(passes.static.store, QuantisedKVStore)
        return passes

    error = worst_error(load(path), tmp_path / "model", eight_bits)
    assert 1e-6 < error <= BARS[kind]


@kinds
def test_codes_use_their_range(kind: str) -> None:
    x = (
        torch.randn(3, 5, 2, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 1e6])[:, None, None, None]
    )
    codes, scale = quantised(x, CODES[kind])
    assert (codes.float().abs().amax(-1) == LARGEST[CODES[kind]]).all()
    step = 0.5 / 127 if kind == "int8" else 2**-4
    assert ((codes.float() * scale - x).abs() <= step * x.abs().amax(-1, keepdim=True) * 1.001).all()
    zero = quantised(torch.zeros(1, 1, 4), CODES[kind])
    assert not zero.codes.float().any() and torch.isfinite(zero.scale).all()


@kinds
def test_a_stream_in_eight_bits_weighs_less_and_stays_finite(kind: str) -> None:
    """Long enough for the sink to move many times: what is rounded anew does not add up."""
    model, stream = tiny_transformer(), StreamConfig()
    exact = StaticPasses(model, stream, SMALL)
    passes = StaticPasses(model, stream, SMALL, kv=kind)  # type: ignore[arg-type]
    rollout = Rollout(model, stream, SMALL, passes=passes)
    rollout.switch(embeds(0))
    noise = DrawnNoise(0, rollout.shape)
    for block in range(40):
        if block == 20:
            rollout.switch(embeds(1))
        latents = rollout.denoise_block(noise)
    assert 0.01 < float(latents.std()) < 100
    head_dim, slots = model.config.head_dim, stream.window_blocks
    as_seen_by_one_layer = 2 * slots / (2 * slots + stream.sink_blocks) / model.config.num_layers
    assert passes.nbytes / exact.nbytes == pytest.approx((head_dim + 4) / (4 * head_dim) + as_seen_by_one_layer)
    assert model.device == CPU


@kinds
def test_the_blocks_at_work_are_seen_as_they_are_and_the_past_through_its_codes(kind: str) -> None:
    stream = StreamConfig()
    sizes = {"layers": 2, "heads": 2, "head_dim": 8, "frame_tokens": 4, "device": CPU}
    first, second = new_store(kind, stream, torch.float32, **sizes).layers  # type: ignore[arg-type]
    tokens, random = first.block_tokens, torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.randn(tokens, 2, 8, generator=random)

    past, now, other = (drawn(), drawn()), (drawn(), drawn()), (drawn(), drawn())
    first.write(torch.tensor([1]), *past)
    second.write(torch.tensor([1]), *other)
    first.write(torch.tensor([2]), *now)
    for seen, was, present in zip(first.visible(3), past, now, strict=True):
        codes, scale = quantised(was, CODES[kind])
        assert torch.equal(seen[tokens : 2 * tokens], codes.float() * scale)
        assert torch.equal(seen[2 * tokens :], present)
