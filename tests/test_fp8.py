"""Linears in e4m3: how much they err, what they weigh, and that nothing else is multiplied."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import cases, load, relative_error
from stream_case import CPU, SMALL, embeds, new_rollout, tiny_transformer
from teacher_forced import worst_error
from torch import Tensor

from configs.load import load_config
from configs.schema import LAYER_LINEARS, StreamConfig
from ipc.errors import ConfigError
from workers.models.denoise import Rollout
from workers.models.execution import choose_passes, linear_shapes
from workers.models.fp8 import (
    FAR,
    Fp8Linear,
    Fp8Linears,
    Linear,
    Multiply,
    choose_multiply,
    multiply_codes,
    scaled_mm,
)
from workers.models.kernels import E4M3, TORCH, Codes, quantised
from workers.models.noise import DrawnNoise
from workers.models.passes import PlainPasses
from workers.models.static_passes import StaticPasses

STREAMS = cases("stream")
BAR = 8e-2
FP8 = "execution.linears=fp8"
TINY = (FP8, "video.height=32", "video.width=32")


def runs_here() -> bool:
    """Whether `torch._scaled_mm` takes scales by row on this CPU; torch 2.11 does not."""
    codes = quantised(torch.ones(16, 16), torch.float8_e4m3fn)
    try:
        scaled_mm(codes, codes, torch.ones(16), torch.float32)
    except RuntimeError:
        return False
    return True


by_scaled_mm = pytest.param(
    scaled_mm, marks=pytest.mark.skipif(not runs_here(), reason="torch._scaled_mm takes no scales by row on this CPU")
)
products = pytest.mark.parametrize("multiply", [multiply_codes, by_scaled_mm], ids=lambda f: f.__name__)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@products
@pytest.mark.parametrize("path", STREAMS, ids=lambda path: f"golden-{path.name}-static")
def test_fp8_linears_stay_near_float32(path: Path, multiply: Multiply, tmp_path: Path) -> None:
    """Teacher-forced; and they are really used, so some error there is."""

    def in_fp8(*parts: Any) -> StaticPasses:
        return StaticPasses(*parts, linear=Fp8Linears(multiply=multiply))

    assert 1e-3 < worst_error(load(path), tmp_path / "model", in_fp8) <= BAR


@products
@dtypes
def test_a_linear_is_the_product_of_its_codes(multiply: Multiply, dtype: torch.dtype) -> None:
    """Every token and every output channel uses the whole range of e4m3; written out in float64."""
    x = (numbers(5, 32) * torch.tensor([1e-2, 1.0, 1e2, 1.0, 0.0])[:, None]).to(dtype)
    weight, bias = (numbers(48, 32, seed=1) * torch.logspace(-2, 1, 48)[:, None]).to(dtype), numbers(48).to(dtype)
    sides = []
    for side in (x, weight):
        scale = side.float().abs().amax(1, keepdim=True) / 448
        codes = torch.where(scale > 0, side.float() / scale, 0.0).to(torch.float8_e4m3fn)
        sides.append(codes.double() * scale.double())
    expected = sides[0] @ sides[1].T + bias.double()
    made = Fp8Linear(weight, bias, multiply)(x)
    assert made.dtype == dtype
    assert torch.isfinite(made).all()
    off = (made.double() - expected).abs() / (sides[0].abs() @ sides[1].abs().T + bias.double().abs())
    assert float(off.max()) <= 2 * torch.finfo(dtype).eps
    assert relative_error(made.double(), x.double() @ weight.double().T + bias.double()) > 5e-3


def refuses(*operands: object) -> Tensor:
    raise RuntimeError("needs a newer device\nand a traceback")


def is_right(x: Codes, weight: Codes, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return multiply_codes(x, weight, bias, dtype)


def is_wrong(x: Codes, weight: Codes, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return multiply_codes(x, weight, 2 * bias, dtype)


@pytest.mark.parametrize(
    ("fast", "taken", "said"),
    [
        (is_right, is_right, "torch._scaled_mm"),
        pytest.param(*by_scaled_mm.values, scaled_mm, "torch._scaled_mm", marks=by_scaled_mm.marks),
        (refuses, multiply_codes, "float32 products of e4m3 codes, as torch._scaled_mm refuses: needs a newer device"),
        (is_wrong, multiply_codes, "float32 products of e4m3 codes, as torch._scaled_mm is"),
    ],
    ids=["right", "torch", "refuses", "wrong"],
)
@dtypes
def test_the_fast_product_is_tried_once(fast: Multiply, taken: Multiply, said: str, dtype: torch.dtype) -> None:
    """Where it is missing or wrong e4m3 is multiplied all the same, and that is said."""
    chosen = choose_multiply({(32, 16), (48, 32)}, 7, CPU, dtype, fast)
    assert chosen.multiply is taken
    assert chosen.by.startswith(said)


def test_what_is_kept_stays_as_it_is() -> None:
    linears = Fp8Linears(["blocks.*.ffn.2", "blocks.1.*"])
    StaticPasses(tiny_transformer(), StreamConfig(), SMALL, linear=linears)
    assert set(linears.made) == {f"blocks.0.{name}" for name in LAYER_LINEARS if name != "ffn.2"}


def test_with_all_kept_nothing_changes() -> None:
    kept, exact = (
        StaticPasses(tiny_transformer(), StreamConfig(), SMALL, **given)
        for given in ({"linear": Fp8Linears(["*"])}, {})
    )
    assert torch.equal(*(first_blocks(passes, 3) for passes in (kept, exact)))


@pytest.mark.parametrize("kept", [(), *((f"blocks.*.{name}",) for name in LAYER_LINEARS), ("blocks.1.*", "*.0.ffn.?")])
def test_codes_made_before_a_linear_are_those_it_would_make(
    kept: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to the bit, and every linear in e4m3 is given codes; those that are kept, and the head, tensors."""

    def by_itself(name: str, weight: Tensor, bias: Tensor) -> Linear:
        made = Fp8Linears(kept)(name, weight, bias)
        return lambda x: made(x)

    late = first_blocks(StaticPasses(tiny_transformer(), StreamConfig(), SMALL, linear=by_itself), 3)
    given, call = set(), Fp8Linear.__call__
    monkeypatch.setattr(Fp8Linear, "__call__", lambda self, x: given.add(type(x)) or call(self, x))
    early = first_blocks(StaticPasses(tiny_transformer(), StreamConfig(), SMALL, linear=Fp8Linears(kept)), 3)
    assert given == {Codes}
    assert torch.equal(early, late)


