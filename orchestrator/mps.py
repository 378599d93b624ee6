"""CUDA's multi-process service for one run: kernels of several worker processes run on a GPU at once.

Without it processes take turns of some milliseconds, and the GPU idles where the one whose turn it is has too little
work. The service (docs.nvidia.com/deploy/mps) is asked for here and kept by `orchestrator.mps_keeper`, so that it ends
with this process however that ends. Knows no message and no worker, only the environment that workers need.
"""

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from configs.schema import MODEL_STAGES, RuntimeConfig, StageName
from orchestrator import mps_keeper
from orchestrator.checkout import with_sources
from orchestrator.mps_keeper import LOGS, PIPES

PROGRAM = "nvidia-cuda-mps-control"
SOCKET = "control"
USUAL = Path("/tmp/nvidia-mps")
"""Where a service that runs for the whole machine has its sockets."""
KEEPER = (sys.executable, "-P", "-m", mps_keeper.__name__)
INSTEAD = "processes that take turns on the GPU"
LONGEST_PATH = 107
"""Bytes of a socket's path (unix(7))."""
BEGIN_S = mps_keeper.START_S + mps_keeper.TRY_S + 2.0
FAULTS = ("CUDA error", "Error [CUDA]", "cudaError", "CUDNN_STATUS")
ANSWER_S = 1.0
END_S = 2 * mps_keeper.QUIT_S + 2.0

Environment = Mapping[str, str]


class Mps:
    """One service.

    Args:
        directory: in which its sockets' folder is made, where that makes a path short enough for sockets.
        warn: told why there is none.
        trial: a command that succeeds where the GPUs can be used.
        interrupted: a descriptor that can be read once nobody wants to wait for the service any more.
    """

    def __init__(
        self,
        program: str,
        directory: Path,
        warn: Callable[[str], None],
        trial: Sequence[str],
        interrupted: int | None = None,
    ) -> None:
        self._program, self._directory, self._warn, self._trial = program, directory, warn, trial
        self._interrupted = () if interrupted is None else (interrupted,)
        self._keeper: subprocess.Popen[str] | None = None
        self._control: int | None = None
        self._folder = directory
        self._spoilt = self._given_up = False

    def begin(self) -> bool:
        """Starts the service and makes sure that a process can use the GPUs through it; False where it is not there."""
        try:
            problem = self._start()
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is None:
            return True
        self.end()
        self._given_up = True
        self._warn(f"stages.mps: CUDA's multi-process service: {problem}; used instead: {INSTEAD}")
        return False

    def for_worker(self) -> dict[str, str]:
        """What a worker's environment needs.

        A service that died or was spoilt is begun anew, which takes a second, at most `END_S` and `BEGIN_S`; one that
        failed to begin is not.
        """
        if not self._given_up and not self._lives:
            self.end()
            self.begin()
        return {} if self._given_up else {PIPES: str(self._folder), LOGS: str(self._folder)}

    @property
    def is_there(self) -> bool:
        """Whether workers are given one; False once it failed to begin."""
        return not self._given_up

    def spoil(self) -> None:
        """A client met a fault, which all of them share; the next worker needs another service."""
        self._spoilt = True

    def end(self) -> None:
        """Ends the service once its workers have ended, with all that it left. A second call does nothing."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.close()
        try:
            in_order = self._keeper.wait(END_S) == 0
        except subprocess.TimeoutExpired:
            in_order = False
            self._keeper.kill()
            self._keeper.wait()
        if self._control is not None and not in_order:
            with suppress(ProcessLookupError):
                os.killpg(self._control, signal.SIGKILL)
        self._keeper.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._keeper = self._control = None

    def _start(self) -> str | None:
        """What hinders it, in words. Raises OSError."""
        self._spoilt = False
        self._folder = Path(tempfile.mkdtemp(prefix="mps-", dir=_short(self._directory)))
        try:
            self._keeper = subprocess.Popen(
                [*KEEPER, self._program, str(self._folder), *self._trial],
                env=with_sources(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        except OSError:
            self._folder.rmdir()
            raise
        assert self._keeper.stdout is not None
        with selectors.DefaultSelector() as selector:
            for source in (self._keeper.stdout.fileno(), *self._interrupted):
                selector.register(source, selectors.EVENT_READ)
            heard = [key.fd for key, _ in selector.select(BEGIN_S)]
        if self._keeper.stdout.fileno() not in heard:
            self._keeper.kill()  # what it began ends with it
            return "interrupted while it began" if heard else f"not there after {BEGIN_S:g} s"
        said = self._keeper.stdout.readline().split()
        if said[:1] != [mps_keeper.READY]:
            return " ".join(said) or "its keeper ended"
        self._control = int(said[1])
        return None

    @property
    def _lives(self) -> bool:
        there = self._keeper is not None and self._keeper.poll() is None and (self._folder / SOCKET).exists()
        return there and not self._spoilt


def begin_where_shared(
    config: RuntimeConfig,
    groups: Iterable[tuple[StageName, ...]],
    directory: Path,
    environment: Environment,
    warn: Callable[[str], None],
    interrupted: int | None = None,
) -> Mps | None:
    """The service where `stages.mps` wants it and two processes share a GPU; None where they take turns, or need not.

    Args:
        groups: the stages of each worker process.
        environment: of this process. A service that it names, or one of the whole machine, is left to be used as it is.
        warn: told why there is none although it was asked for or tried.
    """
    if config.stages.mps is False or is_provided(environment):
        return None
    if not shared_gpus(config, groups):
        if config.stages.mps is True:
            warn("stages.mps=true: no two processes share a GPU; used instead: none")
        return None
    program = shutil.which(PROGRAM, path=environment.get("PATH"))
    if program is None:
        if config.stages.mps is True:
            warn(f"stages.mps=true: found no {PROGRAM}; used instead: {INSTEAD}")
        return None
    gpus = {config.stage(name).device or "cpu" for name in MODEL_STAGES} - {"cpu"}
    trial = (*KEEPER, mps_keeper.TRY, *sorted(gpu.removeprefix("cuda:") for gpu in gpus))
    mps = Mps(program, directory, warn, trial, interrupted)
    return mps if mps.begin() else None


def shared_gpus(config: RuntimeConfig, groups: Iterable[tuple[StageName, ...]]) -> set[str]:
    """GPUs on which two worker processes have stages."""
    processes: Counter[str] = Counter()
    for stages in groups:
        processes.update(gpus_of(config, stages))
    return {gpu for gpu, count in processes.items() if count > 1}


def gpus_of(config: RuntimeConfig, stages: Iterable[StageName]) -> set[str]:
    """GPUs that these stages compute on."""
    return {config.stage(name).device or "cpu" for name in stages if name in MODEL_STAGES} - {"cpu"}


def is_provided(environment: Environment, usual: Path = USUAL) -> bool:
    """Whether a service that is not ours is there to be used."""
    path = Path(environment.get(PIPES, usual)) / SOCKET
    return any(_answers(path, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET))


def is_fault(error: str) -> bool:
    """Whether a worker's last words tell of an error after which no process can use the service's GPUs.

    In the words of torch, Triton, the CUDA runtime and cuDNN. Out of memory is none.
    Source: docs.nvidia.com/deploy/mps, error containment.
    """
    return "out of memory" not in error and any(words in error for words in FAULTS)


def _answers(path: Path, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as client:
        client.settimeout(ANSWER_S)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _short(directory: Path) -> Path:
    """The directory, or where paths are shorter."""
    longest = directory / "mps-12345678" / "control_privileged"
    return directory if len(os.fsencode(longest)) <= LONGEST_PATH else Path("/tmp")
