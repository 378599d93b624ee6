"""One attention call behind one signature, its backend chosen once at start: checked, and on a GPU the fastest.

Knows nothing of caches, positions or masks: the keys it is given are the keys it attends to. Nothing is chosen later,
so that what is recorded once can be replayed.
"""

import importlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import AttentionKind
from ipc.errors import ConfigError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, Lq, heads, head_dim], k and v [B, Lk, heads, head_dim] -> [B, Lq, heads, head_dim]."""
Import = Callable[[str], ModuleType]
Timer = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes on the device."""

TRIED: tuple[AttentionKind, ...] = ("cudnn", "flash", "flash3", "flash4", "sdpa")
"""What `auto` measures; the first of equals wins."""
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "flash": (("flash_attn",), "flash-attn 2"),
    "flash3": (
        ("flash_attn_interface", "fa3_fwd_interface"),
        "FlashAttention-3 (hopper/ of Dao-AILab/flash-attention, or fa3-fwd)",
    ),
    "flash4": (("flash_attn.cute",), "flash-attn-4"),
}
"""The modules that may hold `flash_attn_func`, the first that does is taken, and what a person installs."""
FAR = {torch.float8_e4m3fn: 5e-2, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
"""How far a backend may be off for inputs of a dtype, norm over norm; they round weights and result to theirs."""
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError)
"""What kernels raise that do not take a shape, a dtype or a device."""
CHECKED_ROWS = 64
"""Queries whose result is compared: the reference holds all their logits in float32."""
WARM_UPS, ROUNDS = 3, 10
AMPERE, HOPPER = 8, 9
"""Compute capabilities that FlashAttention-3 is built for; it multiplies e4m3 on Hopper alone."""


class AttentionSize(NamedTuple):
    """Of self-attention with a full window."""

    queries: int
    keys: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Attention:
    """A backend.

    Attributes:
        name: as in the configuration.
        attend: the call.
        note: what the log says.
    """

    name: str
    attend: Attend
    note: str = ""


class Unavailable(Exception):
    """A backend that is not installed, does not run here or is wrong; why, in words."""


