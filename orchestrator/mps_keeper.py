"""Keeps CUDA's multi-process service for as long as whoever started it lives: a program of its own.

    python -m orchestrator.mps_keeper PROGRAM FOLDER TRIAL...
    python -m orchestrator.mps_keeper try GPU...

Starts the control program with its sockets in a folder, proves by a trial command, which the second line is, that the
GPUs can be used through it, prints one line (`ready PID`, or why not) and waits for the end of its standard input,
which comes with its parent's. Then the service ends with all of its processes, and the folder goes. Knows nothing of
the runtime.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

READY = "ready"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
LOGS = "CUDA_MPS_LOG_DIRECTORY"
DEVICES = "CUDA_VISIBLE_DEVICES"
START_S = 10.0
TRY_S = 20.0
QUIT_S = 5.0
LOOK_S = 0.02
TRY = "try"
"""Become a client and end."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def main() -> None:
    """Command line."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)  # the parent alone decides what they mean
    if sys.argv[1] == TRY:
        error = use_gpus([int(index) for index in sys.argv[2:]])
        print(f"CUDA error {error}")  # noqa: T201
        sys.exit(bool(error))
    keep(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])


def keep(program: str, folder: Path, trial: list[str]) -> None:
    """Until the end of standard input, or that of the service."""
    client = {**os.environ, PIPES: str(folder), LOGS: str(folder)}
    # It shows every GPU under its own number, so that a client finds the same one with the service and without.
    server = {name: value for name, value in client.items() if name != DEVICES}
    with (folder / "control.log").open("w", encoding="utf-8") as log:
        control = subprocess.Popen(
            [program, "-f"],
            env=server,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(_end_with, os.getpid()),
        )
    try:
        problem = _not_up(control, folder / "control") or _not_usable(trial, client)
        print(problem or f"{READY} {control.pid}", flush=True)  # noqa: T201
        if problem is None:
            _wait(control)
    finally:
        _end(control, program, server)
        shutil.rmtree(folder, ignore_errors=True)


def use_gpus(indices: list[int]) -> int:
    """Makes a context on each GPU, as PyTorch does on first use; the first CUDA error, or 0."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    error = cuda.cuInit(0)
    for index in indices:
        error = error or cuda.cuDeviceGet(ctypes.byref(device), index)
        error = error or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    return int(error)


def _end_with(keeper: int) -> None:
    """The kernel kills this process when the keeper is killed; the server ends when its control program does."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)


def _not_up(control: "subprocess.Popen[bytes]", socket: Path) -> str | None:
    deadline = time.monotonic() + START_S
    while not socket.exists():
        if control.poll() is not None:
            return f"it ended with code {control.returncode}"
        if time.monotonic() > deadline:
            return f"not up within {START_S:g} s"
        time.sleep(LOOK_S)
    return None


def _not_usable(trial: list[str], environment: dict[str, str]) -> str | None:
    try:
        tried = subprocess.run(
            trial,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRY_S,
            check=False,
            preexec_fn=partial(_end_with, os.getpid()),
        )
    except subprocess.TimeoutExpired:
        return f"no GPU could be used through it within {TRY_S:g} s"
    if tried.returncode:
        return f"a GPU cannot be used through it: {tried.stdout.strip() or f'code {tried.returncode}'}"
    return None


def _wait(control: "subprocess.Popen[bytes]") -> None:
    """For the end of standard input, or of the service."""
    ended = os.pidfd_open(control.pid)
    select.select([sys.stdin.fileno(), ended], [], [])
    os.close(ended)


def _end(control: "subprocess.Popen[bytes]", program: str, environment: dict[str, str]) -> None:
    """In order where its clients are gone; else it and its server, which is of its process group, are killed."""
    try:
        if control.poll() is None:
            subprocess.run(
                [program], env=environment, input=b"quit\n", capture_output=True, timeout=QUIT_S, check=False
            )
            control.wait(QUIT_S)
    except subprocess.TimeoutExpired:
        pass  # killed below
    finally:
        with suppress(ProcessLookupError):
            os.killpg(control.pid, signal.SIGKILL)
        control.wait()


if __name__ == "__main__":
    main()