def first_blocks(passes: StaticPasses, blocks: int) -> Tensor:
    """With a prompt switch before the last."""
    rollout = Rollout(passes.model, passes.stream, SMALL, passes=passes)
    rollout.switch(embeds(0))
    noise, made = DrawnNoise(0, rollout.shape), []
    for block in range(blocks):
        if block == blocks - 1 > 0:
            rollout.switch(embeds(1))
        made.append(rollout.denoise_block(noise))
    return torch.cat(made, 1)


def test_weights_in_fp8_are_given_up_by_a_model_of_ones_own() -> None:
    """And the stream goes on with the same numbers, recaches included."""
    config = load_config("pocket", [*TINY, "execution.fp8_keep=[blocks.0.ffn.*]"])
    shared = first_blocks(choose_passes(config, tiny_transformer()), 6)
    model, notes = tiny_transformer(), []
    before = sum(parameter.nbytes for parameter in model.parameters())
    passes = choose_passes(config, model, say=notes.append, own=True)
    said = next(note for note in notes if "fp8" in note)
    by = choose_multiply(linear_shapes(model.config), 12, CPU, torch.float32).by
    assert said.startswith("10 linears in fp8, ") and said.endswith(f", by {by}")
    assert torch.equal(first_blocks(passes, 6), shared)
    kept = sum(parameter.nbytes for parameter in model.parameters() if parameter.device == CPU)
    gone = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert {"blocks.0.self_attn.k.weight", "blocks.1.ffn.2.weight", "blocks.1.cross_attn.q.bias"} <= gone
    assert not gone & {"blocks.0.ffn.0.weight", "blocks.0.cross_attn.k.weight", "head.head.weight"}
    dim, wide = model.config.dim, model.config.ffn_dim
    assert before - kept >= 4 * (2 * 6 * dim * dim + 2 * dim * wide)
    gc.collect()
    held = [t.shape for t in gc.get_objects() if type(t) is Tensor and t.is_cpu and t.dtype == torch.float32]
    assert (3 * dim, dim) not in held, "the fused weight of query, key and value"


