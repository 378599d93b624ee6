"""Causal convolutions of the VAE's decoder on a GPU: one over an image for all three taps in time.

As `static_conv.py`'s on a CPU, over memory that stays. What a convolution reads lies in memory that all of them use in
turn: it is laid there by the operations of `vae_kernels.py` and used up at once. Biases are added with what comes
after, for cuDNN's convolutions leave them to a pass of its own. Knows no decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.static_conv import PAST, Activation, Shape, Work
from workers.models.winograd import part_of


class BesideConv:
    """As `StaticConv`.

    Attributes:
        past: [2, H, W, C].
    """

    def __init__(self, weight: Tensor, bias: Tensor, shape: Shape, work: Work) -> None:
        channels = weight.shape[1]
        self._kernels, self._bias = work.kernels, bias
        self.past = work.zeros(PAST, *shape[1:], channels)
        self._beside = part_of(work.beside, *shape, (PAST + 1) * channels)
        self._weight = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        self._padding = (weight.shape[3] // 2, weight.shape[4] // 2)

    def take(self, x: Tensor, activation: Activation | None = None) -> None:
        """x [count, H, W, C], or its norm and SiLU, is the next input."""
        self._lay(x, None, activation)

    def __call__(self, count: int) -> Tensor:
        """The output of `count` new frames, [count, H, W, C']."""
        return self._without_bias(count).add_(self._bias)

    def pass_on(self, count: int, conv: "BesideConv", activation: Activation) -> None:
        """Norm and SiLU of the output are another's next input."""
        conv._lay(self._without_bias(count), self._bias, activation)

    def add_to(self, x: Tensor) -> None:
        """Adds what a call would give to x [count, H, W, C']."""
        self._kernels.add(x, self._without_bias(len(x)), self._bias)

    def split(self, count: int) -> Tensor:
        """Two frames of each that a call would give, [2 count, H, W, C' / 2]."""
        return self._kernels.split(self._without_bias(count), self._bias)

    def _lay(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        gamma = None if activation is None else activation.gamma
        self._kernels.lay_beside(x, bias, gamma, self.past, self._beside[: len(x)])

    def _without_bias(self, count: int) -> Tensor:
        image = self._beside[:count].permute(0, 3, 1, 2)
        return F.conv2d(image, self._weight, padding=self._padding).permute(0, 2, 3, 1)