class NotInstalled(Unavailable):
    """One whose package is missing or does not load; `found` says what there is instead."""

    def __init__(self, package: str, found: str) -> None:
        super().__init__(f"needs the package {package}, found {found}; install it")
        self.found = found


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention by torch's scaled_dot_product_attention; q, k, v and the result [B, L, heads, head_dim]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attend_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by SDPA's plain backend, all logits in memory at once."""
    # The operations themselves: `sdpa_kernel` would pin the backend for other threads' stages too.
    attend = torch.ops.aten._scaled_dot_product_attention_math
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by SDPA's cuDNN backend."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, False)[0].transpose(1, 2)


def backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    load: Import = importlib.import_module,
    options: Mapping[str, object] = MappingProxyType({}),
) -> Attend:
    """The call of a backend by its name in the configuration. Raises Unavailable.

    Args:
        options: what a package's `flash_attn_func` is called with besides.
    """
    if name == "sdpa":
        return attend_sdpa
    if name == "math":
        return attend_math
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable(
            f"needs a CUDA device and bfloat16 or float16, found device {device.type}, dtype {_word(dtype)}"
        )
    capability = compute_capability(device)
    if name == "flash3" and capability is not None and capability[0] not in (AMPERE, HOPPER):
        # On others what it launches ends the process.
        raise Unavailable(f"needs compute capability {AMPERE}.x or {HOPPER}.x, found {capability[0]}.{capability[1]}")
    return attend_cudnn if name == "cudnn" else _flash(name, load, options)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU; None of what is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def _flash(name: str, load: Import, options: Mapping[str, object]) -> Attend:
    """`flash_attn_func` of a package: all three take q, k, v first and scale by 1 / sqrt(head_dim)."""
    modules, package = PACKAGES[name]
    found, function = [], None
    for module in modules:
        try:
            function = getattr(load(module), "flash_attn_func", None)
        except (ImportError, OSError) as error:  # a library that is built for another torch does not load
            found.append(_line(error))
        else:
            if function is not None:
                break
            found.append(f"{module} without flash_attn_func")
    if function is None:
        raise NotInstalled(package, ", ".join(found))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, **options)
        return out if isinstance(out, Tensor) else out[0]  # flash4, and flash3 until 2025, return (out, lse)

    return attend


def choose_attention(
    preference: AttentionKind,
    device: torch.device,
    dtype: torch.dtype,
    size: AttentionSize,
    load: Import = importlib.import_module,
    timer: Timer | None = None,
) -> Attention:
    """The backend that is asked for, or with `auto` the fastest that is right; to be called before graphs are recorded.

    Args:
        load: imports a module.
        timer: measures; CUDA events if not given.

    Raises:
        ConfigError: what is asked for is not installed, does not run on this device, dtype or size, or is wrong.
    """
    if preference == "auto" and device.type != "cuda":
        preference = "sdpa"
    trial = Trial(device, dtype, size)
    if preference == "auto":
        return fastest(trial, {name: partial(backend, name, device, dtype, load) for name in TRIED}, timer)
    try:
        attend = backend(preference, device, dtype, load)
        trial.check(attend)
    except Unavailable as problem:
        raise ConfigError(f"model.attention: {preference} {problem}; or set model.attention=auto") from problem
    return Attention(preference, attend, f"attention by {preference}")


class Trial:
    """Random queries, keys and values of one size, and what attention makes of some of them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: AttentionSize) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.qkv = [
            torch.randn(1, length, size.heads, size.head_dim, device=device, generator=generator).to(dtype)
            for length in (size.queries, size.keys, size.keys)
        ]
        self._rows = torch.linspace(0, size.queries - 1, min(CHECKED_ROWS, size.queries)).long().to(device)
        q, k, v = (tensor.float() for tensor in self.qkv)
        self._exact = attend_math(q[:, self._rows], k, v)

    @torch.inference_mode()
    def check(self, attend: Attend) -> None:
        """Raises Unavailable where a backend refuses or is further off than its dtype makes it."""
        try:
            out = attend(*self.qkv)
        except REFUSALS as error:
            raise Unavailable(f"does not take {self._what()}: {_line(error)}") from error
        off = float(torch.linalg.norm(out[:, self._rows] - self._exact) / torch.linalg.norm(self._exact))
        if not off <= FAR[self.qkv[0].dtype]:
            raise Unavailable(f"is {off:.2g} off for {self._what()}")

    def run(self, attend: Attend) -> Callable[[], object]:
        """A call to measure."""
        return torch.inference_mode()(lambda: attend(*self.qkv))

    def _what(self) -> str:
        q, k, _ = self.qkv
        return f"{q.shape[1]} queries, {k.shape[1]} keys, {q.shape[2]} heads of {q.shape[3]} in {_word(q.dtype)}"


def fastest(trial: Trial, backends: dict[str, Callable[[], Attend]], timer: Timer | None = None) -> Attention:
    """The fastest backend that is right; those that are not installed are passed over in silence.

    Args:
        backends: by name, what gets the call or raises Unavailable.

    Raises:
        ConfigError: none is right.
    """
    right: dict[str, Attend] = {}
    wrong: list[str] = []
    for name, get in backends.items():
        try:
            attend = get()
        except Unavailable:
            continue
        try:
            trial.check(attend)
        except Unavailable as problem:
            wrong.append(f"without {name}, which {problem}")
        else:
            right[name] = attend
    if not right:
        raise ConfigError(f"model.attention: auto found nothing that is right: {'; '.join(wrong)}; set it to math")
    measure = timer or cuda_ms
    times = {name: measure(trial.run(attend)) for name, attend in right.items()}
    first, *others = sorted(times, key=times.__getitem__)
    note = f"attention by {first}: {times[first]:.2f} ms"
    if others:
        note += "; " + ", ".join(f"{name} {times[name]:.2f}" for name in others)
    return Attention(first, right[first], "; ".join([note, *wrong]))


def cuda_ms(run: Callable[[], object]) -> float:
    """Milliseconds of a call by CUDA events on the current stream, the median of some."""
    for _ in range(WARM_UPS):
        run()
    times = []
    for _ in range(ROUNDS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
