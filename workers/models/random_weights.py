"""Weights drawn from a seed, for a model without trained files: finite, lively, the same in every process.

The picture they make is abstract. Every tensor has a generator of its own, seeded by its name, so that neither order
nor thread count matters. Knows names and shapes only.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.models.tensor_file import Described

CPU = torch.device("cpu")
GAIN = {"text_embedding.2.weight": 18.0, "decoder.head.2.weight": 0.8, "modulation": 0.5}
"""Tensors, by the end of their name, drawn wider or narrower than their fan-in says: pixels shall have contrast, and a
prompt shall show although its few tokens are seen among hundreds of empty positions."""
LARGE = 2**21
"""Elements from which on a matrix is laid out from fewer numbers: a core draws some 66 million a second, and would for
UMT5-XXL draw 5.7 billion."""
DISTINCT = 2**20 - 3
"""Numbers that such a matrix is laid out from, again and again: a prime, so that no row comes twice."""


def draw(
    name: str,
    shape: torch.Size,
    seed: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A tensor's values, the same on every device: norms near one, biases near zero, all else scaled by fan-in.

    A convolution's weights sum to nothing over its inputs: else what all channels have in common, which SiLU keeps
    positive, would grow from layer to layer and tint every picture alike. A large matrix is never whole in host memory
    unless that is its device.
    """
    if len(shape) == 2 and shape.numel() >= LARGE:
        return _repeated(_drawn(name, torch.Size((DISTINCT,)), shape, seed).to(device, dtype), shape)
    return _drawn(name, shape, shape, seed).to(device, dtype)


def _drawn(name: str, drawn: torch.Size, shape: torch.Size, seed: int) -> Tensor:
    """As many values of a tensor of `shape` as `drawn` says, float32 on the CPU."""
    digest = hashlib.sha256(f"weights {seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(drawn, generator=generator)
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return values.mul_(0.1).add_(1.0)
    if len(shape) == 1:
        return values.mul_(0.02)
    if len(shape) >= 4:
        values -= values.mean(1, keepdim=True)
    gain = next((gain for end, gain in GAIN.items() if name.endswith(end)), 1.0)
    return values.mul_(gain / math.sqrt(max(1, math.prod(shape[1:]))))


def _repeated(values: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of a shape filled with values [n], which begin anew wherever they end."""
    filled = values.new_empty(shape.numel())
    whole, rest = divmod(shape.numel(), len(values))
    filled[: whole * len(values)].view(whole, len(values)).copy_(values)
    filled[filled.numel() - rest :].copy_(values[:rest])
    return filled.view(shape)


class DrawnTensors:
    """Random weights in the place of a file: a tensor is drawn when it is read.

    Args:
        shapes: the tensors' names and shapes, as a file of the model would have them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.path = Path("random weights")
        self.shapes: dict[str, Described] = {name: (shape, "float32") for name, shape in shapes.items()}
        self._seed = seed

    def read(self, name: str) -> Tensor:
        return self.place(name, CPU, torch.float32)

    def place(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor where it shall be, and no more of it anywhere else than was drawn."""
        return draw(name, torch.Size(self.shapes[name][0]), self._seed, device, dtype)
