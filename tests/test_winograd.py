"""Short filters: fewer products, the same sum."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative_error

from workers.models.static_vae import phases
from workers.models.winograd import WinogradConv, bias_parts, tap_sums

HEIGHT, WIDTH, IN, OUT = 5, 6, 3, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def winograd(frames: int, new: torch.Tensor, past: torch.Tensor, dtype: torch.dtype = torch.float32) -> WinogradConv:
    weight, bias = drawn(OUT, IN, 3, 3, 3, seed=1).to(dtype), drawn(OUT, seed=2).to(dtype)
    room, narrow = torch.zeros(8 * HEIGHT * WIDTH * OUT), torch.zeros(2 * HEIGHT * WIDTH * IN, dtype=dtype)
    return WinogradConv(weight, bias, past, new, narrow, room)


def by_conv3d(seen: torch.Tensor) -> torch.Tensor:
    """[T + 2, H, W, C] -> [T, H, W, C'] in float64."""
    weight, bias = drawn(OUT, IN, 3, 3, 3, seed=1).double(), drawn(OUT, seed=2).double()
    video = seen.double().permute(3, 0, 1, 2)[None]
    return F.conv3d(video, weight, bias, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("frames", [2, 4])
def test_equals_conv3d(frames: int) -> None:
    """Frame after frame: what was new is past in the next call."""
    video = drawn(2 + 3 * frames, HEIGHT, WIDTH, IN)
    past, new = video[:2].clone(), torch.zeros(frames, HEIGHT, WIDTH, IN)
    conv, y = winograd(frames, new, past), torch.zeros(frames, HEIGHT, WIDTH, OUT)
    made = []
    for begin in range(2, len(video), frames):
        new.copy_(video[begin : begin + frames])
        conv.write(y, add=False)
        made.append(y.clone())
    assert relative_error(torch.cat(made), by_conv3d(video).float()) <= 1e-6


@pytest.mark.parametrize("frames", [2, 4])
def test_adds_to_what_is_there(frames: int) -> None:
    video, there = drawn(2 + frames, HEIGHT, WIDTH, IN), drawn(frames, HEIGHT, WIDTH, OUT, seed=3)
    y = there.clone()
    winograd(frames, video[2:].clone(), video[:2].clone()).write(y, add=True)
    assert relative_error(y - there, by_conv3d(video).float()) <= 1e-6


@pytest.mark.parametrize(("frames", "most"), [(2, 6e-3), (4, 1e-2)])
def test_rounds_little_in_bfloat16(frames: int, most: float) -> None:
    """Frames without anything in common are the worst case; `conv3d` in bfloat16 is off by 3e-3."""
    video = drawn(2 + frames, HEIGHT, WIDTH, IN)
    y = torch.zeros(frames, HEIGHT, WIDTH, OUT)
    winograd(frames, video[2:].clone(), video[:2].clone(), torch.bfloat16).write(y, add=False)
    assert relative_error(y, by_conv3d(video).float()) <= most


@pytest.mark.parametrize("frames", [2, 4])
def test_products_are_few(frames: int) -> None:
    assert len(tap_sums(drawn(1, 1, 3, 3, 3), frames)) == len(bias_parts(drawn(1), frames)) == frames + 2


def test_phases_equal_a_convolution_of_the_doubled_image() -> None:
    image, weight = drawn(2, IN, HEIGHT, WIDTH), drawn(OUT, IN, 3, 3, seed=1)
    doubled = F.conv2d(F.interpolate(image, scale_factor=2.0, mode="nearest-exact"), weight, padding=1)
    made = F.conv2d(image, phases(weight), padding=1).chunk(4, dim=1)
    for phase, each in enumerate(made):
        row, column = divmod(phase, 2)
        found = each[:, :, row : row + HEIGHT, column : column + WIDTH]
        assert relative_error(found, doubled[:, :, row::2, column::2]) <= 1e-6
