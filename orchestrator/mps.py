"""CUDA's multi-process service for one run: kernels of several worker processes run on a GPU at once.

Without it processes take turns of some milliseconds, and the GPU idles where the one whose turn it is has too little
work. The service (docs.nvidia.com/deploy/mps) is asked for here and kept by `orchestrator.mps_keeper`, so that it ends
with this process however that ends. Knows no message and no worker, only the environment that workers need.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from configs.schema import MODEL_STAGES, RuntimeConfig, StageName
from orchestrator import mps_keeper
from orchestrator.checkout import with_sources
from orchestrator.mps_keeper import PIPES, of_client

PROGRAM = "nvidia-cuda-mps-control"
USUAL = Path("/tmp/nvidia-mps")
"""Where a service that runs for the whole machine has its sockets."""
TRIAL = (sys.executable, "-m", mps_keeper.__name__, mps_keeper.TRY)
INSTEAD = "processes that take turns on the GPU"
END_S = 20.0

Environment = Mapping[str, str]


class Mps:
    """One service, made by `begin`.

    Args:
        directory: in which its sockets' folder is made; on a short path, as sockets have to be.
        environment: this process's.
        warn: told why there is none.
        trial: a command that succeeds where the GPUs can be used.
    """

    def __init__(
        self,
        program: str,
        directory: Path,
        environment: Environment,
        warn: Callable[[str], None],
        trial: Sequence[str] = TRIAL,
    ) -> None:
        self._program, self._directory, self._environment, self._warn = program, directory, environment, warn
        self._trial = trial
        self._keeper: subprocess.Popen[str] | None = None
        self._folder = directory

    def begin(self) -> bool:
        """Starts the service and makes sure that a process can use every GPU through it; else it is not there."""
        self._folder = Path(tempfile.mkdtemp(prefix="mps-", dir=self._directory))
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", mps_keeper.__name__, self._program, str(self._folder), *self._trial],
            env=with_sources(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._keeper.stdout is not None
        said = self._keeper.stdout.readline().strip()
        if said == mps_keeper.READY:
            return True
        self.end()
        said = said or f"its keeper ended with code {self._keeper.returncode}"
        self._warn(f"stages.mps: CUDA's multi-process service: {said}; used instead: {INSTEAD}")
        return False

    def for_worker(self) -> dict[str, str]:
        """What a worker's environment needs. Starts the service anew where it died, with all that used it."""
        if self._keeper is None or self._keeper.poll() is not None:
            self.end()
            if not self.begin():
                return {}
        return of_client(self._folder, self._environment)

    def end(self) -> None:
        """Ends the service once its workers have ended. A second call does nothing."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        if self._keeper.stdin.closed:
            return
        self._keeper.stdin.close()
        try:
            self._keeper.wait(END_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self._keeper.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def begin_where_shared(
    config: RuntimeConfig,
    groups: Iterable[tuple[StageName, ...]],
    directory: Path,
    environment: Environment,
    warn: Callable[[str], None],
) -> Mps | None:
    """The service where `stages.mps` wants it and two processes share a GPU; None where they take turns, or need not.

    Args:
        groups: the stages of each worker process.
        environment: of this process. One that names a service of its own, or a service of the whole machine, is left
            to be used as it is.
        warn: told why there is none although it was asked for or tried.
    """
    if config.stages.mps is False or not gpu_is_shared(config, groups) or is_provided(environment):
        return None
    program = shutil.which(PROGRAM, path=environment.get("PATH"))
    if program is None:
        if config.stages.mps is True:
            warn(f"stages.mps=true: found no {PROGRAM}; used instead: {INSTEAD}")
        return None
    mps = Mps(program, directory, environment, warn)
    return mps if mps.begin() else None


def gpu_is_shared(config: RuntimeConfig, groups: Iterable[tuple[StageName, ...]]) -> bool:
    """Whether two worker processes have stages on one GPU."""
    processes: Counter[str] = Counter()
    for stages in groups:
        processes.update({config.stage(name).device or "cpu" for name in stages if name in MODEL_STAGES})
    return any(count > 1 for device, count in processes.items() if device != "cpu")


def is_provided(environment: Environment, usual: Path = USUAL) -> bool:
    """Whether a service that is not ours is there to be used."""
    return PIPES in environment or (usual / "control").exists()


def own_environment() -> Environment:
    """This process's."""
    return os.environ
