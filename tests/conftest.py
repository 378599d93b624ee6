"""What holds for every test: one thread for arithmetic, and no process left behind. The time limit is pytest's own."""

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

# Before anything imports torch, and inherited by the processes that tests start.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Before anything imports Triton: its kernels run in numpy. TRITON_INTERPRET=0 tests them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell ignores Ctrl-C for what it starts in the background, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest begins first, so that of several processes none is left with it alone at the end."""
    limits = {item.path: 0.0 for item in items}
    for item in items:
        for mark in item.iter_markers("timeout"):
            limits[item.path] = max(limits[item.path], mark.args[0])
    items.sort(key=lambda item: -limits[item.path])


GRACE_S = 5.0
"""What a process that is ending has to be gone."""


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fails a test that leaves a child running; those of wider fixtures were there before it."""
    before = children()
    yield
    left = children() - before
    if left:
        _, alive = psutil.wait_procs(left, timeout=GRACE_S)
        running = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert not running, f"left running: {running}"


def children() -> set[psutil.Process]:
    """Descendants of the test process that run."""
    return {process for process in psutil.Process().children(recursive=True) if is_ours(process)}


def is_ours(process: psutil.Process) -> bool:
    """Not ended, and not the tracker that Python itself starts once and keeps."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "multiprocessing.resource_tracker" not in " ".join(
            process.cmdline()
        )
    except psutil.NoSuchProcess:
        return False