def test_a_shared_model_keeps_its_weights() -> None:
    model = tiny_transformer()
    passes = choose_passes(load_config("pocket", TINY), model)
    assert isinstance(passes, StaticPasses)
    plain = Rollout(model, passes.stream, SMALL, passes=PlainPasses(model, passes.stream, SMALL))
    plain.switch(embeds(0))
    noise = DrawnNoise(0, plain.shape)
    error = relative_error(first_blocks(passes, 1), plain.denoise_block(noise))
    assert 1e-3 < error < BAR


def test_codes_and_scales_are_all_that_is_kept() -> None:
    weight = numbers(64, 128)
    linear = Fp8Linear(weight, numbers(64))
    assert linear.nbytes == 64 * 128 + 4 * 64
    assert linear.nbytes_before == 4 * 64 * 128
    assert {part.dtype for part in linear.weight} == {torch.float8_e4m3fn, torch.float32}


@products
@torch.no_grad()
def test_a_pass_in_fp8_compiles_whole(multiply: Multiply) -> None:
    """So nothing of it is read back, and it can be recorded."""
    rollout = new_rollout(tiny_transformer(), StreamConfig(), SMALL, execution="static")
    passes = StaticPasses(rollout.model, StreamConfig(), SMALL, linear=Fp8Linears(multiply=multiply))
    passes.take_prompt(embeds(0))
    shape = passes.fill(rollout.layout.denoise(0, 0), 0, DrawnNoise(0, rollout.shape))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: passes.static.flow(0, shape), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), passes.static.flow(0, shape))


def test_scales_of_zeros_are_finite() -> None:
    codes = quantised(torch.zeros(2, 16), torch.float8_e4m3fn)
    bias = numbers(16)
    assert torch.equal(multiply_codes(codes, codes, bias[:2], torch.float32), bias[:2].expand(2, 2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([FP8, "execution.denoiser=plain"], "linears: fp8 needs denoiser: static, found denoiser: plain"),
        (["execution.fp8_keep=[blocks.*]"], "fp8_keep needs linears: fp8, found linears: model"),
        ([FP8, "execution.fp8_keep=[blocks.*, blocks.6.*]"], r"found blocks\.6\.\*, .* blocks\.0\.self_attn\.qkv"),
        ([FP8, "execution.fp8_keep=[ffn.2]"], r"found ffn\.2, which fits no linear, .* up to blocks\.5\.ffn\.2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config("pocket", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("width", "fast"), [(1536, True), (8960, False)])
def test_long_sums_are_not_left_to_short_accumulators(width: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LongLive-1.3B's linears the feed-forward's second is summed in float32."""
    asked = []

    def product(a: Tensor, b: Tensor, *, use_fast_accum: bool, **given: Any) -> Tensor:
        asked.append(use_fast_accum)
        return torch.zeros(len(a), b.shape[1])

    monkeypatch.setattr(torch, "_scaled_mm", product)
    scaled_mm(quantised(numbers(2, width), E4M3), quantised(numbers(4, width), E4M3), torch.zeros(4), torch.bfloat16)
    assert asked == [fast]


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
)


@on_a_gpu
def test_scaled_mm_is_taken_on_a_gpu() -> None:
    """In the widths of LongLive-1.3B; 4,680 tokens are no multiple of a tile."""
    shapes = linear_shapes(load_config("longlive-1.3b").model.transformer)
    assert choose_multiply(shapes, 4680, torch.device("cuda"), torch.bfloat16).by == "torch._scaled_mm"


@on_a_gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "0", reason="needs TRITON_INTERPRET=0")
@pytest.mark.parametrize(("operation", "out", "width"), [("gelu", 1536, 8960), ("rows", 1536, 1536)])
def test_fused_codes_are_multiplied_on_a_gpu(operation: str, out: int, width: int) -> None:
    """Triton's codes by `torch._scaled_mm`, where LongLive-1.3B's feed-forward and attention end."""
    from workers.models.triton_kernels import TRITON

    sizes = ((4680, width), (out, width), (out,))
    x, weight, bias = (numbers(*size, seed=i).to("cuda", torch.bfloat16) for i, size in enumerate(sizes))
    made, defined = (
        Fp8Linear(weight, bias, multiply)(getattr(kernels.fp8, operation)(x))
        for kernels, multiply in ((TRITON, scaled_mm), (TORCH, multiply_codes))
    )
    assert relative_error(made.double(), defined.double()) <= FAR
