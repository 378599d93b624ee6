"""The operations of `vae_kernels.py` as Triton kernels for a GPU: each number is read once and goes where it is read.

Functions are as those of the same name there, on contiguous tensors. A program works on some neighbouring pixels, of
all frames where frames depend on each other. Imported only where it is chosen. Knows no more than `vae_kernels.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from workers.models.causal_conv import SMALLEST_SQUARE
from workers.models.vae_kernels import VaeKernels

TILE = 2048
"""Numbers that a program of four warps holds at once: 16 a thread."""


@triton.jit
def _lay_kernel(
    x_ptr,
    bias_ptr,
    gamma_ptr,
    past_ptr,
    beside_ptr,
    pixels,
    eps,
    FRAMES: tl.constexpr,
    TAPS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some pixels of all frames, those before first: frame f is the tap k of output frame f - k."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    pixel, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (pixel < pixels - first) & (channel < C)
    at, beside_at = pixel * C + channel, pixel * (TAPS * C) + channel
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    for frame in tl.static_range(TAPS - 1 + FRAMES):
        if frame < TAPS - 1:
            y = tl.load(past_ptr + (frame * pixels + first) * C + at, mask=inside, other=0.0)
        else:
            new = frame - (TAPS - 1)
            x = tl.load(x_ptr + (new * pixels + first) * C + at, mask=inside, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                x += bias
            if gamma_ptr is not None:
                x = x * tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None] * gamma
                x = x / (1.0 + tl.exp(-x))
            y = x.to(beside_ptr.dtype.element_ty)
        for tap in tl.static_range(TAPS):
            if frame >= tap and frame - tap < FRAMES:
                place = ((frame - tap) * pixels + first) * (TAPS * C) + tap * C
                tl.store(beside_ptr + place + beside_at, y, mask=inside)
        if frame >= FRAMES:
            # What is overwritten here another thread may still have to read.
            tl.debug_barrier()
            tl.store(past_ptr + ((frame - FRAMES) * pixels + first) * C + at, y, mask=inside)


@triton.jit
def _add_kernel(x_ptr, made_ptr, bias_ptr, pixels, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Some pixels, those of all frames in a row."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    pixel, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (pixel < pixels - first) & (channel < C)
    at = pixel * C + channel
    x = tl.load(x_ptr + first * C + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(made_ptr + first * C + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    tl.store(x_ptr + first * C + at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _split_kernel(made_ptr, bias_ptr, out_ptr, pixels, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Some pixels of a frame, both halves of their channels."""
    first, frame = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    pixel, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (pixel < pixels - first) & (channel < C)
    for half in tl.static_range(2):
        there = (frame * pixels + first) * (2 * C) + half * C
        x = tl.load(made_ptr + there + pixel * (2 * C) + channel, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + half * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        here = ((2 * frame + half) * pixels + first) * C
        tl.store(out_ptr + here + pixel * C + channel, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _spread_kernel(
    made_ptr, bias_ptr, out_ptr, height, width, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Of some pixels in a row of a picture the four that each becomes."""
    first, line = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    picture = tl.program_id(2).to(tl.int64)
    pixel, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (pixel < width - first) & (channel < C)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    for phase in tl.static_range(4):
        row, column = phase // 2, phase % 2
        there = ((picture * (height + 1) + line + row) * (width + 1) + first + column) * (4 * C) + phase * C
        x = tl.load(made_ptr + there + pixel * (4 * C) + channel, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias
        here = ((2 * (picture * height + line) + row) * (2 * width) + 2 * first + column) * C
        tl.store(out_ptr + here + pixel * (2 * C) + channel, x.to(out_ptr.dtype.element_ty), mask=inside)


def lay_beside(x: Tensor, bias: Tensor | None, gamma: Tensor | None, past: Tensor, beside: Tensor) -> None:
    assert x.is_contiguous() and past.is_contiguous() and beside.is_contiguous()
    frames, pixels, tile = len(x), x[0, ..., 0].numel(), _tile(x.shape[-1])
    sizes = {"FRAMES": frames, "TAPS": len(past) + 1, **tile}
    _lay_kernel[(triton.cdiv(pixels, tile["ROWS"]),)](
        x, bias, gamma, past, beside, pixels, SMALLEST_SQUARE, **sizes, num_warps=4
    )


def add(x: Tensor, made: Tensor, bias: Tensor) -> None:
    assert x.is_contiguous() and made.is_contiguous()
    pixels, tile = x[..., 0].numel(), _tile(x.shape[-1])
    _add_kernel[(triton.cdiv(pixels, tile["ROWS"]),)](x, made, bias, pixels, **tile, num_warps=4)


def split(made: Tensor, bias: Tensor | None) -> Tensor:
    assert made.is_contiguous()
    frames, height, width, channels = made.shape
    out, tile = made.new_empty(2 * frames, height, width, channels // 2), _tile(channels // 2)
    grid = (triton.cdiv(height * width, tile["ROWS"]), frames)
    _split_kernel[grid](made, bias, out, height * width, **tile, num_warps=4)
    return out


def spread(made: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    assert made.is_contiguous() and out.is_contiguous()
    height, width, tile = made.shape[1] - 1, made.shape[2] - 1, _tile(out.shape[-1])
    grid = (triton.cdiv(width, tile["ROWS"]), height, len(made))
    _spread_kernel[grid](made, bias, out, height, width, **tile, num_warps=4)
    return out


def _tile(channels: int) -> dict[str, int]:
    """What a program holds at once: pixels of so many channels, the power of two that covers them."""
    width = 1 << (channels - 1).bit_length()
    return {"C": channels, "WIDTH": width, "ROWS": max(1, TILE // width)}


TRITON = VaeKernels("triton", lay_beside, add, split, spread)
