"""Rotary positions: relative by construction, exact far out."""

import math

import pytest
import torch
from golden_cases import relative_error

from workers.models.rope import THETA, rotate, rotation

CPU = torch.device("cpu")


def random_heads(tokens: int, head_dim: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, 2, head_dim, generator=torch.Generator().manual_seed(seed))


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bihd,bjhd->bhij", q, k)


@pytest.mark.parametrize("head_dim", [12, 24, 48, 128])
@pytest.mark.parametrize("far", [9, 1000, 3_000_000])
def test_scores_depend_on_distances_alone(head_dim: int, far: int) -> None:
    """Moving queries and keys together by any number of latent frames changes nothing."""
    tokens = 2 * 3 * 2
    q, k = random_heads(tokens, head_dim, 0), random_heads(tokens, head_dim, 1)
    near = scores(rotate(q, rotation((5, 6), 3, 2, head_dim, CPU)), rotate(k, rotation((2, 3), 3, 2, head_dim, CPU)))
    moved = scores(
        rotate(q, rotation((5 + far, 6 + far), 3, 2, head_dim, CPU)),
        rotate(k, rotation((2 + far, 3 + far), 3, 2, head_dim, CPU)),
    )
    assert relative_error(moved, near) <= 1e-5


@pytest.mark.parametrize("frame", [7, 3_000_000])
def test_angles_are_those_of_wan(frame: int) -> None:
    """Frames take what rows and columns leave; the first pair of each turns by one radian a step."""
    turn = rotation((frame,), 2, 2, 128, CPU)
    assert turn.cos.shape == (4, 64)
    for pair in range(22):
        assert turn.cos[3, pair] == pytest.approx(math.cos(frame * THETA ** (-2 * pair / 44)), abs=1e-6)
        assert turn.sin[3, pair] == pytest.approx(math.sin(frame * THETA ** (-2 * pair / 44)), abs=1e-6)
    for first in (22, 43):
        assert turn.cos[3, first] == pytest.approx(math.cos(1), abs=1e-6)
        assert turn.cos[3, first + 1] == pytest.approx(math.cos(THETA ** (-2 / 42)), abs=1e-6)


def test_rotation_keeps_lengths_and_dtype() -> None:
    x = random_heads(4, 24, 2)
    turned = rotate(x, rotation((3,), 2, 2, 24, CPU))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rotation((3,), 2, 2, 24, CPU)).dtype is torch.bfloat16
