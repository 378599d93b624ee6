"""The small operations between the matrix products of a layer, each as one function: plain PyTorch, the definition.

Every one computes in float32 and rounds once. Knows no cache, no steps and no blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.rope import Rotation


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm of x [L, dim], times scale [dim] float32 (the whole factor, 1 included), plus shift [dim] float32."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), scale).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [L, dim] over all channels, times weight [dim]; float32."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def turned(x: Tensor, by: Rotation) -> Tensor:
    """Rotates neighbouring channel pairs of x [L, heads, head_dim] float32 by its tokens' angles."""
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = by.cos[:, None], by.sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate: x and y [L, dim], gate [dim] float32; returns the dtype of x."""
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
