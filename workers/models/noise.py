"""The noise of a stream as a pure function of (seed, block, step).

The same on every device, after a restart or a replay. Drawn in float32 on the CPU; the caller copies it to where it
is needed.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from ipc.errors import InputError


class NoiseSource(Protocol):
    """Where the noise of a block comes from."""

    def start(self, block: int) -> Tensor:
        """The noise a block begins with, [1, F, 16, h, w] float32."""

    def between(self, block: int, step: int) -> Tensor:
        """The noise mixed back in after a step that is not the last, [1, F, 16, h, w] float32."""

    def expect(self, block: int, steps: int) -> None:
        """Says which block of how many steps will likely be asked for next, while there is time to get it ready."""


class DrawnNoise:
    """Gaussian noise seeded by SHA-256 of (seed, block, step).

    What was expected is drawn ahead, into one of two places in turn: a copy of one block to a GPU may still be on its
    way while the next is drawn.

    Args:
        shape: (F, 16, h, w) of a block.
        pinned: whether what is drawn ahead lies where a GPU copies from by itself.
    """

    def __init__(self, seed: int, shape: tuple[int, int, int, int], *, pinned: bool = False) -> None:
        self.seed = seed
        self.shape = shape
        self._pinned = pinned
        self._ahead: dict[int, Tensor] = {}
        self._holds: dict[int, int] = {}

    def start(self, block: int) -> Tensor:
        return self._get(block, 0)

    def between(self, block: int, step: int) -> Tensor:
        return self._get(block, step + 1)

    def expect(self, block: int, steps: int) -> None:
        place = block % 2
        if self._holds.get(place) == block:
            return
        if place not in self._ahead:
            self._ahead[place] = torch.empty(steps, 1, *self.shape, pin_memory=self._pinned)
        for draw, out in enumerate(self._ahead[place]):
            self._draw(block, draw, out)
        self._holds[place] = block

    def _get(self, block: int, draw: int) -> Tensor:
        if self._holds.get(block % 2) == block and draw < len(self._ahead[block % 2]):
            return self._ahead[block % 2][draw]
        return self._draw(block, draw, torch.empty(1, *self.shape))

    def _draw(self, block: int, draw: int, out: Tensor) -> Tensor:
        digest = hashlib.sha256(f"longlive {self.seed} {block} {draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(out.shape, generator=generator, out=out)


class GivenNoise:
    """Noise read from tensors, for comparisons with a reference.

    Args:
        noise: [1, T, 16, h, w], the starting noise of every latent frame.
        renoise: [blocks, steps - 1, F, 16, h, w].
        shape: (F, 16, h, w) of a block.

    Raises:
        InputError: the shapes are not those of this stream.
    """

    def __init__(self, noise: Tensor, renoise: Tensor, shape: tuple[int, int, int, int], steps: int) -> None:
        frames = shape[0]
        blocks = noise.shape[1] // frames if noise.ndim == 5 else 0
        if noise.ndim != 5 or tuple(noise.shape[2:]) != shape[1:] or noise.shape[1] != blocks * frames or not blocks:
            raise InputError(
                f"noise: found {list(noise.shape)}, expected [1, k*{frames}, {', '.join(map(str, shape[1:]))}]"
            )
        expected = (blocks, steps - 1, *shape)
        if tuple(renoise.shape) != expected:
            raise InputError(f"renoise: found {list(renoise.shape)}, expected {list(expected)}")
        self.blocks = blocks
        self.frames = frames
        self.noise = noise.float()
        self.renoise = renoise.float()

    def start(self, block: int) -> Tensor:
        self._check(block)
        return self.noise[:, block * self.frames : (block + 1) * self.frames]

    def between(self, block: int, step: int) -> Tensor:
        self._check(block)
        return self.renoise[None, block, step]

    def expect(self, block: int, steps: int) -> None:
        """All of it is there."""

    def _check(self, block: int) -> None:
        if block >= self.blocks:
            raise InputError(f"noise: holds {self.blocks} blocks, block {block} was asked for")
