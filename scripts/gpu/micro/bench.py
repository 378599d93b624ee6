"""How microbenchmarks time, draw their inputs and say what failed; the rows they found.

On a GPU a call is recorded as a graph, so that launching does not count, and timed by CUDA events; on a CPU by the
clock. Knows the model's geometry and none of its operations.
"""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.schema import RuntimeConfig
from gpu.micro.rows import Row, line
from ipc.errors import LongLiveError
from workers.models.attention import REFUSALS
from workers.models.graphs import CudaGraphs

Call = Callable[[], object]

FAILURES: tuple[type[Exception], ...] = (*REFUSALS, ImportError, AttributeError, OSError, LongLiveError)
"""What a kernel, a package or a setting raises that is not there or does not fit; Triton's own are added below."""
if importlib.util.find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES += (TritonError,)

MEASURED_MS = 60.0
"""What a call is repeated for."""
FEWEST, MOST = 7, 200
"""Repeats of a call on a GPU."""
ON_CPU = 1
"""Repeats on a CPU, where nothing is measured that anybody would report."""
UNCACHED = 128 * 2**20
"""Bytes that calls in turn touch together: more than twice the 50 MB of an H100's second-level cache."""
MOST_SETS = 8


class Bench:
    """One run.

    Args:
        config: the model's geometry, device and dtypes.

    Attributes:
        rows: in order.
    """

    def __init__(self, config: RuntimeConfig, say: Callable[[str], None]) -> None:
        self.config, self._say = config, say
        self.device = torch.device(config.stage("denoiser").device or "cpu")
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.rows: list[Row] = []
        self._section, self._ends = "", 0.0
        self._generator = torch.Generator(self.device).manual_seed(0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.config.stream.frames_per_block * self.config.video.frame_tokens

    @contextmanager
    def section(self, name: str, seconds: float) -> Iterator[None]:
        """Rows belong to a section now, and those not begun after its seconds are left out. A failure ends it."""
        self._section, began = name, time.monotonic()
        self._ends = began + seconds
        self._say(f"{name}")
        try:
            yield
        except FAILURES as error:
            self.add("section", note=f"failed: {first_line(error)}")
        self.give_back()
        self._say(f"  {time.monotonic() - began:.1f} of {seconds:.0f} s")

    def add(self, name: str, **fields: float | str | None) -> None:
        """A row."""
        self.rows.append(Row(self._section, name, **fields))
        self._say(line(self.rows[-1]))

    def left_out(self, name: str) -> bool:
        """Whether the section's time is over; then a row says so."""
        if time.monotonic() <= self._ends:
            return False
        self.add(name, note="left out: the section's time was over")
        return True

    def draw(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """New normal numbers on the device, in the model's dtype if none is given."""
        values = torch.randn(shape, device=self.device, generator=self._generator, dtype=torch.float32)
        return values.mul_(scale).to(dtype or self.dtype)

    def sets(self, moved: float) -> int:
        """How many inputs of so many bytes a measure takes in turn, so that none is in the cache when it is read."""
        return min(MOST_SETS, max(1, -(-UNCACHED // int(moved)))) if self.on_gpu else 1

    def measure(
        self,
        name: str,
        calls: Sequence[Call],
        *,
        flops: float = 0.0,
        moved: float = 0.0,
        error: Callable[[], float] | None = None,
        note: str = "",
        graph: bool = True,
    ) -> None:
        """A row with the time of one of several calls that do the same to different inputs.

        Args:
            flops, moved: operations and bytes of one call.
            error: how far off a call is; asked before anything is timed.
            graph: whether the calls are recorded.
        """
        if self.left_out(name):
            return
        try:
            with torch.inference_mode():
                off = None if error is None else error()
                ms, how = self._timed(calls, graph)
        except FAILURES as problem:
            self.add(name, note=f"failed: {first_line(problem)}")
            return
        rate = {"tflops": flops / ms / 1e9 if flops else None, "tbps": moved / ms / 1e9 if moved else None}
        self.add(name, ms=ms, **rate, error=off, note="; ".join(part for part in (note, how) if part))

    def clocked(
        self, name: str, run: Call, *, rounds: int, flops: float = 0.0, error: float | None = None, note: str = ""
    ) -> None:
        """A row of something that a host launches: by events, by the clock, and when the host came back.

        Args:
            run: is called so many times, and not to warm up.
        """
        found = [self._launched(run) for _ in range(rounds)]
        device, wall, host = (statistics.median(times) for times in zip(*found, strict=True))
        said = f"wall {wall:.2f} ms, host back after {host:.2f}, median of {rounds}"
        rate = flops / device / 1e9 if flops else None
        self.add(name, ms=device, tflops=rate, error=error, note="; ".join(part for part in (said, note) if part))

    def give_back(self) -> None:
        """Memory that nobody holds any more goes back to the device."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done all it was told."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _timed(self, calls: Sequence[Call], graph: bool) -> tuple[float, str]:
        """Median milliseconds of one call, and what has to be said of how it was measured."""

        def all_of_them() -> None:
            for call in calls:
                call()

        all_of_them()
        if not self.on_gpu:
            times = [self._launched(all_of_them)[1] for _ in range(ON_CPU)]
            return statistics.median(times) / len(calls), ""
        self.wait()
        run, how = all_of_them, "" if graph else "not as a graph"
        if graph:
            try:
                run = CudaGraphs(self.device)(all_of_them)
            except RuntimeError as error:
                how = f"not as a graph: {first_line(error)}"
        run()
        once = self._launched(run)[0]
        rounds = round(min(MOST, max(FEWEST, MEASURED_MS / max(once, 1e-3))))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for began, ended in pairs:
            began.record()
            run()
            ended.record()
        self.wait()
        return statistics.median(began.elapsed_time(ended) for began, ended in pairs) / len(calls), how

    def _launched(self, run: Call) -> tuple[float, float, float]:
        """Milliseconds on the device, until it was done, and until the host came back."""
        self.wait()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_gpu else []
        began = time.perf_counter()
        if events:
            events[0].record()
        run()
        if events:
            events[1].record()
        back = time.perf_counter()
        self.wait()
        done = time.perf_counter()
        wall, host = 1000 * (done - began), 1000 * (back - began)
        return (events[0].elapsed_time(events[1]) if events else wall), wall, host


def off_by(out: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm."""
    out, exact = out.double(), exact.double()
    return float(torch.linalg.norm(out - exact) / torch.linalg.norm(exact))


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'nothing said').splitlines()[0][:160]}"
