"""What lies between convolutions on a GPU, in the VAE's decoder and the tiny one, each a function in plain PyTorch.

This is the definition. Frames are [T, H, W, C], of one dtype. A convolution over two or three frames in time is one
over an image with their channels beside each other. The VAE's give their output without its bias: whoever reads that
output next adds it. PyTorch's operations round one by one, those of others may compute in float32 and round once. Knows
no weights and no decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.causal_conv import SMALLEST_SQUARE


def lay_beside(x: Tensor, bias: Tensor | None, gamma: Tensor | None, past: Tensor, beside: Tensor) -> None:
    """Lays new frames and those before them where a convolution reads them, and keeps the last ones.

    Args:
        x: [T, H, W, C].
        bias: [C], added to x first.
        gamma: [C], of a norm over channels and SiLU that x goes through then; without it x is laid as it is.
        past: [n, H, W, C], the frames before x, n from 0 to 2; overwritten with the last n of the frames seen so far.
        beside: [T, H, W, (n + 1) C], overwritten: each frame after the n before it.
    """
    if bias is not None:
        x = x + bias
    if gamma is not None:
        x = F.silu(F.rms_norm(x, x.shape[-1:], gamma, SMALLEST_SQUARE))
    if len(past):
        count, x = len(x), torch.cat((past, x))
        torch.cat([x[tap : tap + count] for tap in range(len(past) + 1)], dim=-1, out=beside)
        past.copy_(x[count:])
    else:
        beside.copy_(x)


def add(x: Tensor, made: Tensor, bias: Tensor) -> None:
    """Adds made [T, H, W, C], which may be overwritten, and bias [C] to x [T, H, W, C]."""
    x.add_(made.add_(bias))


def split(made: Tensor, bias: Tensor | None) -> Tensor:
    """Two frames of each: made [T, H, W, 2 C], which may be overwritten, plus bias [2 C] -> [2 T, H, W, C]."""
    if bias is not None:
        made.add_(bias)
    return made.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def spread(made: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Four pictures, one for each parity of row and column, as one of twice the size.

    Args:
        made: [N, H + 1, W + 1, 4 C], may be overwritten: as `static_vae.phases` orders it, one row and column more than
            each picture has; those of odd rows begin one row further down, those of odd columns one to the right.
        bias: [C], added to all four.
        out: [N, 2 H, 2 W, C], overwritten.

    Returns:
        out.
    """
    height, width = made.shape[1] - 1, made.shape[2] - 1
    for phase, each in enumerate(made.chunk(4, dim=-1)):
        row, column = divmod(phase, 2)
        picture = each[:, row : row + height, column : column + width]
        out[:, row::2, column::2].copy_(picture if bias is None else picture + bias)
    return out


@dataclass(frozen=True)
class VaeKernels:
    """One way to compute the operations above; each field is as the function of its name.

    Attributes:
        name: what the log says.
    """

    name: str
    lay_beside: Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor], None]
    add: Callable[[Tensor, Tensor, Tensor], None]
    split: Callable[[Tensor, Tensor | None], Tensor]
    spread: Callable[[Tensor, Tensor | None, Tensor], Tensor]


TORCH = VaeKernels("torch", lay_beside, add, split, spread)
