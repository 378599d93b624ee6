"""Three-axis rotary position embedding of Wan 2.1: latent frame, row and column share the channels of a head.

Positions are data. Angles are computed in float64 and only their cosine and sine are rounded, because float32 angles
are 0.3 % off at latent frame 3,000,000.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rotation(NamedTuple):
    """Cosine and sine for the tokens of some latent frames, each [tokens, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


def _angles(positions: Tensor, channels: int) -> Tensor:
    """[n] positions -> [n, channels / 2] angles, float64."""
    frequencies = THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return torch.outer(positions.double(), frequencies)


def frame_rotation(frames: Sequence[int], head_dim: int) -> Rotation:
    """What of `rotation` depends on a token's latent frame: its first channel pairs, [frames, pairs] on the CPU."""
    angles = _angles(torch.tensor(frames, dtype=torch.int64), head_dim - 2 * _spatial(head_dim))
    return Rotation(angles.cos().float(), angles.sin().float())


def _spatial(head_dim: int) -> int:
    """Channels of a row or of a column."""
    return 2 * (head_dim // 6)


def rotation(frames: Sequence[int], rows: int, columns: int, head_dim: int, device: torch.device) -> Rotation:
    """Rotations of all tokens of the latent frames at the given positions, frame-major, then row, then column.

    Rows and columns take 2*(head_dim // 6) channels each, frames what is left (Wan 2.1, wan/modules/model.py).
    """
    spatial = _spatial(head_dim)
    by_frame = _angles(torch.tensor(frames, dtype=torch.int64), head_dim - 2 * spatial)
    by_row = _angles(torch.arange(rows), spatial)
    by_column = _angles(torch.arange(columns), spatial)
    shape = (len(frames), rows, columns)
    angles = torch.cat(
        [
            by_frame[:, None, None].expand(*shape, -1),
            by_row[None, :, None].expand(*shape, -1),
            by_column[None, None].expand(*shape, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotates neighbouring channel pairs of x [..., tokens, heads, head_dim] by its tokens' angles, in float32.

    Returns the shape and dtype of x.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = by.cos[:, None], by.sin[:, None]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
