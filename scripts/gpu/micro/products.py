"""Linears of a layer: in the model's dtype, ending with GELU, in FP8, and in FP8 with what feeds it."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from gpu.micro.bench import Bench, Call, off_by
from workers.models.execution import linear_shapes
from workers.models.fp8 import E4M3, Fp8Linear, PlainLinear, choose_multiply, scaled_mm
from workers.models.kernels import TORCH, quantised
from workers.models.triton_kernels import TRITON

CHECKED = 64
"""Rows whose results are compared."""


def run(bench: Bench) -> None:
    """All four, for a block and for the three of a recache."""
    config = bench.config.model.transformer
    chosen = choose_multiply(linear_shapes(config), bench.tokens, bench.device, bench.dtype)
    bench.add("FP8 in the runtime", note=f"by {chosen.by}")
    linears = {
        "qkv": (3 * config.dim, config.dim),
        "o": (config.dim, config.dim),
        "ffn up": (config.ffn_dim, config.dim),
        "ffn down": (config.dim, config.ffn_dim),
    }
    for rows in (bench.tokens, 3 * bench.tokens):
        for name, (out, width) in linears.items():
            _linear(bench, name, rows, out, width)
            bench.give_back()


def _linear(bench: Bench, name: str, rows: int, out: int, width: int) -> None:
    flops = 2.0 * rows * out * width
    count = bench.sets((rows * width + out * width) * bench.dtype.itemsize)
    inputs = [bench.draw(rows, width) for _ in range(count)]
    plain = [PlainLinear(bench.draw(out, width, scale=width**-0.5), bench.draw(out)) for _ in range(count)]
    exact = F.linear(*(t.float() for t in (inputs[0][:CHECKED], plain[0].weight, plain[0].bias)))
    dtype = str(bench.dtype).removeprefix("torch.")

    def measure(how: str, calls: list[Call], exact: Tensor = exact, note: str = "") -> None:
        error = lambda: off_by(calls[0]()[:CHECKED], exact)  # noqa: E731
        bench.measure(f"{name}, {rows:,} rows, {how}", calls, flops=flops, error=error, note=note)

    measure(f"{dtype} with bias", [partial(linear, x) for linear, x in zip(plain, inputs, strict=True)])
    if name == "ffn up":
        widened = TORCH.plain.gelu(exact)
        for kernels, how in ((TORCH, "then gelu"), (TRITON, "ends with gelu")):
            pairs = zip(plain, inputs, strict=True)
            calls = [partial(kernels.linear_gelu, x, linear.weight, linear.bias) for linear, x in pairs]
            measure(f"{dtype} with bias, {how}", calls, widened)
    fp8 = [Fp8Linear(linear.weight, linear.bias, scaled_mm) for linear in plain]
    codes = [quantised(x, E4M3) for x in inputs]
    measure("e4m3", [partial(linear, x) for linear, x in zip(fp8, codes, strict=True)])
    feeds = {"rows in e4m3 by Triton before it": TRITON.fp8.rows, "rows in e4m3 by PyTorch before it": TORCH.fp8.rows}
    for how, feed in feeds.items():
        measure(f"e4m3, {how}", [partial(_fed, linear, feed, x) for linear, x in zip(fp8, inputs, strict=True)])
    if name == "ffn down":
        widened = F.linear(TORCH.plain.gelu(inputs[0][:CHECKED].float()), *(t.float() for t in _parts(plain[0])))
        calls = [partial(_fed, linear, TRITON.fp8.gelu, x) for linear, x in zip(fp8, inputs, strict=True)]
        measure("e4m3, gelu with rows in e4m3 by Triton before it", calls, widened)


def _fed(linear: Fp8Linear, feed: Call, x: Tensor) -> Tensor:
    return linear(feed(x))


def _parts(linear: PlainLinear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias
