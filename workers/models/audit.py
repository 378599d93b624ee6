"""Watches that what is recorded once and run for ever reads nothing back and keeps no memory, for `execution.audit`.

On a CPU every operation is looked at where it is dispatched. On a GPU torch itself refuses what waits for the device,
and the allocator's counters are compared. Knows no model: functions without arguments, as `graphs.py` records them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipc.errors import AuditFailed
from workers.models.graphs import Recorder, Replay

READING_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
FROM_HOST = torch.ops.aten.lift_fresh.default
"""What `torch.tensor` of Python numbers ends with: on a GPU a copy that waits."""
PAST_DISPATCH = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Reads that no dispatched operation shows."""


class Operations(TorchDispatchMode):
    """Refuses operations of its thread that read a value back, and follows the memory that the others make.

    Attributes:
        names: the operations, in order.

    Raises:
        AuditFailed: where a value is read, or a tensor lies on another device than `device`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.names: list[str] = []
        self._device = device
        self._made: list[tuple[StorageWeakRef, int, str]] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is FROM_HOST or reads_back(func, args):
            raise AuditFailed(f"audit: {func} inside a pass: found a value that the host reads or gives, expected none")
        with self:  # in inference mode composite operations come here whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        self.names.append(str(func))
        sizes = {s._cdata: s.nbytes() for s in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._check_device(func, storage)
            if sizes.get(storage._cdata) != storage.nbytes():
                self._made.append((StorageWeakRef(storage), storage.nbytes(), str(func)))
        return result

    def _check_device(self, func: torch._ops.OpOverload, storage: torch.UntypedStorage) -> None:
        if storage.device.type != self._device.type:
            raise AuditFailed(f"audit: {func} inside a pass: found memory on {storage.device}, expected {self._device}")

    def check_nothing_kept(self) -> None:
        """Raises AuditFailed if memory made since the beginning is still held."""
        kept = [(nbytes, name) for ref, nbytes, name in self._made if not ref.expired()]
        if kept:
            total, first = sum(nbytes for nbytes, _ in kept), kept[0][1]
            raise AuditFailed(
                f"audit: a pass kept {total} bytes in {len(kept)} tensors, the first made by {first}; expected none"
            )


class _NoLists(TorchFunctionMode):
    """Refuses the reads that `Operations` does not see."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in PAST_DISPATCH:
            raise AuditFailed(f"audit: Tensor.{func.__name__} inside a pass: found a value that the host reads")
        return func(*args, **(kwargs or {}))


def reads_back(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether an operation's result is a number for the host, or of a size that depends on values."""
    if func is torch.ops.aten.index.Tensor:  # tagged for masks, which it takes as well as numbers of rows
        return any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None)
    numbers = any("Tensor" not in str(returned.type) for returned in func._schema.returns)
    return numbers or not READING_TAGS.isdisjoint(func.tags)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def run_watched(function: Callable[[], object], device: torch.device) -> list[str]:
    """Runs a function and returns its operations' names.

    Raises:
        AuditFailed: it read a value back, used another device, or kept memory that it made.
    """
    with Operations(device) as operations, _NoLists():
        function()
    operations.check_nothing_kept()
    return operations.names


class Audit:
    """A recorder around another one: what it records is watched whenever it is run. What it returns raises AuditFailed.

    Args:
        record: the recorder in use.
        cuda: what is asked about a GPU; torch's own unless a test says otherwise.
    """

    def __init__(self, record: Recorder, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._record, self._device, self._cuda = record, device, cuda

    def __call__(self, function: Callable[[], None]) -> Replay:
        if self._device.type == "cuda":
            return self._on_gpu(function)
        return self._on_cpu(function)

    def _on_cpu(self, function: Callable[[], None]) -> Replay:
        def watched() -> None:
            run_watched(function, self._device)

        return self._record(watched)

    def _on_gpu(self, function: Callable[[], None]) -> Replay:
        """A function's first run is its own: libraries choose and allocate in it, and may wait for that."""
        runs = 0

        def watched() -> None:
            nonlocal runs
            runs += 1
            with self._refusing_waits() if runs > 1 else nullcontext():
                function()

        replay = self._record(watched)

        def audited() -> None:
            settled, before = runs > 0, self._memory(replay is not watched)
            with self._refusing_waits() if settled else nullcontext():
                replay()
            after = self._memory(replay is not watched)
            if settled and after != before:
                raise AuditFailed(f"audit: a pass changed the GPU's memory: found {after}, expected {before}")

        return audited

    def _memory(self, is_replay: bool) -> dict[str, int]:
        """Bytes in use; of a replay, which allocates nothing at all, also how often memory was ever taken."""
        stats = self._cuda.memory_stats(self._device)
        names = ["allocated_bytes.all.current", *(["allocation.all.allocated"] if is_replay else [])]
        return {name: stats[name] for name in names}

    @contextmanager
    def _refusing_waits(self) -> Iterator[None]:
        before = self._cuda.get_sync_debug_mode()
        self._cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise AuditFailed("audit: a pass waited for the GPU: found a synchronizing operation") from error
        finally:
            self._cuda.set_sync_debug_mode(before)
