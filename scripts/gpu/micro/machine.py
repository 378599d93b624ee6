"""The machine and its ceilings."""

import importlib.metadata
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch

from gpu.micro.bench import Bench
from workers.models.fp8 import E4M3
from workers.models.kernels import quantised

ROOT = Path(__file__).parents[3]
PRODUCT, COPIED = 8192, 2**30
"""Rows and columns of the large product, bytes of the large copy."""
TINY_PRODUCT, TINY_COPIED = 64, 2**16
BUSY_MS = 1500
"""How long the device is at products while its clocks are read."""
PACKAGES = ("triton", "flash-attn", "fa3-fwd", "flash-attn-4", "nvidia-cudnn-frontend")
STATIC = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
NOW = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
"""What nvidia-smi is asked for: once, and while the device is at work."""


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    """What was measured where, in words, by what it is."""
    found = {"commit": commit or _commit(), "Python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        cores = f"{properties.multi_processor_count} SMs, compute capability {capability}"
        found = {"GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {cores}", **found}
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
        found |= asked(STATIC, device)
    else:
        found = {"CPU": platform.processor() or platform.machine(), **found, "threads": str(torch.get_num_threads())}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def asked(fields: tuple[str, ...], device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of a device; one line of why where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    which = f"--id={torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if not which.startswith("--id=GPU-"):
        query[1] = which.replace("--id=", "--id=GPU-")
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (subprocess.SubprocessError, OSError) as error:
        return {"nvidia-smi": f"refused: {error}"}
    return dict(zip(fields, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def _commit() -> str:
    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return "unknown"


def env(bench: Bench, found: dict[str, str]) -> None:
    """A row for each of the environment's words."""
    for name, value in found.items():
        bench.add(name, note=value)


def ceilings(bench: Bench) -> None:
    """A large product in the model's dtype and in e4m3, a large copy, and the clocks under load."""
    size = PRODUCT if bench.on_gpu else TINY_PRODUCT
    a, b = bench.draw(size, size), bench.draw(size, size)
    flops = 2.0 * size**3
    dtype = str(bench.dtype).removeprefix("torch.")
    bench.measure(f"{dtype}, {size} cubed", [lambda: a @ b], flops=flops)
    x, weight, bias = quantised(a, E4M3), quantised(b, E4M3), bench.draw(size)
    multiply = partial(torch._scaled_mm, x.codes, weight.codes.t(), out_dtype=bench.dtype, use_fast_accum=bench.on_gpu)
    by_row = partial(multiply, scale_a=x.scale, scale_b=weight.scale.t(), bias=bias)
    bench.measure(f"e4m3, {size} cubed, scales by row, with bias", [by_row], flops=flops)
    one = torch.ones((), device=bench.device)
    whole = partial(multiply, scale_a=one, scale_b=one)
    bench.measure(f"e4m3, {size} cubed, one scale", [whole], flops=flops)
    source = bench.draw((COPIED if bench.on_gpu else TINY_COPIED) // bench.dtype.itemsize)
    target = torch.empty_like(source)
    copied = f"copy of {source.nbytes / 2**20:.2f} MiB"
    bench.measure(copied, [lambda: target.copy_(source)], moved=2.0 * source.nbytes, note="bytes read and written")
    if bench.on_gpu:
        ms = next((row.ms for row in bench.rows if row.name.startswith(f"{dtype}, ") and row.ms), 1.0)
        for _ in range(round(BUSY_MS / ms)):
            a @ b
        now = asked(NOW, bench.device)
        bench.add("while at the first product", note=", ".join(f"{name} {value}" for name, value in now.items()))
