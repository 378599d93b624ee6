"""The VAE's decoder on the fast path: two sequences of operations, over memory that stays.

`vae.py` is the definition. Here the first latent frame of a stream and every later one are each a fixed sequence of
operations on fixed shapes and addresses, so that both can be recorded. Knows no blocks, prompts or sinks.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models.beside_conv import BesideConv
from workers.models.causal_conv import SMALLEST_SQUARE, CausalConv3d, ChannelNorm, FrameAttention, ResidualBlock
from workers.models.native import Native
from workers.models.static_conv import Activation, Shape, StaticConv, Work
from workers.models.vae import Upsample, VaeDecoder
from workers.models.vae_kernels import TORCH, VaeKernels
from workers.models.winograd import part_of

LANES = 16
"""Channels that a CPU with AVX-512 computes at once; fewer cost as much."""

Conv = StaticConv | BesideConv
"""A causal convolution on a CPU or on a GPU."""


class Part(Protocol):
    """A piece of the decoder.

    Attributes:
        convs: those with a past.
    """

    convs: tuple[Conv, ...]

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        """x [T, H, W, C] -> [T', H', W', C']; x may be overwritten. `first` says that x is a stream's first frame."""


class StaticResidual:
    """`ResidualBlock`: adds to its input, or to what the shortcut makes of it."""

    def __init__(self, block: ResidualBlock, shape: Shape, work: Work) -> None:
        norm1, _, conv1, norm2, _, _, conv2 = block.residual
        self._norm1, self._norm2 = Activation(norm1, work), Activation(norm2, work)
        self._conv1, self._conv2 = (static_conv(conv, shape, work) for conv in (conv1, conv2))
        self.convs = (self._conv1, self._conv2)
        short = block.shortcut
        self._shortcut = None if short is None else work.linear(short.weight, short.bias)

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        count = len(x)
        out = x if self._shortcut is None else self._shortcut(x)
        self._conv1.take(x, self._norm1)
        self._conv1.pass_on(count, self._conv2, self._norm2)
        self._conv2.add_to(out)
        return out


class StaticAttention:
    """`FrameAttention`."""

    convs = ()

    def __init__(self, part: FrameAttention, work: Work) -> None:
        self._gamma = part.norm.gamma.flatten().to(work.between)
        self._qkv = work.linear(part.to_qkv.weight, part.to_qkv.bias)
        self._proj = work.linear(part.proj.weight, part.proj.bias)

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        qkv = self._qkv(F.rms_norm(x, x.shape[-1:], self._gamma, SMALLEST_SQUARE))
        q, k, v = (part.flatten(1, 2)[:, None] for part in qkv.chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].unflatten(1, x.shape[1:3])
        return x.add_(self._proj(seen))


class StaticUpsample:
    """`Upsample`: convolves before the doubling instead of after it, once for each parity of row and column."""

    def __init__(self, part: Upsample, shape: Shape, work: Work) -> None:
        self._work = work
        self._time = None if part.time_conv is None else static_conv(part.time_conv, shape, work)
        self.convs = () if self._time is None else (self._time,)
        conv = part.resample[1]
        self._weight = phases(conv.weight).to(work.dtype).contiguous(memory_format=torch.channels_last)
        # A GPU's convolution would add it in a pass of its own.
        self._bias, self._later = (conv.bias.repeat(4), None) if work.on_cpu else (None, conv.bias)
        self._out = work.zeros(*larger(part, shape), len(conv.weight))

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        if self._time is not None and not first:
            self._time.take(x)
            x = self._time.split(len(x))
        image = x.to(self._work.dtype).permute(0, 3, 1, 2)
        made = F.conv2d(image, self._weight, self._bias, padding=1).permute(0, 2, 3, 1)
        return self._work.kernels.spread(made, self._later, self._out[: len(x)])


class StaticHead:
    """Norm, SiLU and the last convolution: what its taps make of every frame once, then summed over time."""

    def __init__(self, head: nn.ModuleList, shape: Shape, work: Work) -> None:
        norm, _, conv = head
        assert isinstance(norm, ChannelNorm)
        assert isinstance(conv, CausalConv3d)
        self._norm = Activation(norm, work)
        size = (*shape, conv.weight.shape[1])
        self._input = work.zeros(*size, dtype=work.dtype) if work.on_cpu else part_of(work.beside, *size)
        taps = conv.weight.transpose(1, 2).flatten(0, 1)
        weight = work.zeros(LANES, *taps.shape[1:], dtype=work.dtype)
        weight[: len(taps)] = taps
        self._weight = weight.contiguous(memory_format=torch.channels_last)
        one_of_each = torch.eye(LANES, device=work.device, dtype=work.dtype)[: len(taps)]
        by_tap = one_of_each.view(3, 3, LANES, 1, 1).transpose(1, 2)
        self._sum = conv_of(by_tap, conv.bias, shape, work)
        self.convs = (self._sum,)

    def __call__(self, x: Tensor, *, first: bool) -> Tensor:
        image = self._input[: len(x)]
        self._norm.into(image, x)
        taps = F.conv2d(image.permute(0, 3, 1, 2), self._weight, None, padding=1)
        self._sum.take(taps.permute(0, 2, 3, 1))
        return self._sum(len(x))


