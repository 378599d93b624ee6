"""One attention call with two backends, chosen once at start: flash-attn where it is installed and fits, else SDPA.

Knows nothing of caches, positions or masks: the keys it is given are the keys it attends to.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ipc.errors import ConfigError


@dataclass(frozen=True)
class Attention:
    """A backend.

    Attributes:
        name: what the log says.
        attend: q [B, Lq, heads, head_dim], k and v [B, Lk, heads, head_dim] -> [B, Lq, heads, head_dim].
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention by torch's scaled_dot_product_attention; q, k, v and the result [B, L, heads, head_dim]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def choose_attention(
    preference: Literal["auto", "sdpa", "flash"], device: torch.device, dtype: torch.dtype
) -> Attention:
    """The backend for a device and a dtype.

    Raises:
        ConfigError: flash-attn is asked for but not installed, or does not run on this device or dtype.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if preference == "flash" and not (installed and fits):
        found = f"device {device.type}, dtype {str(dtype).removeprefix('torch.')}" if installed else "not installed"
        raise ConfigError(
            "model.attention: flash needs the package flash-attn on a CUDA device in bfloat16 or float16; found"
            f" {found}; install the extra with `pip install longlive-runtime[flash]` or set model.attention=sdpa"
        )
    if preference != "sdpa" and installed and fits:
        from flash_attn import flash_attn_func

        return Attention("flash-attn", flash_attn_func)
    return Attention("sdpa", attend_sdpa)
