"""Recording what a function launches on a GPU, to launch all of it again at once.

Knows no model: a function without arguments that always does the same to the same memory.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], None]], Replay]
"""Takes a function, returns how to do again what it does."""

WARM_UPS = 2
"""Runs before a capture, in which libraries choose and allocate (pytorch.org/docs, CUDA semantics, CUDA graphs)."""

_CAPTURING = threading.Lock()
"""One capture at a time in a process, as stages may be its threads: what a capture forbids, the start of another does
(synchronising the device; CUDA programming guide, stream capture, prohibited and unhandled operations)."""


def give_back_unused(device: torch.device) -> None:
    """Gives the driver what loading and recording left in torch's allocator: other processes share the GPU."""
    if device.type == "cuda":
        with _CAPTURING, torch.cuda.device(device):
            torch.cuda.empty_cache()


def run_directly(function: Callable[[], None]) -> Replay:
    """Records nothing: the function itself, for a CPU."""
    return function


class CudaGraphs:
    """Captures functions as CUDA graphs that share one pool of memory.

    Args:
        cuda: what captures; torch's own unless a test says otherwise.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._pool = cuda.graph_pool_handle()
        self._stream = cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Replay:
        """Runs the function to warm it up, captures it, and returns the graph's replay."""
        cuda = self._cuda
        with _CAPTURING, cuda.device(self._device), torch.inference_mode():
            self._stream.wait_stream(cuda.current_stream())
            with cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function()
            cuda.current_stream().wait_stream(self._stream)
            graph = cuda.CUDAGraph()
            # What other threads' stages allocate meanwhile does not end it.
            with cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        return graph.replay
