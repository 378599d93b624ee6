"""Noise is a pure function of seed, block and step."""

import pytest
import torch

from ipc.errors import InputError
from workers.models.noise import DrawnNoise, GivenNoise

SHAPE = (3, 16, 4, 6)


def test_order_and_instance_do_not_matter() -> None:
    one, other = DrawnNoise(7, SHAPE), DrawnNoise(7, SHAPE)
    forward = [one.start(block) for block in range(4)]
    backward = [other.start(block) for block in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    torch.manual_seed(99)
    assert torch.equal(one.between(2, 1), other.between(2, 1))


def test_what_was_expected_is_what_would_have_been_drawn() -> None:
    """Right, wrong, repeated and for a block that is begun anew; the block before stays as it was handed out."""
    ahead, plain = DrawnNoise(7, SHAPE), DrawnNoise(7, SHAPE)

    def draws(noise: DrawnNoise, block: int) -> list[torch.Tensor]:
        return [noise.start(block), *(noise.between(block, step) for step in range(3))]

    kept = []
    for expected, asked in ((1, 1), (2, 2), (2, 2), (3, 9), (4, 4), (3, 3)):
        ahead.expect(expected, 4)
        kept.append((asked, draws(ahead, asked)))
        for block, given in kept[-2:]:
            assert all(torch.equal(a, b) for a, b in zip(given, draws(plain, block), strict=True)), block


def test_every_draw_is_another() -> None:
    drawn = [DrawnNoise(seed, SHAPE).start(block) for seed in (0, 1) for block in (0, 1)]
    drawn += [DrawnNoise(0, SHAPE).between(block, step) for block in (0, 1) for step in (0, 1)]
    flat = torch.stack(drawn).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 0.15


def test_noise_is_standard_normal() -> None:
    noise = DrawnNoise(0, (30, 16, 16, 16)).start(0)
    assert noise.dtype is torch.float32
    assert noise.shape == (1, 30, 16, 16, 16)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_a_seed_is_the_same_stream_in_every_version() -> None:
    """Half of the first eight bytes of SHA-256 of `longlive 7 2 1`: seed 7, block 2, after step 0."""
    expected = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5380262913104152225))
    assert torch.equal(DrawnNoise(7, SHAPE).between(2, 0), expected)


def test_the_largest_seed_works() -> None:
    DrawnNoise(2**63 - 1, SHAPE).start(2**40)


def test_given_noise_is_handed_out_by_block_and_step() -> None:
    noise, renoise = torch.randn(1, 6, 16, 4, 6), torch.randn(2, 3, *SHAPE)
    given = GivenNoise(noise, renoise, SHAPE, steps=4)
    assert torch.equal(given.start(1), noise[:, 3:])
    assert torch.equal(given.between(1, 2), renoise[None, 1, 2])
    with pytest.raises(InputError, match="holds 2 blocks"):
        given.start(2)


@pytest.mark.parametrize(
    ("noise", "renoise"),
    [
        ((1, 5, 16, 4, 6), (2, 3, *SHAPE)),
        ((1, 6, 8, 4, 6), (2, 3, *SHAPE)),
        ((1, 6, 16, 4, 6), (2, 2, *SHAPE)),
        ((1, 5, 16, 4, 6), (1, 3, *SHAPE)),
        ((6,), ()),
    ],
)
def test_given_noise_of_other_shapes_is_refused(noise: tuple[int, ...], renoise: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"found .* expected"):
        GivenNoise(torch.zeros(noise), torch.zeros(renoise), SHAPE, steps=4)
