"""Causal convolutions, norms and SiLU of the VAE's decoder over memory that stays, for one stream.

`causal_conv.py` is the definition. Frames are [T, H, W, C]. What a convolution has seen lies where it reads it, and
the norm and SiLU of new frames are written right there. `StaticConv` is for a CPU, `beside_conv.py` for a GPU. On a CPU
everything between convolutions is float32, which is faster there than bfloat16, and four or two frames are convolved at
once by `winograd.py`. Knows no decoder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.causal_conv import SMALLEST_SQUARE, ChannelNorm
from workers.models.native import DTYPES, Native
from workers.models.vae_kernels import TORCH, VaeKernels
from workers.models.winograd import POINTS, NativeWinogradConv, WinogradConv, part_of

PAST = 2
"""Frames before its own that a causal convolution sees."""

Shape = tuple[int, int, int]
"""Frames at most, height, width."""


class Work:
    """Where and in which dtypes a decoder computes, and memory that its parts use in turn.

    Args:
        like: one of its weights.
        largest: numbers that the largest frames inside hold together.
        kernels: what computes the operations between convolutions; a CPU has others for most.

    Attributes:
        dtype: of weights, and of what convolutions read.
        between: of all else.
        new: flat, frames on their way into a convolution or out of it; `room` and `narrow` what is used up at once.
            All empty on a GPU, where other temporaries than `beside` are the allocator's and the graphs'.
        beside: flat, what a convolution reads on a GPU, frames beside each other; empty on a CPU.
    """

    def __init__(self, like: Tensor, largest: int, native: Native | None = None, kernels: VaeKernels = TORCH) -> None:
        self.native = native if like.dtype in DTYPES and like.device.type == "cpu" else None
        self.kernels = kernels
        self.device, self.dtype = like.device, like.dtype
        self.between = torch.float32 if self.on_cpu else like.dtype
        self.beside = self.zeros(0 if self.on_cpu else (PAST + 1) * largest)
        largest = largest if self.on_cpu else 0
        self.new, self.room = self.zeros(largest), self.zeros(3 * largest)
        self.narrow = self.zeros(2 * largest, dtype=self.dtype)

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def by_conv3d(self) -> bool:
        """As measured on CPUs with AVX-512 BF16: there oneDNN's `conv3d` is fast in bfloat16 and slow in float32."""
        return self.on_cpu and self.dtype == torch.bfloat16

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of a part's own."""
        return torch.zeros(shape, device=self.device, dtype=dtype or self.between)

    def linear(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        """A convolution over single pixels, as a function of [..., C]."""
        weight, bias = weight.flatten(1).to(self.between), bias.to(self.between)
        return lambda x: F.linear(x, weight, bias)


class StaticConv:
    """A causal convolution with three taps in time, and the two frames that it has yet to see again.

    Args:
        weight: [C', C, 3, kh, kw], and bias [C'].
        shape: of its input.

    Attributes:
        past: [2, H, W, C].
    """

    def __init__(self, weight: Tensor, bias: Tensor, shape: Shape, work: Work) -> None:
        size = (*shape[1:], weight.shape[1])
        self._work, self._bias = work, bias
        self._padding = (weight.shape[3] // 2, weight.shape[4] // 2)
        self._winograd: WinogradConv | NativeWinogradConv | None = None
        if work.on_cpu and shape[0] in POINTS and weight.shape[3] > 1:
            self.past, self._new = work.zeros(PAST, *size), part_of(work.new, shape[0], *size)
            if work.native is None:
                self._winograd = WinogradConv(weight, bias, self.past, self._new, work.narrow, work.room)
            else:
                self._winograd = NativeWinogradConv(work.native, weight, bias, self.past, shape[0], work.narrow)
            self._out = part_of(work.new, *shape, len(weight))
        else:
            self._seen = work.zeros(PAST + shape[0], *size, dtype=work.dtype)
            self.past, self._new = self._seen[:PAST], self._seen[PAST:]
        if work.by_conv3d:
            self._weight = weight.contiguous(memory_format=torch.channels_last_3d)
        else:
            beside = weight.transpose(1, 2).flatten(1, 2)
            self._weight = beside.contiguous(memory_format=torch.channels_last)

    def take(self, x: Tensor, activation: "Activation | None" = None) -> None:
        """x [count, H, W, C], or its norm and SiLU, is the next input."""
        if activation is None:
            self._new[: len(x)].copy_(x)
        elif isinstance(self._winograd, NativeWinogradConv) and len(x) == len(self._new):
            self._winograd.take(x, activation.gamma)
        else:
            activation.into(self._new[: len(x)], x)

    def __call__(self, count: int) -> Tensor:
        """The output of `count` new frames, [count, H, W, C']; any later part may overwrite it."""
        if self._winograd is None or count < len(self._new):
            return self._taps(count)
        self._winograd.write(self._out, add=False)
        return self._out

    def pass_on(self, count: int, conv: "StaticConv", activation: "Activation") -> None:
        """Norm and SiLU of the output are another's next input."""
        conv.take(self(count), activation)

    def split(self, count: int) -> Tensor:
        """Two frames of each that a call would give, [2 count, H, W, C' / 2]."""
        return self._work.kernels.split(self(count), None)

    def add_to(self, x: Tensor) -> None:
        """Adds what a call would give to x [count, H, W, C']."""
        if self._winograd is None or len(x) < len(self._new):
            x.add_(self._taps(len(x)))
        else:
            self._winograd.write(x, add=True)

    def _taps(self, count: int) -> Tensor:
        if self._winograd is None:
            seen = self._seen[: PAST + count]
        else:
            seen = torch.cat((self.past, self._new[:count])).to(self._work.dtype)
        if self._work.by_conv3d:
            video = seen[None].permute(0, 4, 1, 2, 3)
            out = F.conv3d(video, self._weight, self._bias, padding=(0, *self._padding))[0].permute(1, 2, 3, 0)
        else:
            beside = torch.cat([seen[tap : tap + count] for tap in range(PAST + 1)], dim=-1).permute(0, 3, 1, 2)
            out = F.conv2d(beside, self._weight, self._bias, padding=self._padding).permute(0, 2, 3, 1)
        self._keep(count)
        return out

    def _keep(self, count: int) -> None:
        """Makes the last frames the past."""
        if count >= PAST:
            self.past.copy_(self._new[count - PAST : count])
        else:
            self.past[0].copy_(self.past[1])
            self.past[1].copy_(self._new[0])


class Activation:
    """Norm and SiLU."""

    def __init__(self, norm: ChannelNorm, work: Work) -> None:
        self._work = work
        self.gamma = norm.gamma.flatten().to(work.between)
        self._mean = work.zeros(len(self.gamma), 1) + 1 / len(self.gamma)
        self._no_past = work.zeros(0)

    def into(self, out: Tensor, x: Tensor) -> None:
        """x [T, H, W, C] -> out, the same shape."""
        if self._work.native is not None:
            self._work.native.activate(x, self.gamma, out)
        elif self._work.on_cpu:
            self._in_float32(out, x)
        else:
            self._work.kernels.lay_beside(x, None, self.gamma, self._no_past, out)

    def _in_float32(self, out: Tensor, x: Tensor) -> None:
        """`rms_norm` would take five times as long on a CPU: here a product sums the squares."""
        squares = part_of(self._work.room, *x.shape)
        y = out if out.dtype == torch.float32 else part_of(self._work.new, *x.shape)
        if x.dtype != y.dtype:
            x = y.copy_(x)
        mean = torch.mul(x, x, out=squares).flatten(0, 2) @ self._mean
        torch.mul(x, mean.add_(SMALLEST_SQUARE).rsqrt_().view(*x.shape[:3], 1), out=y)
        F.silu(y.mul_(self.gamma), inplace=True)
        if y is not out:
            out.copy_(y)
