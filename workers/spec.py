"""What the daemon tells a worker process when it spawns it: plain data and the file descriptors of shared memory.

Imports no torch: the daemon builds it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from configs.rings import RingName
from configs.schema import StageName


class PassedFd:
    """A file descriptor that survives `spawn`: the child receives its own duplicate, open in it alone."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], "PassedFd"], tuple[Any]]:
        return _received, (reduction.DupFd(self.fd),)


def _received(duplicate: Any) -> PassedFd:
    return PassedFd(duplicate.detach())


@dataclass(frozen=True)
class PassedRing:
    """A ring's header, and its memory unless that lies on a device."""

    header: PassedFd
    memory: PassedFd | None


@dataclass(frozen=True)
class RunLimits:
    """What bounds one run. Blocks and frames are counted from the start of the stream; None is for ever.

    Attributes:
        inputs: safetensors file with noise or embeddings to use instead of drawn or encoded ones.
        dump_latents: safetensors file to write.
    """

    blocks: int | None = None
    frames: int | None = None
    inputs: Path | None = None
    dump_latents: Path | None = None


@dataclass(frozen=True)
class WorkerSpec:
    """One worker process: the stages that share it and what they need.

    Attributes:
        name: of the process, for logs.
        config: the run's configuration as JSON.
        directory: where the sockets are.
        parent: pid of the daemon; the worker ends when it is gone.
        history: retained clean latents.
        log: file for diagnostics; standard error if None.
        environment: variables it has beside the daemon's, set before anything of CUDA is loaded.
    """

    name: str
    stages: tuple[StageName, ...]
    config: str
    directory: Path
    parent: int
    rings: Mapping[RingName, PassedRing]
    history: PassedFd
    limits: RunLimits
    log: Path | None
    environment: Mapping[str, str] = field(default_factory=dict)
