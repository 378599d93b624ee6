"""Linears in 8 bits: e4m3 times e4m3, with a scale for each output channel of the weight and for each token.

Weights are quantised once, activations anew in every call; sums are in float32 (or what the tensor cores call it), and
nothing else is kept of the weight. Knows names of linears; no layer, no pass and no cache.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models.kernels import E4M3, Codes, quantised

Linear = Callable[[Tensor], Tensor]
"""[tokens, in] -> [tokens, out], the dtype kept."""
MakeLinear = Callable[[str, Tensor, Tensor], Linear]
"""From a linear's name, weight [out, in] and bias [out]."""
Multiply = Callable[[Codes, Codes, Tensor, torch.dtype], Tensor]
"""Codes [tokens, in] and [out, in] with scales [tokens, 1] and [out, 1], bias [out] -> [tokens, out] of a dtype."""

FAR = 2e-2
"""How far `torch._scaled_mm` may be off, norm over norm: fast accumulation on Hopper keeps some 14 bits of a sum."""


class PlainLinear:
    """A linear as the model has it: weight [out, in], bias [out]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def plain_linear(name: str, weight: Tensor, bias: Tensor) -> Linear:
    """Makes all linears plain."""
    return PlainLinear(weight, bias)


def multiply_codes(x: Codes, weight: Codes, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: the codes' product in float32, scaled, plus bias; rounded once."""
    product = x.codes.float() @ weight.codes.float().t()
    return torch.addcmul(bias.float(), product * x.scale, weight.scale.t()).to(dtype)


FAST_SUMS = 2048
"""Products summed at most in the accumulators of Hopper's FP8 units, which hold some 14 bits. Over 8,960 that do not
cancel a sum came out 6 to 9 % off on an H100, over 1,536 less than 1 %; in float32 below 0.2 %, a tenth slower."""


def scaled_mm(x: Codes, weight: Codes, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by `torch._scaled_mm`, where a device has it."""
    fused = None if dtype == torch.float32 else bias  # on CUDA a float32 result takes no bias
    y = torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scale,
        scale_b=weight.scale.t(),
        bias=fused,
        out_dtype=dtype,
        use_fast_accum=x.codes.shape[1] <= FAST_SUMS,
    )
    return y + bias if fused is None else y


class Fp8Linear:
    """A linear whose weight lies in e4m3; the result is in the bias's dtype.

    It takes `Codes` of the tokens, as fused kernels make them, or a tensor, which it quantises by itself.

    Args:
        weight: [out, in], not kept.
        bias: [out].
    """

    def __init__(self, weight: Tensor, bias: Tensor, multiply: Multiply = multiply_codes) -> None:
        self.weight, self.bias = quantised(weight, E4M3), bias
        self.nbytes = sum(part.nbytes for part in self.weight)
        self.nbytes_before = weight.nbytes
        self._multiply = multiply

    def __call__(self, x: Tensor | Codes) -> Tensor:
        codes = x if isinstance(x, Codes) else quantised(x, E4M3)
        return self._multiply(codes, self.weight, self.bias, self.bias.dtype)


class Fp8Linears:
    """Makes the linears of a model, all in e4m3 but those whose names fit a pattern.

    Attributes:
        made: those in e4m3, by name.
    """

    def __init__(self, keep: Sequence[str] = (), multiply: Multiply = multiply_codes) -> None:
        self.made: dict[str, Fp8Linear] = {}
        self._keep, self._multiply = tuple(keep), multiply

    def __call__(self, name: str, weight: Tensor, bias: Tensor) -> Linear:
        if any(fnmatchcase(name, pattern) for pattern in self._keep):
            return plain_linear(name, weight, bias)
        self.made[name] = Fp8Linear(weight, bias, self._multiply)
        return self.made[name]

    @property
    def weighs(self) -> str:
        """How many there are and what their weights take, in words."""
        now, before = (sum(getattr(linear, of) for linear in self.made.values()) for of in ("nbytes", "nbytes_before"))
        return f"{len(self.made)} linears in fp8, {now / 2**20:.1f} MiB instead of {before / 2**20:.1f}"

    def release(self, model: nn.Module) -> None:
        """Gives the memory of the model's own weights back where they lie in e4m3; these modules work no more."""
        for name in self.made:
            parent, _, own = name.rpartition(".")
            for part in ("q", "k", "v") if own == "qkv" else (own,):
                model.get_submodule(f"{parent}.{part}").to("meta")


class Chosen(NamedTuple):
    """How e4m3 is multiplied on a device, and why, in words."""

    multiply: Multiply
    by: str


def choose_multiply(
    shapes: Iterable[tuple[int, int]],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    fast: Multiply = scaled_mm,
) -> Chosen:
    """`torch._scaled_mm` where it takes all shapes (out, in) in this dtype and is right, else the definition.

    It needs a GPU of compute capability 8.9 or more, or a CPU, and on a GPU widths that are multiples of 16.
    """
    for out, width in sorted(set(shapes)):
        problem = _problem(fast, tokens, out, width, device, dtype)
        if problem is not None:
            return Chosen(multiply_codes, f"float32 products of e4m3 codes, as torch._scaled_mm {problem}")
    return Chosen(fast, "torch._scaled_mm")


@torch.inference_mode()
def _problem(fast: Multiply, tokens: int, out: int, width: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a product on random numbers; None if nothing is."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, device=device, dtype=dtype, generator=generator)
        for size in ((tokens, width), (out, width), (out,))
    )
    operands = quantised(x, E4M3), quantised(weight, E4M3), bias, dtype
    try:
        y = fast(*operands).double()
    except (RuntimeError, ValueError) as error:
        return f"refuses: {str(error).strip().splitlines()[0][:100]}"
    exact = multiply_codes(*operands).double()
    off = float(torch.linalg.norm(y - exact) / torch.linalg.norm(exact))
    return None if off <= FAR else f"is {off:.2g} off"
