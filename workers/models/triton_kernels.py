"""The operations of `kernels.py` as Triton kernels for a GPU: each row of [L, dim] is read once and written once.

Functions are as those of the same name there, on contiguous tensors; one program works on one row. Which slot keys and
values go to is read on the device. Imported only where it is chosen. Knows no more than `kernels.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.models.kernels import LARGEST, TORCH, Codes, Kernels, LinearInputs, gelu, rows
from workers.models.kv_store import AloneLayerKV, LayerKV, QuantisedLayerKV
from workers.models.rope import Rotation

LARGEST_E4M3 = tl.constexpr(LARGEST[torch.float8_e4m3fn])
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
TWICE_SQRT_2_BY_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def _scale_of(largest):
    """What a row whose largest value this is has to be divided by."""
    return tl.maximum(largest / LARGEST_E4M3, TINY)


@triton.jit
def _norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    sum_ptr,
    out_ptr,
    row_scale_ptr,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Layer norm of x, or of x + y * gate, which goes to sum; as codes where there is a place for the rows' scales."""
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    row = tl.program_id(0).to(tl.int64)
    at = row * DIM + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            y *= tl.load(gate_ptr + column, mask=inside, other=0.0)
        rounded = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / DIM, 0.0)
    h = centred * tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
    h = h * scale + tl.load(shift_ptr + column, mask=inside, other=0.0)
    if row_scale_ptr is not None:
        row_scale = _scale_of(tl.max(tl.abs(h), 0))
        tl.store(row_scale_ptr + row, row_scale)
        h = h / row_scale
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _part(row_ptr, column, DIM: tl.constexpr, GELU: tl.constexpr):
    """Some channels of a row, float32, or what GELU makes of them; 0.5 (1 + tanh(z)) is the sigmoid of 2 z."""
    x = tl.load(row_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    if GELU:
        x /= 1.0 + tl.exp((x + 0.044715 * x * x * x) * -TWICE_SQRT_2_BY_PI)
    return x


@triton.jit
def _codes_kernel(
    x_ptr,
    out_ptr,
    row_scale_ptr,
    GELU: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """A row as codes, held as two powers of two: one that covers 8,960 channels would be half empty."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * DIM
    out_ptr += row * DIM
    column = tl.arange(0, FIRST)
    last = FIRST + tl.arange(0, REST)
    x = _part(x_ptr, column, DIM, GELU)
    y = _part(x_ptr, last, DIM, GELU)
    row_scale = _scale_of(tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0)))
    tl.store(row_scale_ptr + row, row_scale)
    tl.store(out_ptr + column, (x / row_scale).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + last, (y / row_scale).to(out_ptr.dtype.element_ty), mask=last < DIM)


@triton.jit
def _rms_normed(row_ptr, weight_ptr, column, inside, eps, DIM: tl.constexpr):
    """A row's root-mean-square norm, float32."""
    x = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * weight


@triton.jit
def _turned(x, cos, sin, WIDTH: tl.constexpr):
    """A row with neighbouring channels rotated as pairs; cos and sin are of [WIDTH / 2] pairs."""
    even, odd = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def _store_rounded(ptr, x, inside):
    """Stores float32 in what there is a place for; in e4m3 what is too large becomes the largest that it holds."""
    if ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.maximum(x, -LARGEST_E4M3, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, LARGEST_E4M3, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_kernel(x_ptr, weight_ptr, out_ptr, eps, DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    row = tl.program_id(0).to(tl.int64) * DIM
    normed = _rms_normed(x_ptr + row, weight_ptr, column, inside, eps, DIM)
    tl.store(out_ptr + row + column, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _qkv_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    raw_k_ptr,
    eps,
    block_tokens,
    raw_tokens,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Rotated queries and keys, and raw keys of the first tokens.

    Where there is a place for values, keys and values go to the slots of their blocks; else keys stay in order.
    """
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, WIDTH // 2)
    angle = token * PAIRS + pair % PAIRS
    cos = tl.load(cos_ptr + angle, mask=pair < DIM // 2, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < DIM // 2, other=0.0)
    row_ptr = qkv_ptr + token * 3 * DIM
    there = token
    if v_ptr is not None:
        there = tl.load(slots_ptr + token // block_tokens) * block_tokens + token % block_tokens
        v = tl.load(row_ptr + 2 * DIM + column, mask=inside, other=0.0).to(tl.float32)
        _store_rounded(v_ptr + there * DIM + column, v, inside)
    there = there * DIM + column
    q = _turned(_rms_normed(row_ptr, q_weight_ptr, column, inside, eps, DIM), cos, sin, WIDTH)
    _store_rounded(q_ptr + token * DIM + column, q, inside)
    k = _rms_normed(row_ptr + DIM, k_weight_ptr, column, inside, eps, DIM)
    if token < raw_tokens:
        tl.store(raw_k_ptr + there, k.to(raw_k_ptr.dtype.element_ty), mask=inside)
    _store_rounded(k_ptr + there, _turned(k, cos, sin, WIDTH), inside)


@triton.jit
def _turn_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    layer_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A row rotated to where it stands; rows of a layer lie in order, those of the next so far behind them in out."""
    column, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    inside = column < DIM
    token, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    angle = token * PAIRS + pair % PAIRS
    cos = tl.load(cos_ptr + angle, mask=pair < DIM // 2, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < DIM // 2, other=0.0)
    row = (layer * tl.num_programs(0) + token) * DIM + column
    x = tl.load(x_ptr + row, mask=inside, other=0.0).to(tl.float32)
    there = layer * layer_stride + token * DIM + column
    _store_rounded(out_ptr + there, _turned(x, cos, sin, WIDTH), inside)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _norm(x, None, None, scale, shift, None, out, None, eps)
    return out


def norm_modulate_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Codes:
    made = _empty_codes(x)
    _norm(x, None, None, scale, shift, None, *made, eps)
    return made


def gate_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(x, y, gate, scale, shift, total, out, None, eps)
    return total, out


def gate_norm_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Codes]:
    total, made = torch.empty_like(x), _empty_codes(x)
    _norm(x, y, gate, scale, shift, total, *made, eps)
    return total, made


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not x.is_cuda or x.dtype == torch.float32:
        return TORCH.linear_gelu(x, weight, bias)
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)  # cuBLASLt ends with it, by tanh as on all GPUs


def gelu_fp8(x: Tensor) -> Codes:
    return _coded(x, gelu=True)


def rows_fp8(x: Tensor) -> Codes:
    return _coded(x.contiguous(), gelu=False)  # one head that a backend of attention padded is not


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert x.is_contiguous()
    out = torch.empty_like(x)
    _rms_kernel[(len(x),)](x, weight, out, eps, **_row(x.shape[1]))
    return out


def write_qkv(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
    turn: Rotation,
    kv: LayerKV,
    slots: Tensor,
    sinks: int,
) -> Tensor:
    assert qkv.is_contiguous()
    tokens, dim, pairs = len(qkv), qkv.shape[1] // 3, turn.cos.shape[1]
    heads, raw_tokens = (-1, 2 * pairs), sinks * kv.block_tokens
    q = qkv.new_empty(tokens, dim, dtype=kv.query_dtype)
    given = (qkv, *weights, *turn, slots, q)
    sizes = {"block_tokens": kv.block_tokens, "raw_tokens": raw_tokens, "PAIRS": pairs, **_row(dim)}
    if isinstance(kv, QuantisedLayerKV | AloneLayerKV):
        k, raw_k = (qkv.new_empty(rows, dim, dtype=torch.float32) for rows in (tokens, raw_tokens))
        _qkv_kernel[(tokens,)](*given, k, None, raw_k, eps, **sizes)
        kv.write(slots, k.unflatten(-1, heads), qkv[:, 2 * dim :].unflatten(-1, heads))
        if sinks:
            kv.keep_sink(slots[:sinks], raw_k.unflatten(-1, heads))
    else:
        _qkv_kernel[(tokens,)](*given, kv.k, kv.v, kv.sink_k, eps, **sizes)
    return q.unflatten(-1, heads)


def turn_sink(sink_k: Tensor, by: Rotation, k: Tensor) -> None:
    assert sink_k.is_contiguous() and k[0].is_contiguous()
    tokens, pairs = by.cos.shape
    row = _row(sink_k[0, 0, 0].numel())
    _turn_kernel[(tokens, len(sink_k))](sink_k, *by, k, k.stride(0), PAIRS=pairs, **row)


def _norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    total: Tensor | None,
    out: Tensor,
    row_scale: Tensor | None,
    eps: float,
) -> None:
    assert x.is_contiguous() and (y is None or y.is_contiguous())
    _norm_kernel[(len(x),)](x, y, gate, scale, shift, total, out, row_scale, eps, **_row(x.shape[1]))


def _coded(x: Tensor, *, gelu: bool) -> Codes:
    assert x.is_contiguous()
    made = _empty_codes(x)
    _codes_kernel[(len(x),)](x, *made, GELU=gelu, **_halves(x.shape[1]))
    return made


def _empty_codes(x: Tensor) -> Codes:
    return Codes(torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32))


def _row(dim: int) -> dict[str, int]:
    """How one program holds a row: its channels, the power of two that covers them, warps of 32 threads."""
    width = 1 << (dim - 1).bit_length()
    return {"DIM": dim, "WIDTH": width, "num_warps": 4 if width <= 2048 else 8}


def _halves(dim: int) -> dict[str, int]:
    """As `_row`, with the largest power of two in a row's channels and the one that covers the rest, at least 1."""
    first = 1 << (dim.bit_length() - 1)
    rest = 1 << max(dim - first - 1, 0).bit_length()
    return {"DIM": dim, "FIRST": first, "REST": rest, "num_warps": 4 if first <= 2048 else 8}


TRITON = Kernels(
    "triton",
    LinearInputs(norm_modulate, gate_norm_modulate, gelu, rows),
    LinearInputs(norm_modulate_fp8, gate_norm_modulate_fp8, gelu_fp8, rows_fp8),
    linear_gelu,
    rms_norm,
    write_qkv,
    turn_sink,
)
