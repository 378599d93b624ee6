"""Triton kernels give what their twins in PyTorch give: under Triton's interpreter, or on a GPU if that is off.

The interpreter cuts float32 to bfloat16 where a GPU rounds to nearest even, and drops the carry when it rounds to
e4m3 (triton-lang/triton, pull request 11897); `exact_casts` has torch do both, and leaves it to kernels to clamp.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from golden_cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_case import SMALL, TINY, embeds, tiny_transformer
from torch import Tensor

from configs.schema import StreamConfig
from workers.models.denoise import Rollout
from workers.models.execution import linear_shapes
from workers.models.fp8 import Fp8Linears, MakeLinear, choose_multiply, plain_linear
from workers.models.fp8_attention import widened
from workers.models.kernels import TORCH, Codes, Kernels
from workers.models.kv_cache import CacheLayout
from workers.models.kv_store import KVStore, StoreKind, new_store
from workers.models.noise import DrawnNoise
from workers.models.rope import Rotation
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer
from workers.models.triton_kernels import TRITON

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
EPS = 1e-6
ROOT = Path(__file__).parent.parent
BAR = 8e-2
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
drawn = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def exact_casts() -> Iterator[None]:
    """The interpreter rounds as a GPU does."""
    casts = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
    theirs = interpreter._convert_float

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source != tl.float32 or target not in casts:
            return theirs(data, source, target, mode)
        dtype, bits = casts[target]
        made = torch.from_numpy(data.copy())
        if target == tl.float8e4nv:
            made[made.abs() > 464] = torch.nan  # torch clamps or not, by its version
        return made.to(dtype).view(bits).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


class Drawn:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(DEVICE, dtype)


def ulps(x: Tensor, other: Tensor) -> int:
    """How many steps two bfloat16, e4m3 or int8 tensors are apart at most."""
    integer = torch.int16 if x.dtype == torch.bfloat16 else torch.int8
    first, second = (t.contiguous().view(integer).int() for t in (x, other))
    if x.dtype != torch.int8:
        # Sign and magnitude to a number that grows with the value.
        first, second = (torch.where(t < 0, torch.iinfo(integer).min - t, t) for t in (first, second))
    return int((first - second).abs().max())


def assert_same(out: Tensor, twin: Tensor) -> None:
    """Float32 to 1e-5 of the largest value; what has fewer bits to one unit in the last place."""
    assert out.shape == twin.shape and out.dtype == twin.dtype
    assert torch.isfinite(out.float()).all()
    if out.dtype == torch.float32:
        torch.testing.assert_close(out, twin, rtol=0, atol=1e-5 * float(twin.abs().max()))
    else:
        assert ulps(out, twin) <= 1


def assert_same_codes(out: Codes, twin: Codes) -> None:
    assert_same(out.codes, twin.codes)
    assert_same(out.scale, twin.scale)
    assert (out.codes.float().abs().amax(-1) == 448).all()


@dtypes
@drawn
@given(tokens=st.integers(1, 5), dim=st.integers(2, 200), gated=st.booleans(), seed=st.integers(0, 9))
def test_norms_equal_their_twins(dtype: torch.dtype, tokens: int, dim: int, gated: bool, seed: int) -> None:
    """With and without a residual, with and without a gate, rounded to the dtype or to codes."""
    draw = Drawn(seed)
    x, y = 3 * draw(tokens, dim, dtype=dtype) + 1, draw(tokens, dim, dtype=dtype)
    gate = draw(dim) if gated else None
    norm = (1 + draw(dim), draw(dim), EPS)
    assert_same(TRITON.plain.norm_modulate(x, *norm), TORCH.plain.norm_modulate(x, *norm))
    assert_same_codes(TRITON.fp8.norm_modulate(x, *norm), TORCH.fp8.norm_modulate(x, *norm))
    total, h = TRITON.plain.gate_norm_modulate(x, y, gate, *norm)
    assert_same(total, TORCH.plain.gate_norm_modulate(x, y, gate, *norm)[0])
    # One unit of the sum may be many of its norm: the norm is held to the sum that it was made of.
    assert_same(h, TORCH.plain.norm_modulate(total, *norm))
    again, codes = TRITON.fp8.gate_norm_modulate(x, y, gate, *norm)
    assert torch.equal(again, total)
    assert_same_codes(codes, TORCH.fp8.norm_modulate(total, *norm))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("operation", ["rows", "gelu"])
@dtypes
@drawn
@given(tokens=st.integers(1, 5), dim=st.integers(2, 200), far=st.sampled_from((1, 50)), seed=st.integers(0, 9))
def test_codes_of_rows_equal_their_twins(
    dtype: torch.dtype, operation: str, tokens: int, dim: int, far: int, seed: int
) -> None:
    """Of widths that are a power of two and of others; far out GELU is 0 or x, though its exponential overflows."""
    x = Drawn(seed)(tokens, dim, dtype=dtype)
    x[:, 0] = far - 2 * far * (torch.arange(tokens, device=DEVICE) % 2)
    assert_same_codes(*(getattr(kernels.fp8, operation)(x) for kernels in (TRITON, TORCH)))


def test_rows_of_zeros_are_zeros() -> None:
    """Their scale is no zero that they would be divided by."""
    for operation in (TRITON.fp8.rows, TRITON.fp8.gelu):
        codes, scale = operation(torch.zeros(2, 5, device=DEVICE))
        assert not codes.float().any() and (scale > 0).all()


@dtypes
@drawn
@given(tokens=st.integers(1, 5), dim=st.integers(1, 200), seed=st.integers(0, 9))
def test_rms_norm_equals_its_twin(dtype: torch.dtype, tokens: int, dim: int, seed: int) -> None:
    draw = Drawn(seed)
    x, weight = 3 * draw(tokens, dim, dtype=dtype), draw(dim, dtype=dtype)
    assert_same(TRITON.rms_norm(x, weight, EPS), TORCH.rms_norm(x, weight, EPS))


@st.composite
def writes(draw: st.DrawFn) -> dict[str, object]:
    """A cache's sizes, and the slots that some blocks go to: of the sink's first, then of others, in any order."""
    window = draw(st.integers(1, 4))
    slots = draw(st.permutations(range(window)).map(lambda all_: all_[: draw(st.integers(1, window))]))
    sink = draw(st.integers(0, window - 1))
    return {
        "heads": draw(st.integers(1, 3)),
        "head_dim": 2 * draw(st.integers(1, 9)),
        "frame_tokens": draw(st.integers(1, 4)),
        "stream": StreamConfig(frames_per_block=1, window=window, sink=sink),
        "slots": sorted(slots, key=lambda slot: slot >= sink),
    }


def written(
    kernels: Kernels, kind: StoreKind, dtype: torch.dtype, seed: int, case: dict, alone: bool = False, far: int = 1
) -> tuple[Tensor, KVStore]:
    """Queries, and a store of three layers that held something else before its second was written."""
    draw, slots, dim = Drawn(seed), case["slots"], case["heads"] * case["head_dim"]
    sizes = {name: case[name] for name in ("heads", "head_dim", "frame_tokens")}
    store = new_store(kind, case["stream"], dtype, layers=3, device=DEVICE, **sizes)
    for buffer in store.buffers():
        buffer.copy_(draw(*buffer.shape))
    parts = store.at_work(1, 1) if alone else store.layers
    tokens = len(slots) * case["frame_tokens"]
    angles = draw(tokens, case["head_dim"] // 2)
    q = kernels.write_qkv(
        far * draw(tokens, 3 * dim, dtype=dtype),
        (far * draw(dim, dtype=dtype), far * draw(dim, dtype=dtype)),
        EPS,
        Rotation(angles.cos(), angles.sin()),
        parts[1],
        torch.tensor(slots, device=DEVICE),
        sum(slot < case["stream"].sink_blocks for slot in slots),
    )
    return q, store


@pytest.mark.parametrize("kind", ["model", "int8", "fp8", "attended"])
@dtypes
@drawn
@given(case=writes(), seed=st.integers(0, 9))
def test_queries_keys_and_values_equal_their_twins(dtype: torch.dtype, kind: StoreKind, case: dict, seed: int) -> None:
    """Rotated and in their slots, raw keys of the sink too; what lies in other slots and layers stays as it was."""
    q, store = written(TRITON, kind, dtype, seed, case)
    twin_q, twin = written(TORCH, kind, dtype, seed, case)
    assert_same(q, twin_q)
    for mine, other in zip(store.buffers(), twin.buffers(), strict=True):
        if mine.numel():
            assert_same(mine, other)


@dtypes
@drawn
@given(slots=st.integers(1, 3), head_dim=st.sampled_from([2, 6, 16]), seed=st.integers(0, 9))
def test_the_sink_is_turned_in_all_layers(dtype: torch.dtype, slots: int, head_dim: int, seed: int) -> None:
    """Into the first slots of each layer's keys, in their dtype or in e4m3; the slots behind them stay as they were."""
    draw, shape = Drawn(seed), (5, 2, head_dim)
    raw = draw(3, slots, *shape, dtype=dtype)
    by = Rotation(draw(slots * 5, head_dim // 2), draw(slots * 5, head_dim // 2))
    for kept in (dtype, torch.float8_e4m3fn):
        k, twin = (torch.zeros(3, slots + 2, *shape, device=DEVICE, dtype=kept) for _ in range(2))
        TRITON.turn_sink(raw, by, k[:, :slots])
        TORCH.turn_sink(raw, by, twin[:, :slots])
        assert_same(k, twin)
        assert not k[:, slots:].float().any()


@pytest.mark.parametrize("alone", [False, True])
@dtypes
@drawn
@given(case=writes(), seed=st.integers(0, 9))
def test_what_e4m3_does_not_hold_is_the_largest_it_does(dtype: torch.dtype, alone: bool, case: dict, seed: int) -> None:
    """In queries, keys and values alike; a block that sees itself alone sees and asks in its dtype."""
    case = {**case, "slots": case["slots"][:1]}
    q, store = written(TRITON, "attended", dtype, seed, case, alone, far=10_000)
    twin_q, twin = written(TORCH, "attended", dtype, seed, case, alone, far=10_000)
    assert q.dtype == twin_q.dtype == (dtype if alone else torch.float8_e4m3fn)
    assert_same(q, twin_q)
    for mine, other in zip(store.buffers(), twin.buffers(), strict=True):
        if mine.numel():
            assert_same(mine, other)
    assert float(store.v.float().abs().max()) == 448


@pytest.mark.parametrize("attends", ["model", "fp8"])
@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_a_stream_equals_that_of_the_twins(rope: str, attends: str) -> None:
    """First blocks, a full window, a switch before and after it is full; in fp8 a code may be the next one."""
    stream = StreamConfig(frames_per_block=1, window=3, sink=1, steps=(1000, 500), rope=rope)
    streams = []

    def made_by(kernels: Kernels, model: CausalWanTransformer) -> StaticPasses:
        codes = widened(model.attention.attend, model.dtype) if attends == "fp8" else None
        return StaticPasses(model, stream, SMALL, kernels=kernels, attend_fp8=codes)

    for kernels in (TRITON, TORCH):
        model = tiny_transformer().to(DEVICE)
        rollout = Rollout(model, stream, SMALL, passes=made_by(kernels, model))
        noise, made = DrawnNoise(0, rollout.shape), []
        for block in range(7):
            if block in (0, 2, 5):
                rollout.switch(embeds(block))
            made.append(rollout.denoise_block(noise))
        streams.append(torch.cat(made, 1))
    assert relative_error(*streams) <= (1e-5 if attends == "model" else 5e-3)


@dtypes
def test_a_pass_in_fp8_errs_as_with_the_twins(dtype: torch.dtype) -> None:
    """Codes by Triton's kernels, multiplied as the device can: nearer to the twins' than either is to float32."""
    model = tiny_transformer(TINY.model_copy(update={"dim": 32, "ffn_dim": 96})).to(DEVICE)
    stream, multiply = StreamConfig(), choose_multiply(linear_shapes(model.config), 12, DEVICE, dtype).multiply

    def flow(kernels: Kernels, dtype: torch.dtype, linear: MakeLinear) -> Tensor:
        passes = StaticPasses(deepcopy(model).to(dtype), stream, SMALL, linear=linear, kernels=kernels)
        noise = DrawnNoise(0, tuple(passes.static.latents.shape))
        passes.take_prompt(embeds(0).to(DEVICE, dtype))
        return passes.static.flow(0, passes.fill(CacheLayout(stream).denoise(0, 0), 0, noise))

    exact = flow(TORCH, torch.float32, plain_linear)
    made, twin = (flow(kernels, dtype, Fp8Linears(multiply=multiply)) for kernels in (TRITON, TORCH))
    assert relative_error(made, twin) <= 5e-3 < relative_error(made, exact) <= BAR


FOR_A_GPU = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.models import triton_kernels

norm = {"DIM": 1536, "WIDTH": 2048}
for kernel, sizes, codes in (
    (triton_kernels._norm_kernel, norm, ["out_ptr"]),
    (triton_kernels._codes_kernel, {"GELU": True, "DIM": 8960, "FIRST": 8192, "REST": 1024}, ["out_ptr"]),
    (triton_kernels._codes_kernel, {"GELU": False, "DIM": 1536, "FIRST": 1024, "REST": 512}, ["out_ptr"]),
    (triton_kernels._rms_kernel, norm, []),
    (triton_kernels._qkv_kernel, {**norm, "PAIRS": 64}, []),
    (triton_kernels._qkv_kernel, {**norm, "PAIRS": 64}, ["q_ptr", "k_ptr", "v_ptr"]),
):
    kinds = {"eps": "fp32", "block_tokens": "i32", "raw_tokens": "i32", "slots_ptr": "*i64", "row_scale_ptr": "*fp32"}
    kinds |= dict.fromkeys(codes, "*fp8e4nv")
    names = kernel.arg_names
    fixed = {(names.index(name),): size for name, size in sizes.items()}
    types = {name: "constexpr" if name in sizes else kinds.get(name, "*bf16") for name in names}
    source = ASTSource(kernel, types, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(made.asm["cubin"]) > 0)
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter runs is not yet what the compiler takes; it needs no GPU to say so."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FOR_A_GPU], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    made = done.stdout.splitlines()
    assert made == [f"_{name}_kernel True" for name in ("norm", "codes", "codes", "rms", "qkv", "qkv")], done.stderr


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_that_ends_with_gelu(dtype: torch.dtype) -> None:
    """The library's own end of a product rounds once, the twin twice."""
    draw = Drawn(0)
    x, weight, bias = draw(300, 128, dtype=dtype), draw(192, 128, dtype=dtype) / 8, draw(192, dtype=dtype)
    out, twin = TRITON.linear_gelu(x, weight, bias), TORCH.linear_gelu(x.float(), weight.float(), bias.float())
    assert relative_error(out.float(), twin) <= {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
