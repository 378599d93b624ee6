"""Eight bits for keys and values: how much they err, what they weigh, and that attention sees nothing else."""

from pathlib import Path

import pytest
import torch
from golden_cases import Case, cases, load, relative_error
from stream_case import CPU, SMALL, case_rollout, embeds, tiny_transformer

from configs.schema import StreamConfig
from workers.models.denoise import Rollout
from workers.models.kv_store import LARGEST, KVStore, QuantisedKVStore, quantised
from workers.models.noise import DrawnNoise, GivenNoise
from workers.models.static_passes import StaticPasses

STREAMS = cases("stream")
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
BARS = {"int8": 1e-2, "fp8": 5e-2}
kinds = pytest.mark.parametrize("kind", CODES)


def take_over(mine: QuantisedKVStore, exact: KVStore) -> None:
    """The same context in 8 bits."""
    code = mine.k.dtype
    for codes, scales, values in (
        (mine.k, mine.k_scale, exact.k),
        (mine.v, mine.v_scale, exact.v),
        (mine.sink_k, mine.sink_scale, exact.sink_k),
    ):
        made = quantised(values, code)
        codes.copy_(made.codes)
        scales.copy_(made.scale)


def worst_error(case: Case, folder: Path, kind: str) -> float:
    """Of the clean latents of every step of every block, each from the exact stream's context, latents and noise."""
    exact = case_rollout(case, folder, "static")
    assert isinstance(exact.passes, StaticPasses)
    config = exact.passes.stream
    video = SMALL.model_copy(update={"height": 8 * exact.shape[2], "width": 8 * exact.shape[3]})
    other = StaticPasses(exact.model, config, video, kv=kind)  # type: ignore[arg-type]
    assert isinstance(other.static.store, QuantisedKVStore)
    noise = GivenNoise(case.tensors["noise"], case.tensors["renoise"], exact.shape, len(exact.schedule.steps))
    prompt = case.tensors["prompt_embeds"][:1]
    exact.switch(prompt)
    other.take_prompt(prompt)
    errors = []
    with torch.inference_mode():
        for block in range(case.config["num_blocks"]):
            plan = exact.layout.denoise(block, exact.anchor)
            shape = exact.passes.fill(plan, block, noise)
            other.fill(plan, block, noise)
            for step in range(len(exact.schedule.steps)):
                take_over(other.static.store, exact.passes.static.store)
                latents = exact.passes.static.latents.clone()
                other.static.latents.copy_(latents)
                sigma = exact.passes.static.sigmas[step]
                flows = [passes.static.flow(step, shape) for passes in (other, exact.passes)]
                errors.append(relative_error(*(latents - sigma * flow for flow in flows)))
                exact.passes.static.latents.copy_(latents)
                exact.passes.static.step(step, shape)
            exact.passes.static.remember(shape)
    return max(errors)


@kinds
@pytest.mark.parametrize("path", STREAMS, ids=lambda path: f"golden-{path.name}-static")
def test_eight_bits_stay_near_float32(path: Path, kind: str, tmp_path: Path) -> None:
    """Teacher-forced; and they are really used, so some error there is."""
    error = worst_error(load(path), tmp_path / "model", kind)
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
    head_dim = model.config.head_dim
    assert passes.nbytes / exact.nbytes == pytest.approx((head_dim + 4) / (4 * head_dim))
    assert model.device == CPU
