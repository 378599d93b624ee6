"""A worker's main: die with the parent, report, run the stages, end cleanly.

One thread a stage; a stage alone in its process has the main thread to itself. A stage's error ends the whole
process: never limp on. Imports no torch by itself, because the daemon names it as the spawn target.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass, field

import zmq

from configs.schema import RuntimeConfig, StageName
from ipc.channel import Inbox, Outbox, endpoint
from ipc.errors import LongLiveError, RingError, UserError
from ipc.messages import TO_STAGE, Heartbeat, Loading, Ready, StageFailed
from ipc.processes import own_resident_bytes
from workers.assembly import Assembly
from workers.spec import WorkerSpec
from workers.stage import Progress, Stage, run_stage

PR_SET_PDEATHSIG = 1
"""prctl(2)."""
FAREWELL_S = 1.0
"""How long last words may take to leave."""

log = logging.getLogger("longlive")


def main(spec: WorkerSpec) -> None:
    """Runs a worker until it is told to shut down; exits 0 then, 1 after an error, 2 after a person's error."""
    _end_with_parent(spec.parent)
    _ignore_terminal_signals()
    _start_log(spec)
    os.environ.update(spec.environment)
    worker = Worker(spec)
    code = worker.run()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent(parent: int) -> None:
    """The kernel kills this process when the parent dies; if that happened before the call, end now."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _ignore_terminal_signals() -> None:
    """Ctrl-C goes to the whole terminal group; the daemon alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _start_log(spec: WorkerSpec) -> None:
    logging.basicConfig(
        filename=spec.log,
        level=logging.INFO if spec.log else logging.WARNING,
        format=f"%(asctime)s %(levelname)s {spec.name} %(message)s",
    )


@dataclass
class Running:
    """One stage at work in this process; `loaded` once its imports are done."""

    name: StageName
    loaded: bool = False
    progress: Progress = field(default_factory=Progress)


class Worker:
    """The stages of one process and the thread that says that they are alive."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._config = RuntimeConfig.model_validate_json(spec.config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stopped = threading.Event()
        self._loading = threading.Lock()  # transformers imports on first use, which two threads at once break
        self._running = [Running(name) for name in spec.stages]
        self._codes: list[int] = []

    def run(self) -> int:
        """The exit code."""
        assembly = Assembly(self._config, self._spec, self._context)
        alive = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
        alive.start()
        others = [
            threading.Thread(target=self._run_stage, args=(assembly, running), name=running.name)
            for running in self._running[1:]
        ]
        for thread in others:
            thread.start()
        self._run_stage(assembly, self._running[0])
        for thread in others:
            thread.join()
        self._stopped.set()
        alive.join()
        self._close(assembly)
        self._context.destroy()  # returns when last words have left, or their time is over
        return max(self._codes)

    def _close(self, assembly: Assembly) -> None:
        """After a CUDA error memory can be neither unmapped nor unlocked; this process's end does that."""
        try:
            assembly.close()
        except (RingError, RuntimeError):  # the driver's, torch's
            log.exception("%s did not close all its memory", self._spec.name)
            self._codes.append(1)

    def _run_stage(self, assembly: Assembly, running: Running) -> None:
        daemon = Outbox(self._context, endpoint(self._spec.directory, "daemon"))
        try:
            self._live(assembly, running, daemon)
            self._codes.append(0)
        except UserError as error:
            self._fail(running.name, daemon, str(error), user=True)
        except Exception as error:  # the last words of a stage, whatever ended it; the process ends after them
            log.exception("%s ended", running.name)
            text = str(error) if isinstance(error, LongLiveError) else f"{type(error).__name__}: {error}"
            self._fail(running.name, daemon, text, user=False)
        finally:
            daemon.close(linger_s=FAREWELL_S)

    def _live(self, assembly: Assembly, running: Running, daemon: Outbox) -> None:
        name = running.name
        inbox = Inbox(self._context, endpoint(self._spec.directory, name), TO_STAGE)
        try:
            with assembly.thread_settings(name):
                stage = assembly.build(name, running.progress.step)
                try:
                    daemon.send(Loading(stage=name, text="loading"))
                    self._prepare(stage, running, daemon)
                    run_stage(stage, inbox, running.progress, self._stopped)
                finally:
                    stage.close()
        finally:
            inbox.close()

    def _prepare(self, stage: Stage, running: Running, daemon: Outbox) -> None:
        with self._loading:
            stage.load()
        running.loaded = True
        daemon.send(Loading(stage=stage.name, text="warming up"))
        block_ms = stage.warm_up()
        device = "cpu" if stage.name == "output" else self._config.stage(stage.name).device or "cpu"
        if stage.note:
            log.info("%s: %s", stage.name, stage.note)
        for warning in stage.warnings:
            log.info("%s: %s", stage.name, warning)
        daemon.send(Ready(stage=stage.name, device=device, block_ms=block_ms, note=stage.note, warnings=stage.warnings))

    def _fail(self, name: StageName, daemon: Outbox, text: str, *, user: bool) -> None:
        daemon.send(StageFailed(stage=name, text=" ".join(text.split())[:2000], user=user))
        self._codes.append(2 if user else 1)
        self._stopped.set()

    def _heartbeat(self) -> None:
        daemon = Outbox(self._context, endpoint(self._spec.directory, "daemon"))
        while not self._stopped.wait(self._config.supervision.heartbeat_s):
            for running in self._running:
                daemon.send(
                    Heartbeat(
                        stage=running.name,
                        progress=running.progress.count,
                        busy=running.progress.busy,
                        memory_bytes=own_resident_bytes(),
                        device_memory_bytes=_device_bytes() if running.loaded else 0,
                    )
                )
        daemon.close()


def _device_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
