"""The denoiser in 16 bits: both ways run, stay near float32, and lose nothing to the range of float16."""

import pytest
import torch
from golden_cases import relative_error
from stream_case import SMALL, embeds, tiny_transformer
from torch import Tensor

from configs.schema import StreamConfig
from workers.models.denoise import Rollout
from workers.models.fp8 import Fp8Linears
from workers.models.kernels import norm_modulate, rms_norm
from workers.models.noise import DrawnNoise
from workers.models.passes import Passes, PlainPasses
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer, LayerNorm, RMSNorm

BARS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", BARS, ids=str)
BLOCKS = 8


def stream(model: CausalWanTransformer, passes: Passes) -> Tensor:
    """Until after the window has slid and the prompt was switched."""
    rollout = Rollout(model, StreamConfig(), SMALL, passes=passes)
    rollout.switch(embeds(0))
    noise, made = DrawnNoise(0, rollout.shape), []
    for block in range(BLOCKS):
        if block == BLOCKS - 2:
            rollout.switch(embeds(1))
        made.append(rollout.denoise_block(noise))
    return torch.cat(made, 1)


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """The plain way in float32."""
    model = tiny_transformer()
    return stream(model, PlainPasses(model, StreamConfig(), SMALL))


@pytest.mark.parametrize("passes", [PlainPasses, StaticPasses])
@dtypes
def test_a_stream_in_any_dtype_is_near_float32(passes: type[Passes], dtype: torch.dtype, exact: Tensor) -> None:
    model = tiny_transformer().to(dtype)
    made = stream(model, passes(model, StreamConfig(), SMALL))
    assert made.dtype == torch.float32
    assert torch.isfinite(made).all()
    assert relative_error(made, exact) <= BARS[dtype]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@dtypes
def test_eight_bits_go_with_any_dtype(kind: str, dtype: torch.dtype, exact: Tensor) -> None:
    """Linears in fp8 and keys and values in 8 bits at once; what they cost, rounding to 16 bits does not raise."""
    model = tiny_transformer().to(dtype)
    passes = StaticPasses(model, StreamConfig(), SMALL, kv=kind, linear=Fp8Linears())  # type: ignore[arg-type]
    made = stream(model, passes)
    assert torch.isfinite(made).all()
    assert relative_error(made, exact) <= 8e-2


@dtypes
@torch.no_grad()
def test_squares_are_summed_in_float32(dtype: torch.dtype) -> None:
    """60,000 is a number of float16, its square is not."""
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 15_000).to(dtype)
    wide, one = x.float(), torch.ones(64)
    rms = wide / wide.square().mean(-1, keepdim=True).sqrt()
    layer = (wide - wide.mean(-1, keepdim=True)) / wide.var(-1, unbiased=False, keepdim=True).sqrt()
    for made, expected in (
        (RMSNorm(64, 1e-6).to(dtype)(x), rms),
        (rms_norm(x, one.to(dtype), 1e-6), rms),
        (LayerNorm(64, eps=1e-6, elementwise_affine=False)(x), layer),
        (norm_modulate(x, one, 0 * one, 1e-6), layer),
    ):
        assert relative_error(made.float(), expected) <= torch.finfo(dtype).eps
