"""Causal convolutions and norms of the Wan 2.1 VAE over a stream of frames.

Frames are the batch and channels come last: T frames of B videos are [T * B, H, W, C], time first. A causal
convolution sees the frames before its first through a cache that the caller keeps. Knows no latents and no decoder.

Two ways to the same sum: `plain` is `conv3d`, the definition; `stacked` is one `conv2d` over the time taps side by side
in channels, which is many times faster in float32 on a CPU. `static_conv.py` has faster ones for a stream.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvKind = Literal["plain", "stacked"]
Cache = dict[int, Tensor]
"""Last input frames of every causal convolution, by its number, [(kernel - 1) * B, H, W, C]."""
SMALLEST_SQUARE = 1e-24
"""Added to a mean of squares: the square of the shortest length, 1e-12, in Wan 2.1 (wan/modules/vae.py)."""


class CausalConv3d(nn.Module):
    """Convolution over time and space whose output frame sees its own and earlier input frames only.

    Args:
        kernel: time, height, width; time taps reach backwards, space is padded to keep its size.
        kind: how it is computed.
        number: its key in a cache, unique in a network.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, int, int],
        *,
        kind: ConvKind,
        number: int,
        time_stride: int = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, *kernel))
        self.bias = nn.Parameter(torch.empty(channels_out))
        self.kernel = kernel
        self.kind = kind
        self.number = number
        self.time_stride = time_stride
        self._stacked: Tensor | None = None

    def prepare(self) -> None:
        """Lays the weights out for `stacked` once; to be called after the last change of weights."""
        self._stacked = self._stack() if self.kind == "stacked" else None

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        """x [T * B, H, W, C] -> [T * B, H, W, C']; the frames that the next call needs are left in the cache."""
        past = (self.kernel[0] - 1) * batch
        if past:
            before = cache.get(self.number)
            x = torch.cat([x.new_zeros(past, *x.shape[1:]) if before is None else before, x])
            # A view would keep all of x in memory: at 480x832 and full width 5.3 GB instead of 1.9.
            cache[self.number] = x[-past:].clone()
        return self.taps(x, batch)

    def taps(self, x: Tensor, batch: int) -> Tensor:
        """The sum over the taps of all frames that x [(T + kernel - 1) * B, H, W, C] holds, without a cache."""
        return self._conv2d(x, batch) if self.kind == "stacked" else self._conv3d(x, batch)

    def _conv3d(self, x: Tensor, batch: int) -> Tensor:
        video = x.unflatten(0, (-1, batch)).permute(1, 4, 0, 2, 3)
        padding = (0, self.kernel[1] // 2, self.kernel[2] // 2)
        out = F.conv3d(video, self.weight, self.bias, stride=(self.time_stride, 1, 1), padding=padding)
        return out.permute(2, 0, 3, 4, 1).flatten(0, 1)

    def _conv2d(self, x: Tensor, batch: int) -> Tensor:
        if self.kernel[0] > 1:
            frames = x.unflatten(0, (-1, batch))
            count = len(frames) - self.kernel[0] + 1
            beside = [frames[tap : tap + count : self.time_stride] for tap in range(self.kernel[0])]
            x = torch.cat(beside, dim=-1).flatten(0, 1)
        weight = self._stacked if self._stacked is not None else self._stack()
        padding = (self.kernel[1] // 2, self.kernel[2] // 2)
        return F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, padding=padding).permute(0, 2, 3, 1)

    def _stack(self) -> Tensor:
        stacked = self.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
        return stacked.contiguous(memory_format=torch.channels_last)


class ChannelNorm(nn.Module):
    """Scales every pixel's channels to unit root mean square, then by `gamma` (Wan 2.1's RMS_norm).

    However small the channels are: Wan 2.1 bounds their length at 1e-12, far below what layers produce.

    Args:
        dims: trailing ones of `gamma`'s shape in the published files: 3 in video layers, 2 in image layers.
    """

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> the same."""
        gamma = self.gamma.flatten()
        return F.rms_norm(x, (len(gamma),), gamma, eps=SMALLEST_SQUARE)


class ResidualBlock(nn.Module):
    """Two norm, SiLU, convolution; beside them the input, through a 1x1x1 convolution where widths differ."""

    def __init__(self, channels_in: int, channels_out: int, *, kind: ConvKind, numbers: "Numbers") -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(channels_in, 3),
            nn.SiLU(),
            CausalConv3d(channels_in, channels_out, (3, 3, 3), kind=kind, number=numbers.next()),
            ChannelNorm(channels_out, 3),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(channels_out, channels_out, (3, 3, 3), kind=kind, number=numbers.next()),
        )
        self.shortcut: nn.Module | None = None
        if channels_in != channels_out:
            self.shortcut = CausalConv3d(channels_in, channels_out, (1, 1, 1), kind=kind, number=numbers.next())

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        out = x if self.shortcut is None else self.shortcut(x, cache, batch)
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = conv1(F.silu(norm1(x)), cache, batch)
        return out + conv2(F.silu(norm2(y)), cache, batch)


class FrameAttention(nn.Module):
    """Single-head attention over the pixels of each frame, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        """[N, H, W, C] -> the same; frames do not see each other, so no cache is used."""
        qkv = self.to_qkv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (part.flatten(1, 2)[:, None] for part in qkv.chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].unflatten(1, x.shape[1:3])
        return x + self.proj(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Numbers:
    """Hands out the numbers of a network's causal convolutions."""

    def __init__(self) -> None:
        self._next = 0

    def next(self) -> int:
        self._next += 1
        return self._next - 1


def prepare(network: nn.Module) -> None:
    """Lays out the weights of all causal convolutions and images for their kind; after the last change of weights."""
    for module in network.modules():
        if isinstance(module, CausalConv3d):
            module.prepare()
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
