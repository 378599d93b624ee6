"""Self-attention over queries, keys and values in e4m3, for `execution.attend: fp8`: by FlashAttention-3, or widened.

Chosen once at start, as `attention.py` does. Knows nothing of caches, and not which passes attend in e4m3.
"""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from workers.models.attention import (
    HOPPER,
    Attend,
    AttentionSize,
    Import,
    NotInstalled,
    Timer,
    Trial,
    Unavailable,
    backend,
    compute_capability,
    cuda_ms,
)
from workers.models.kernels import E4M3

SPLITS = (None, 2)
"""Parts that the keys are attended in, tried one after the other; None as FlashAttention-3 does it by itself, in one.

Tiles of 128 of 4,680 queries in 12 heads fill an H100's 132 multiprocessors 3.4 times, in two parts 6.7 times.
"""


class Fp8Attention(NamedTuple):
    """How queries, keys and values in e4m3 are attended.

    Attributes:
        attend: q, k, v in e4m3; the result is in the model's dtype. None where it is better left.
        lack: what was found where FlashAttention-3 on a Hopper GPU was looked for, None if that is it.
        note: what the log says.
    """

    attend: Attend | None
    lack: str | None
    note: str


def widened(attend: Attend, dtype: torch.dtype) -> Attend:
    """The definition: attention over the values of e4m3, by a backend for a wider dtype, which holds them all."""

    def attend_widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.to(dtype), k.to(dtype), v.to(dtype))

    return attend_widened


def flash3(
    device: torch.device, dtype: torch.dtype, load: Import = importlib.import_module, splits: int | None = None
) -> Attend:
    """FlashAttention-3 over e4m3, whose scales are 1 where none are given; sums are in float32.

    Args:
        splits: parts that the keys are attended in; None leaves it to the package.

    Raises:
        Unavailable: it is not for this device or not installed; what was found instead, in words.
    """
    found = compute_capability(device)
    if found is None or found[0] != HOPPER:
        raise Unavailable(str(device) if found is None else f"compute capability {found[0]}.{found[1]}")
    try:
        attend = backend("flash3", device, torch.bfloat16, load, {} if splits is None else {"num_splits": splits})
    except NotInstalled as error:
        raise Unavailable(error.found) from error

    def attend_codes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v).to(dtype)  # it gives bfloat16

    return attend_codes


def choose_fp8_attention(
    attend: Attend,
    device: torch.device,
    dtype: torch.dtype,
    size: AttentionSize,
    load: Import = importlib.import_module,
    timer: Timer = cuda_ms,
) -> Fp8Attention:
    """FlashAttention-3 where it is to be had and right; else the definition on a CPU, and none on a GPU: it is slow.

    Args:
        attend: what attends in the model's dtype.
        dtype: the model's.
        load: imports a module.
        timer: measures.
    """
    try:
        ways = {splits: flash3(device, dtype, load, splits) for splits in SPLITS}
    except Unavailable as problem:
        return _instead(attend, device, dtype, str(problem))
    trial, times, wrong = Trial(device, E4M3, size), {}, ""
    for splits, way in ways.items():
        try:
            trial.check(way)
        except Unavailable as problem:
            wrong = wrong or f"one that {problem}"
        else:
            times[splits] = timer(trial.run(way))
    if not times:
        return _instead(attend, device, dtype, wrong)
    best = min(times, key=times.__getitem__)
    parts = "" if best is None else f" in {best} parts"
    return Fp8Attention(ways[best], None, f"self-attention in fp8 by flash3{parts}: {times[best]:.2f} ms")


def _instead(attend: Attend, device: torch.device, dtype: torch.dtype, lack: str) -> Fp8Attention:
    if device.type == "cpu":
        return Fp8Attention(widened(attend, dtype), lack, "self-attention over values of e4m3")
    return Fp8Attention(None, lack, "self-attention not in fp8")
