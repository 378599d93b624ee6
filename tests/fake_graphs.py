"""`torch.cuda` as `graphs.py` and `audit.py` use it, on the CPU: a capture notes operations, a replay repeats them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    """A CUDA graph: a capture's operations on the tensors they were captured with; unlike one it does them too."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._noted: list[tuple[Any, Any, Any, Any]] = []
        self._then = then

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._noted.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """What was made in between is made anew; whatever was there before the capture is used where it lies."""
        made: dict[int, Tensor] = {}

        def now(x: Any) -> Any:
            return made.get(id(x), x)

        for func, args, kwargs, result in self._noted:
            given, named = tree_map(now, (args, kwargs))
            again = func(*given, **named)
            made.update(zip(map(id, tree_leaves(result)), tree_leaves(again), strict=True))
        self._then()


class FakeStream:
    """A stream of a device that does everything at once."""

    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: "FakeStream") -> None:
        """There is nothing to wait for."""


class FakeCuda:
    """One GPU.

    Attributes:
        log: captures by their pool, replays, and what waited in which mode.
        stats: the allocator's counters.
        mode: of `set_sync_debug_mode`.
        on_replay: what else happens in a replay.
    """

    Stream = FakeStream

    def __init__(self) -> None:
        self.log: list[object] = []
        self.stats = {"allocated_bytes.all.current": 0, "allocation.all.allocated": 0}
        self.mode: int | str = 0
        self.on_replay: Callable[[], None] = lambda: None
        self._pools = 0

    def graph_pool_handle(self) -> int:
        self._pools += 1
        return self._pools

    def device(self, device: object) -> AbstractContextManager[None]:
        return nullcontext()

    def stream(self, stream: FakeStream) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self) -> FakeStream:
        return FakeStream()

    def CUDAGraph(self) -> Tape:
        return Tape(self._replayed)

    def _replayed(self) -> None:
        self.log.append("replay")
        self.on_replay()

    @contextmanager
    def graph(self, graph: Tape, pool: int, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads' stages allocate meanwhile"
        self.log.append(("capture", pool))
        with graph:
            yield

    def get_sync_debug_mode(self) -> int | str:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode

    def memory_stats(self, device: object) -> dict[str, int]:
        return dict(self.stats)

    def wait(self) -> None:
        """What a read of a value does there."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def allocate(self, nbytes: int) -> None:
        self.stats["allocated_bytes.all.current"] += nbytes
        self.stats["allocation.all.allocated"] += 1

    def free(self, nbytes: int) -> None:
        self.stats["allocated_bytes.all.current"] -= nbytes
