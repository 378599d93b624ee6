"""Weights drawn from a seed, for a model without trained files: finite, lively, the same on every machine.

The picture they make is abstract. Every tensor has a generator of its own, seeded by its name, so that neither order
nor thread count matters. Knows names and shapes only.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

GAIN = {"text_embedding.2.weight": 3.0, "decoder.head.2.weight": 0.5, "modulation": 0.5}
"""Tensors, by the end of their name, drawn wider or narrower than their fan-in says: prompts shall show and pixels
shall have contrast."""


def draw(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A tensor's values, float32 on the CPU: norms near one, biases small, all else scaled by fan-in."""
    digest = hashlib.sha256(f"weights {seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(shape, generator=generator)
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return 1 + 0.1 * values
    gain = next((gain for end, gain in GAIN.items() if name.endswith(end)), 1.0)
    if len(shape) == 1:
        return 0.1 * values
    return values * gain / math.sqrt(max(1, math.prod(shape[1:])))


@torch.no_grad()
def fill(module: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Gives all parameters of a module built on the meta device values on a device, in a dtype."""
    module.to_empty(device=device)
    module.to(dtype)
    for name, parameter in module.named_parameters():
        parameter.copy_(draw(name, parameter.shape, seed))
