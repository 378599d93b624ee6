"""Counts what torch dispatches: kernels, bytes and floating point operations, and the time that two rates allow.

One operation that is dispatched is one kernel that reads its arguments and writes its results once. A kernel's time is
the longer of its operations at one rate and its bytes at the other (Williams et al. 2009). Knows no model and no
device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SILENT = ("_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "alias", "set_")
"""Dispatched, and no kernel."""
FUSED = ("rms_norm",)
"""One kernel on a GPU, though made of others elsewhere."""
SCATTERED = ("index_copy_", "index_put_", "_index_put_impl_")
"""Read and write what is put there alone, not all of where it goes."""


class Counted(TorchDispatchMode):
    """Counts what is dispatched under it.

    Args:
        flops_per_s, bytes_per_s: the two rates.

    Attributes:
        kernels, flops, bytes: of it all.
        seconds: what the rates allow, kernel after kernel.
        product_bytes, product_seconds: of kernels with operations that count, products and attention; all others can
            be fused into them.
    """

    def __init__(self, flops_per_s: float, bytes_per_s: float) -> None:
        super().__init__()
        self.kernels = 0
        self.flops = self.bytes = self.seconds = self.product_bytes = self.product_seconds = 0.0
        self._rates = flops_per_s, bytes_per_s
        self._inside_one = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside_one:
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if func._overloadpacket not in flop_registry and name not in FUSED:
            with self:
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        if name not in SILENT and not _is_view(func):
            formula = flop_registry.get(func._overloadpacket)
            flops = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
            touched = (args[-1], args[-1]) if name in SCATTERED else distinct((args, kwargs, result))
            self.add(flops, sum(tensor.nbytes for tensor in touched))
        return result

    def add(self, flops: float, moved: float) -> None:
        """One kernel."""
        self.kernels += 1
        self.flops += flops
        self.bytes += moved
        seconds = max(flops / self._rates[0], moved / self._rates[1])
        self.seconds += seconds
        if flops:
            self.product_bytes += moved
            self.product_seconds += seconds

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """What is dispatched inside does not count by itself."""
        before, self._inside_one = self._inside_one, True
        yield
        self._inside_one = before

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as one kernel that reads its tensors and writes its results."""

        def run(*args: Any) -> Any:
            with self.as_one():
                result = function(*args)
            self.add(0.0, sum(tensor.nbytes for tensor in distinct((args, result))))
            return result

        return run


class AttentionCounted(TorchFunctionMode):
    """`scaled_dot_product_attention` as one kernel of two products that keeps no logits, whatever computes it."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        with self._counted.as_one():
            out = torch.empty_like(q) if q.is_meta else func(*args, **kwargs)  # fused ones lay it out as the queries
        self._counted.add(4.0 * q.numel() * k.shape[-2], sum(tensor.nbytes for tensor in (q, k, v, out)))
        return out


def distinct(tree: object) -> Sequence[Tensor]:
    """The tensors in nested arguments, each once."""
    return tuple({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _is_view(func: Any) -> bool:
    """Whether the result shares its argument's memory and nothing is written."""
    infos = [value.alias_info for value in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)