class StaticVae:
    """Decodes one stream.

    Args:
        decoder: the weights, where they stay.
        height, width: of a latent frame.
        native, kernels: what computes small operations on a CPU and on a GPU.
    """

    def __init__(
        self,
        decoder: VaeDecoder,
        height: int,
        width: int,
        native: Native | None = None,
        kernels: VaeKernels = TORCH,
    ) -> None:
        whole = decoder.decoder
        parts = [*whole.middle, *whole.upsamples]
        shapes: list[Shape] = [(1, height, width)]
        for part in parts:
            shapes.append(larger(part, shapes[-1]) if isinstance(part, Upsample) else shapes[-1])
        self._work = work = Work(decoder.conv2.weight, _largest(parts, shapes), native, kernels)
        self._mean, self._std = decoder.statistics()
        self._conv2 = work.linear(decoder.conv2.weight, decoder.conv2.bias)
        self._conv1 = static_conv(whole.conv1, shapes[0], work)
        self._parts = [static_part(part, shape, work) for part, shape in zip(parts, shapes, strict=False)]
        self._parts.append(StaticHead(whole.head, shapes[-1], work))

    def buffers(self) -> list[Tensor]:
        """All memory that carries a stream from one latent frame to the next; it never moves."""
        return [conv.past for conv in self._convs()]

    def frames(self, latent: Tensor, *, first: bool) -> Tensor:
        """The frames of a stream's next latent frame.

        Args:
            latent: [16, h, w], as the transformer makes them, on the decoder's device.
            first: begins a stream; what was before is forgotten.

        Returns:
            [F, 3, 8h, 8w] in the weights' dtype, not clamped; F is 1 for the first latent frame, else 4.
        """
        if first:
            for past in self.buffers():
                past.zero_()
        x = (latent.float() * self._std + self._mean).permute(1, 2, 0)[None]
        self._conv1.take(self._conv2(x.to(self._work.between)))
        x = self._conv1(1).to(self._work.between)
        for part in self._parts:
            x = part(x, first=first)
        return x.permute(0, 3, 1, 2)

    def _convs(self) -> list[Conv]:
        return [self._conv1, *(conv for part in self._parts for conv in part.convs)]


def static_part(part: nn.Module, shape: Shape, work: Work) -> Part:
    """The same part, over memory for inputs of a shape."""
    match part:
        case ResidualBlock():
            return StaticResidual(part, shape, work)
        case FrameAttention():
            return StaticAttention(part, work)
        case Upsample():
            return StaticUpsample(part, shape, work)
    raise TypeError(f"{type(part).__name__}: no part of the VAE's decoder")


def static_conv(conv: CausalConv3d, shape: Shape, work: Work) -> Conv:
    """A causal convolution over three frames in time, for inputs of a shape."""
    return conv_of(conv.weight, conv.bias, shape, work)


def conv_of(weight: Tensor, bias: Tensor, shape: Shape, work: Work) -> Conv:
    """The same, of weights [C', C, 3, kh, kw]."""
    return (StaticConv if work.on_cpu else BesideConv)(weight, bias, shape, work)


def larger(part: Upsample, shape: Shape) -> Shape:
    """What an upsampling makes of a shape."""
    frames, height, width = shape
    return (frames if part.time_conv is None else 2 * frames, 2 * height, 2 * width)


def phases(weight: Tensor) -> Tensor:
    """A 3x3 convolution of an image doubled by nearest, as 2x2 convolutions of the image itself: 4/9 of the products.

    Args:
        weight: [C', C, 3, 3].

    Returns:
        [4 C', C, 2, 2] float32, by parity of the result's row, then column. Odd rows come out of the window one row
        further down, odd columns of that one column to the right.
    """
    above, here, below = weight.float().unbind(2)
    made = []
    for rows in (torch.stack((above, here + below), 2), torch.stack((above + here, below), 2)):
        left, middle, right = rows.unbind(3)
        made += [torch.stack((left, middle + right), 3), torch.stack((left + middle, right), 3)]
    return torch.cat(made)


def _largest(parts: list[nn.Module], shapes: list[Shape]) -> int:
    """Numbers in the largest frames that a convolution reads or makes."""
    sizes = [LANES * torch.Size(shapes[-1]).numel()]
    for part, shape in zip(parts, shapes, strict=False):
        widths = [max(conv.weight.shape[:2]) for conv in part.modules() if isinstance(conv, CausalConv3d)]
        sizes += [torch.Size(shape).numel() * width for width in widths]
    return max(sizes)
