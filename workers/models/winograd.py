"""Three taps in time over two or four frames at once: four or six products instead of six or twelve.

Winograd's short filters along time (Lavin and Gray 2015, arXiv 1509.09308): sums of input frames times sums of taps,
and sums of these products are the output frames. Exact but for rounding. Both filters evaluate polynomials at 0, at
infinity and at plus and minus some points; products stand in that order. For four frames the points are +-1/sqrt(2)
and +-sqrt(2), of all those tried the ones that round least. Knows no cache and no decoder.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.native import Native

LOW, HIGH = math.sqrt(0.5), math.sqrt(2.0)
POINTS = {2: (1.0,), 4: (LOW, HIGH)}
"""Positive points, by the number of frames made at once."""
SCALES = {2: (1.0,), 4: (LOW, 2.0)}
"""Of the products at each point: those that leave the fewest factors for later."""


def tap_sums(weight: Tensor, frames: int) -> list[Tensor]:
    """Taps [C', C, 3, kh, kw] -> the factor of each product, [C', C, kh, kw] float64."""
    taps = weight.double().unbind(2)
    finite = (0.0, *(sign * point for point in POINTS[frames] for sign in (1, -1)))
    scales = (1.0, *(scale for scale in SCALES[frames] for _ in range(2)))
    sums = []
    for value, scale in zip(finite, scales, strict=True):
        apart = math.prod(value - other for other in finite if other != value)
        sums.append((taps[0] + value * taps[1] + value**2 * taps[2]) * (scale / apart))
    return [sums[0], taps[2], *sums[1:]]


def bias_parts(bias: Tensor, frames: int) -> list[Tensor]:
    """What each product must bring so that every output frame gets `bias` [C'], float64."""
    points = list(zip(POINTS[frames], SCALES[frames], strict=True))
    rows = []
    for power in range(frames):
        finite = [(sign * point) ** power / scale for point, scale in points for sign in (1, -1)]
        rows.append([float(power == 0), float(power + 1 == frames), *finite])
    shares = torch.linalg.pinv(torch.tensor(rows, dtype=torch.float64)).sum(1)
    return [share * bias.double() for share in shares.to(bias.device)]


class WinogradConv:
    """A causal convolution of exactly `frames` new frames and the two before them.

    Args:
        weight: [C', C, 3, kh, kw], and bias [C'], in the dtype of the products; space is padded to keep its size.
        past: [2, H, W, C] float32; the last new frames afterwards.
        new: [frames, H, W, C] float32, frames 2 or 4.
        narrow: flat memory of the weights' dtype, at least two input frames; overwritten.
        room: flat float32 memory, at least six input or output frames, eight for frames 4; overwritten.
    """

    def __init__(self, weight: Tensor, bias: Tensor, past: Tensor, new: Tensor, narrow: Tensor, room: Tensor) -> None:
        count, shape = len(new), new.shape[1:]
        self._factors = factors_of(weight, bias, count)
        self._padding = (weight.shape[3] // 2, weight.shape[4] // 2)
        self._past, self._new = past, new
        self._sums = part_of(narrow, 2, *shape)
        self._images = [image[None].permute(0, 3, 1, 2) for image in self._sums]
        self._parts, self._wide_sums = part_of(room, 2, 2, *shape)
        self._wide_products = part_of(room, 2, *shape[:2], len(weight))
        rest = room[max(self._parts.numel() * 2, self._wide_products.numel()) :]
        self._halves = part_of(rest, len(POINTS[count]), 2, *shape[:2], len(weight))

    def write(self, y: Tensor, *, add: bool) -> None:
        """Writes the output frames to y [frames, H, W, C'] float32, or adds them to it; y may be `new`."""
        first, last, *halves = self._outer_and_halves()
        self._past.copy_(self._new[-2:])
        frames = y.unbind()
        write = Tensor.add_ if add else Tensor.copy_
        write(frames[0], first)
        write(frames[-1], last)
        even, odd = halves[0]
        if len(frames) == 2:
            frames[0].add_(even)
            frames[1].add_(odd)
            return
        more_even, more_odd = halves[1]
        frames[0].add_(even, alpha=HIGH).add_(more_even, alpha=0.5)
        frames[3].add_(odd, alpha=0.5).add_(more_odd, alpha=HIGH)
        if add:
            frames[1].add_(odd).add_(more_odd, alpha=LOW)
            frames[2].add_(even, alpha=LOW).add_(more_even)
        else:
            torch.add(odd, more_odd, alpha=LOW, out=frames[1])
            torch.add(more_even, even, alpha=LOW, out=frames[2])

    def _outer_and_halves(self) -> list[Tensor]:
        """The products at 0 and infinity, then sum and difference of those at every pair of points."""
        past, new, part = self._past, self._new, self._parts
        if len(new) == 2:
            outer = self._products(0, torch.sub(new, past, out=part))
            return [*outer, self._pair(0, new[0], past[1], 1.0)]
        outer = self._products(0, torch.add(past, new[2:], out=part).add_(new[:2], alpha=-(LOW**2 + HIGH**2)))
        made = [*outer]
        for number, (point, other) in enumerate(((LOW, HIGH), (HIGH, LOW))):
            odd = torch.sub(new[1], past[1], alpha=other**2, out=part[0])
            even = torch.sub(new[2], new[0], alpha=other**2, out=part[1])
            made.append(self._pair(number, even, odd, point))
        return made

    def _pair(self, number: int, even: Tensor, odd: Tensor, point: float) -> Tensor:
        plus, minus = self._wide_sums
        torch.add(even, odd, alpha=point, out=plus)
        torch.sub(even, odd, alpha=point, out=minus)
        plus, minus = self._products(2 + 2 * number, self._wide_sums)
        halves, wide = self._halves[number], self._wide_products
        if plus.dtype != wide.dtype:
            plus, minus = wide[0].copy_(plus), wide[1].copy_(minus)
        torch.add(plus, minus, out=halves[0])
        torch.sub(plus, minus, out=halves[1])
        return halves

    def _products(self, number: int, sums: Tensor) -> list[Tensor]:
        """Two sums times their factors, from the one of a number on."""
        self._sums.copy_(sums)
        made = []
        for image, (weight, bias) in zip(self._images, self._factors[number : number + 2], strict=True):
            made.append(F.conv2d(image, weight, bias, padding=self._padding).permute(0, 2, 3, 1)[0])
        return made


class NativeWinogradConv:
    """The same with norm and SiLU before it, in as few passes over memory as can be.

    Args:
        weight, bias, past: as of `WinogradConv`.
        gamma: of the norm, [C] float32.
        frames: 2 or 4.
        narrow: flat memory of the weights' dtype, at least `frames` + 2 input frames; overwritten.
    """

    def __init__(self, native: Native, weight: Tensor, bias: Tensor, past: Tensor, frames: int, narrow: Tensor) -> None:
        self._native = native
        self._factors = factors_of(weight, bias, frames)
        self._padding = (weight.shape[3] // 2, weight.shape[4] // 2)
        self._past = past
        self._sums = part_of(narrow, frames + 2, *past.shape[1:])
        self._images = [image[None].permute(0, 3, 1, 2) for image in self._sums]

    def take(self, x: Tensor, gamma: Tensor) -> None:
        """x [frames, H, W, C] float32 is the next input, before the norm."""
        self._native.spread(x, gamma, self._past, self._sums)

    def write(self, y: Tensor, *, add: bool) -> None:
        """Writes the output frames to y [frames, H, W, C'] float32, or adds them to it; y may be what was taken."""
        products = []
        for image, (weight, bias) in zip(self._images, self._factors, strict=True):
            product = F.conv2d(image, weight, bias, padding=self._padding)
            products.append(product.contiguous(memory_format=torch.channels_last))
        self._native.gather(products, y, add=add)


def factors_of(weight: Tensor, bias: Tensor, frames: int) -> list[tuple[Tensor, Tensor]]:
    """Factor and bias of each product, in the dtype of the weights and laid out for `conv2d` over channels last."""
    factors = zip(tap_sums(weight, frames), bias_parts(bias, frames), strict=True)
    nhwc = torch.channels_last
    return [(w.to(weight.dtype).contiguous(memory_format=nhwc), b.to(weight.dtype)) for w, b in factors]


def part_of(memory: Tensor, *shape: int) -> Tensor:
    """The beginning of flat memory as frames."""
    return memory[: torch.Size(shape).numel()].view(shape)
