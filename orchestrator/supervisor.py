"""Worker processes: spawn them, see them die or hang, end them. Knows processes and nothing of what they compute."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path

from configs.schema import MODEL_STAGES, RuntimeConfig, StageName
from ipc.messages import Heartbeat
from orchestrator.rings import RingHouse
from workers import process as worker_process
from workers.spec import RunLimits, WorkerSpec

NS = 1_000_000_000


def worker_groups(config: RuntimeConfig) -> dict[str, tuple[StageName, ...]]:
    """Which stages share a worker process: model stages placed in threads share one, all others have their own."""
    threads = tuple(name for name in MODEL_STAGES if config.stage(name).placement == "thread")
    groups: dict[str, tuple[StageName, ...]] = {"models": threads} if threads else {}
    for name in MODEL_STAGES:
        if name not in threads:
            groups[name] = (name,)
    groups["output"] = ("output",)
    return groups


@dataclass
class Worker:
    """A live worker process.

    Attributes:
        seen: per stage, its last progress count and when that was new.
    """

    name: str
    stages: tuple[StageName, ...]
    process: SpawnProcess
    pidfd: int
    started_ns: int
    ready: set[StageName] = field(default_factory=set)
    seen: dict[StageName, tuple[int, int]] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    @property
    def ended_by_itself(self) -> bool:
        """Whether it is dead and no signal killed it."""
        return self.process.exitcode is not None and self.process.exitcode >= 0

    @property
    def is_ready(self) -> bool:
        return self.ready == set(self.stages)


class Supervisor:
    """All worker processes of a run.

    Args:
        environment: variables of a worker with these stages, beside this process's.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        directory: Path,
        rings: RingHouse,
        limits: RunLimits,
        log: Path | None,
        environment: Callable[[tuple[StageName, ...]], dict[str, str]] = lambda stages: {},
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._config = config
        self._directory = directory
        self._rings = rings
        self._limits = limits
        self._log = log
        self._environment = environment
        self._clock = clock
        self._groups = worker_groups(config)
        self.workers: dict[str, Worker] = {}

    def start(self, names: Iterable[str] | None = None) -> None:
        """Spawns the named workers, or all."""
        resource_tracker.ensure_running()
        for name in self._groups if names is None else names:
            self._spawn(name)

    def _spawn(self, name: str) -> None:
        stages = self._groups[name]
        spec = WorkerSpec(
            name=name,
            stages=stages,
            config=self._config.model_dump_json(),
            directory=self._directory,
            parent=os.getpid(),
            rings=self._rings.passed(),
            history=self._rings.history,
            limits=self._limits,
            log=self._log,
            environment=self._environment(stages),
        )
        process = multiprocessing.get_context("spawn").Process(
            target=worker_process.main, args=(spec,), name=f"longlive-{name}", daemon=True
        )
        with _terminal_signals_held():
            process.start()
        assert process.pid is not None
        self.workers[name] = Worker(name, stages, process, os.pidfd_open(process.pid), self._clock())

    @property
    def all_ready(self) -> bool:
        return len(self.workers) == len(self._groups) and all(worker.is_ready for worker in self.workers.values())

    def of_stage(self, stage: str) -> Worker | None:
        """The worker that runs a stage, if it lives."""
        return next((worker for worker in self.workers.values() if stage in worker.stages), None)

    def ready(self, stage: StageName) -> None:
        """Notes that a stage is up; only from now on must it make progress, however long it took to load."""
        worker = self.of_stage(stage)
        if worker is not None:
            worker.ready.add(stage)
            worker.seen[stage] = (-1, self._clock())

    def heartbeat(self, beat: Heartbeat) -> None:
        """Notes a stage's progress."""
        worker = self.of_stage(beat.stage)
        stage = next((name for name in worker.stages if name == beat.stage), None) if worker else None
        if worker is None or stage is None:
            return
        last = worker.seen.get(stage)
        if last is None or last[0] != beat.progress:
            worker.seen[stage] = (beat.progress, self._clock())

    def kill_overdue(self) -> dict[str, str]:
        """Kills workers that do not start or do not progress in time; their names and why."""
        reasons = {worker.name: reason for worker in self.workers.values() if (reason := self._overdue(worker))}
        for name in reasons:
            self._signal(self.workers[name], signal.SIGKILL)
        return reasons

    def kill(self, worker: Worker) -> None:
        """At once; it is reaped as any other that ends."""
        self._signal(worker, signal.SIGKILL)

    def _overdue(self, worker: Worker) -> str | None:
        limits = self._config.supervision
        now = self._clock()
        if not worker.is_ready:
            late = now - worker.started_ns > limits.start_s * NS
            return f"not ready after {limits.start_s:.0f} s" if late else None
        silent = [stage for stage, (_, since) in worker.seen.items() if now - since > limits.hang_s * NS]
        return f"hung: {silent[0]} made no progress for {limits.hang_s:.0f} s" if silent else None

    def reap(self, pidfd: int) -> tuple[Worker, str]:
        """Takes a dead worker off the list; how it ended, in words."""
        worker = next(worker for worker in self.workers.values() if worker.pidfd == pidfd)
        del self.workers[worker.name]
        worker.process.join()
        os.close(worker.pidfd)
        return worker, _how_it_ended(worker.process.exitcode)

    def end(self, deadline_s: float) -> None:
        """Waits for all workers to end by themselves, then kills those that did not."""
        deadline = time.monotonic() + deadline_s
        for worker in list(self.workers.values()):
            worker.process.join(max(0.0, deadline - time.monotonic()))
            self._signal(worker, signal.SIGKILL)
            self.reap(worker.pidfd)

    def _signal(self, worker: Worker, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd, number)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


class _terminal_signals_held:
    """Children are born with SIGINT blocked, so that Ctrl-C never meets one that cannot ignore it yet."""

    def __enter__(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
