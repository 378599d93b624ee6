"""The small operations between the matrix products of a layer, each as one function: plain PyTorch, the definition.

Every one computes in float32 and rounds once. `Kernels` is the set of them that the static path calls, by PyTorch here
or by others. Knows no steps and no blocks, and of a cache only where keys and values go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.rope import Rotation


class Codes(NamedTuple):
    """8-bit values and what each row of them was divided by: [..., n] and [..., 1] float32."""

    codes: Tensor
    scale: Tensor


E4M3 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, E4M3: 448.0}
"""The largest value that a code holds."""


def quantised(x: Tensor, dtype: torch.dtype) -> Codes:
    """x [..., n] as codes of a dtype; each row uses its whole range. Zeros stay zeros."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    units = wide / scale
    return Codes((units.round() if dtype == torch.int8 else units).to(dtype), scale)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a float dtype; in e4m3 what is too large becomes the largest that it holds; some torches make it NaN."""
    return (x.clamp(-LARGEST[dtype], LARGEST[dtype]) if dtype in LARGEST else x).to(dtype)


class KVTarget(Protocol):
    """Where a layer's keys and values go; `kv_store.LayerKV` says more."""

    block_tokens: int
    query_dtype: torch.dtype | None

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores rotated keys and values of the blocks that go to `slots`."""

    def keep_sink(self, slots: Tensor, k: Tensor) -> None:
        """Stores keys before rotation of the sink's blocks that go to `slots`."""


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm of x [L, dim], times scale [dim] float32 (the whole factor, 1 included), plus shift [dim] float32."""
    return _norm_modulated(x, scale, shift, eps).to(x.dtype)


def norm_modulate_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Codes:
    """As `norm_modulate`, but each row in e4m3 with a scale of its own: what an FP8 product takes."""
    return quantised(_norm_modulated(x, scale, shift, eps), E4M3)


def _norm_modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), scale)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y * gate: x and y [L, dim], gate [dim] float32 or None for ones; returns the dtype of x."""
    return x + y if gate is None else torch.addcmul(x.float(), y.float(), gate).to(x.dtype)


def gate_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`gate_residual`, and `norm_modulate` of its rounded result; both [L, dim] in the dtype of x."""
    x = gate_residual(x, y, gate)
    return x, norm_modulate(x, scale, shift, eps)


def gate_norm_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Codes]:
    """As `gate_norm_modulate`, with the norm as of `norm_modulate_fp8`."""
    x = gate_residual(x, y, gate)
    return x, norm_modulate_fp8(x, scale, shift, eps)


def gelu(x: Tensor) -> Tensor:
    """GELU of x [L, dim] in its approximation by tanh; keeps the dtype."""
    return F.gelu(x, approximate="tanh")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu` of a linear: x [L, n], weight [m, n], bias [m] -> [L, m]."""
    return gelu(F.linear(x, weight, bias))


def gelu_fp8(x: Tensor) -> Codes:
    """As `gelu`, but each row in e4m3 as of `norm_modulate_fp8`: of float32 values, which no dtype of x rounds."""
    return quantised(gelu(x.float()), E4M3)


def rows(x: Tensor) -> Tensor:
    """x [L, dim] as it is."""
    return x


def rows_fp8(x: Tensor) -> Codes:
    """x [L, dim], each row in e4m3."""
    return quantised(x, E4M3)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [L, dim] over all channels, times weight [dim]; returns the dtype of x."""
    return _rms_normed(x, weight, eps).to(x.dtype)


def _rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def turned(x: Tensor, by: Rotation) -> Tensor:
    """Rotates neighbouring channel pairs of x [L, heads, head_dim] float32 by its tokens' angles."""
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = by.cos[:, None], by.sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def write_qkv(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
    turn: Rotation,
    kv: KVTarget,
    slots: Tensor,
    sinks: int,
) -> Tensor:
    """Norms and rotates queries and keys, leaves keys and values in the cache.

    Args:
        qkv: [L, 3 dim], what the fused product gave for the tokens of whole blocks.
        weights: RMS norm weights of query and key, [dim] each; eps is that of both norms.
        turn: the tokens' rotations.
        slots: [blocks] int64 on the device, where the blocks go.
        sinks: how many of the blocks, from the first, are the sink's: their keys are kept before rotation too.

    Returns:
        Rotated queries [L, heads, head_dim] in the cache's `query_dtype`, or if it has none in the dtype of qkv.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    heads = (-1, 2 * turn.cos.shape[-1])
    q, k = (_rms_normed(x, weight, eps).unflatten(-1, heads) for x, weight in zip((q, k), weights, strict=True))
    kv.write(slots, turned(k, turn), v.unflatten(-1, heads))
    if sinks:
        kv.keep_sink(slots[:sinks], k[: sinks * kv.block_tokens])
    return rounded(turned(q, turn), kv.query_dtype or qkv.dtype)


def turn_sink(sink_k: Tensor, by: Rotation, k: Tensor) -> None:
    """Rotates the sink's keys of all layers to where they now stand.

    Args:
        sink_k: [layers, sink slots, block tokens, heads, head_dim], before rotation.
        by: [sink tokens, head_dim / 2].
        k: as sink_k, overwritten; rounded once.
    """
    layers, slots = sink_k.shape[:2]
    keys = sink_k.flatten(1, 2).transpose(0, 1).float()
    there = turned(keys.flatten(1, 2), by).unflatten(1, (layers, -1)).transpose(0, 1)
    k.copy_(rounded(there.unflatten(1, (slots, -1)), k.dtype))


@dataclass(frozen=True)
class LinearInputs:
    """The operations that end with what a linear takes, all as a tensor or all as `Codes`.

    Each field is as the function of its name, or of its name with `_fp8`.
    """

    norm_modulate: Callable[[Tensor, Tensor, Tensor, float], Tensor | Codes]
    gate_norm_modulate: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor | Codes]]
    gelu: Callable[[Tensor], Tensor | Codes]
    rows: Callable[[Tensor], Tensor | Codes]


@dataclass(frozen=True)
class Kernels:
    """One way to compute the operations above; each function is as that of its name.

    Attributes:
        name: what the log says.
        plain: for linears that take tensors, and for the head.
        fp8: for linears that take codes in e4m3.
    """

    name: str
    plain: LinearInputs
    fp8: LinearInputs
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    write_qkv: Callable[[Tensor, tuple[Tensor, Tensor], float, Rotation, KVTarget, Tensor, int], Tensor]
    turn_sink: Callable[[Tensor, Rotation, Tensor], None]


TORCH = Kernels(
    "torch",
    LinearInputs(norm_modulate, gate_norm_modulate, gelu, rows),
    LinearInputs(norm_modulate_fp8, gate_norm_modulate_fp8, gelu_fp8, rows_fp8),
    linear_gelu,
    rms_norm,
    write_qkv,
    turn_sink,
)
