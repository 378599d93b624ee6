"""For `orchestrator bench roofline`: operations and bytes of a block, the device's ceilings, share of the limit.

Counted, by `counting.py`, are the products, convolutions and attentions that the shipped path dispatches with a full
window, with graphs and fused kernels off so that each is seen; what lies between them can be fused into them and counts
nothing, so that no way is faster that passes their arguments and results through memory. Measured is the path as
configured, each stage alone. The rates are the device's own, of a large product and of a large copy. Prints JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_block import block_decoder, block_stream
from counting import AttentionCounted, Counted

from configs.load import load_config
from configs.schema import RuntimeConfig
from workers.models.checkpoint import load_transformer, vae_dtype
from workers.models.execution import choose_frame_stream, choose_passes

MATMUL = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the product that measures the rate."""
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
WARM, TRIES = 3, 9
Block = Callable[[], object]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--repeats", type=int, default=10, help="blocks measured of each stage")
    given = parser.parse_args()
    config = load_config(given.config, given.set)
    torch.set_num_threads(config.stage("denoiser").threads)
    print(json.dumps(roofline(config, given.repeats)))  # noqa: T201


def roofline(config: RuntimeConfig, repeats: int) -> dict[str, Any]:
    """As `orchestrator.bench.report.Roofline`."""
    device = torch.device(config.stage("denoiser").device or "cpu")
    dtypes = getattr(torch, config.model.dtype), vae_dtype(config.model, device)
    rates = {dtype: matmul_rate(device, dtype) for dtype in dtypes}
    copied = copy_rate(device)
    execution, model = config.execution.model_copy(update=SEEN), config.model.model_copy(update={"attention": "sdpa"})
    seen = config.model_copy(update={"execution": execution, "model": model})
    stages = {"denoiser": (denoiser, dtypes[0]), "vae_decoder": (decoder, dtypes[1])}
    parts = []
    for stage, (build, dtype) in stages.items():
        counted = Counted(rates[dtype], copied)
        block = build(seen)
        with AttentionCounted(counted), counted:
            block()
        measured = block_ms(build(config), repeats, device)
        parts.append(
            {
                "stage": stage,
                "flops": counted.flops,
                "bytes": counted.product_bytes,
                "measured_ms": measured,
                "limit_ms": 1000 * counted.product_seconds,
                "share": 1000 * counted.product_seconds / measured,
            }
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype_flops_per_s": {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()},
        "bytes_per_s": copied,
        "parts": parts,
    }


SEEN = {"graphs": False, "native": False, "kernels": "torch", "compile": False}
"""Execution in which every operation is dispatched by name, as with attention by SDPA."""


def denoiser(config: RuntimeConfig) -> Block:
    """A call that makes a block with a full window."""
    model = load_transformer(config.model, torch.device(config.stage("denoiser").device or "cpu"))
    return block_stream(config, model, choose_passes(config, model))


def decoder(config: RuntimeConfig) -> Block:
    """A call that decodes a block."""
    device = torch.device(config.stage("vae_decoder").device or "cpu")
    stream = choose_frame_stream(config, device)
    stream.record_all()
    return block_decoder(config, stream.decode, device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large product."""
    size = MATMUL[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / best_s(lambda: a @ b, device))


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_s(lambda: target.copy_(source), device)


def block_ms(block: Block, repeats: int, device: torch.device) -> float:
    """Median milliseconds."""
    for _ in range(WARM):
        block()
    return 1000 * statistics.median(_timed(block, device) for _ in range(repeats))


def best_s(run: Block, device: torch.device) -> float:
    """The least of some tries: a ceiling."""
    for _ in range(WARM):
        run()
    return min(_timed(run, device) for _ in range(TRIES))


def _timed(run: Block, device: torch.device) -> float:
    _wait(device)
    began = time.monotonic()
    run()
    _wait(device)
    return time.monotonic() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
