"""One run of the shipped runtime, seen from outside: the command in a process of its own, a client, its events.

Knows the events of the daemon and nothing of its inside; what the times mean is said elsewhere.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configs.load import load_config
from configs.schema import RuntimeConfig
from ipc.errors import LongLiveError, NotRunning
from ipc.messages import (
    BlockTimes,
    Discontinuity,
    FramesPlayed,
    Message,
    OnAir,
    PromptEncoded,
    PromptInForce,
    StateChanged,
    WorkerRestarted,
)
from orchestrator.bench.environment import REPOSITORY
from orchestrator.bench.processes import resident_bytes
from orchestrator.client import Client
from orchestrator.progress import one_line

RUNTIME = (sys.executable, "-m", "orchestrator.cli")
START_S = 900.0
"""How long a run may take to come up."""
END_S = 60.0
"""How long it may take to end once its last event came."""
ASK_NS = 2_000_000_000
"""How often the daemon is asked for what the workers hold on their devices."""
LAST_STAGE = "vae_decoder"
"""Of the model stages the one that ends a block."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a configuration with its changes, run by the command that people use.

    Attributes:
        environment: variables of the run beside this process's own.
        program: how `orchestrator` is called.
    """

    config: str = "pocket"
    overrides: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    program: tuple[str, ...] = field(default_factory=lambda: RUNTIME)

    def with_settings(self, *settings: str) -> "Subject":
        """The same with further changes, which win, as a later preset does."""
        return Subject(self.config, (*self.overrides, *settings), self.environment, self.program)

    def load(self) -> RuntimeConfig:
        """The checked configuration. Raises ConfigError."""
        return load_config(self.config, self.overrides)


@dataclass
class Recording:
    """What a run said, in the order in which it came.

    Attributes:
        memory: by worker, pairs of a block and resident bytes when it was decoded.
        device_peaks: by worker, the most bytes that it was seen to hold on devices.
        came_ns: when an event came, for events without a stamp of their own.
    """

    spawned_ns: int = 0
    answered_ns: int = 0
    pids: dict[str, int] = field(default_factory=dict)
    blocks: list[BlockTimes] = field(default_factory=list)
    frames: list[FramesPlayed] = field(default_factory=list)
    encoded: dict[int, PromptEncoded] = field(default_factory=dict)
    in_force: dict[int, PromptInForce] = field(default_factory=dict)
    on_air: dict[int, OnAir] = field(default_factory=dict)
    states_ns: dict[str, int] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    device_peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    underruns: int = 0

    def note(self, event: Message, now_ns: int) -> None:
        """Takes an event in."""
        match event:
            case BlockTimes():
                self.blocks.append(event)
                if event.stage == LAST_STAGE:
                    self._note_memory(event.block)
            case FramesPlayed():
                self.frames.append(event)
            case PromptEncoded():
                self.encoded[event.version] = event
            case PromptInForce():
                self.in_force[event.version] = event
            case OnAir():
                self.on_air[event.version] = event
            case StateChanged():
                self.states_ns.setdefault(event.state, now_ns)
            case Discontinuity() | WorkerRestarted():
                self.breaks.append(event.reason)

    def _note_memory(self, block: int) -> None:
        for worker, pid in self.pids.items():
            held = resident_bytes(pid)
            if held is not None:
                self.memory[worker].append((block, held))


class LiveRun:
    """A running daemon.

    Attributes:
        client: for the thread that started it.
        recording: filled by a thread of its own until the daemon ends.
    """

    def __init__(self, client: Client, recording: Recording, listener: threading.Thread) -> None:
        self.client = client
        self.recording = recording
        self._listener = listener

    def wait_for_block(self, block: int, timeout_s: float = START_S) -> None:
        """Returns when a block's frames were played. Raises LongLiveError: the run ended, or it took too long."""
        deadline = time.monotonic() + timeout_s
        while not any(played.block >= block for played in reversed(self.recording.frames)):
            if not self._listener.is_alive():
                raise LongLiveError(f"the run ended before block {block}")
            if time.monotonic() > deadline:
                raise LongLiveError(f"block {block} was not played within {timeout_s:.0f} s")
            time.sleep(0.01)

    def wait_for_the_end(self) -> None:
        """Returns when the daemon has told all and gone."""
        self._listener.join()


@contextmanager
def running(subject: Subject, *, blocks: int | None = None, settings: Sequence[str] = ()) -> Iterator[LiveRun]:
    """Starts the runtime on no output; what it leaves behind ends with it.

    Args:
        blocks: how many it makes; None until it is stopped.
        settings: changes beside the subject's own.

    Raises:
        LongLiveError: it did not start, or ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="longlive-bench-") as folder:
        directory, errors = Path(folder) / "run", Path(folder) / "errors"
        command = _command(subject, blocks, settings)
        with errors.open("w", encoding="utf-8") as log:
            recording = Recording(spawned_ns=time.monotonic_ns())
            daemon = subprocess.Popen(
                command, env=_environment(directory, subject.environment), stdout=subprocess.DEVNULL, stderr=log
            )
        try:
            with _connected(directory, daemon, errors, recording) as client:
                listener = threading.Thread(target=_listen, args=(directory, recording), name="events", daemon=True)
                listener.start()
                run = LiveRun(client, recording, listener)
                yield run
                if daemon.poll() is None and listener.is_alive():
                    client.stop()
                listener.join(END_S)
            code = daemon.wait(END_S)
        finally:
            daemon.kill()
            daemon.wait()
        if code != 0:
            raise LongLiveError(f"{subject.config}: the run ended with code {code}: {_tail(errors)}")


def record(subject: Subject, blocks: int, settings: Sequence[str] = ()) -> Recording:
    """A run of some blocks from start to end. Raises LongLiveError.

    It makes one block more: the run ends with the last frame, before every stage has told of its last block.
    """
    with running(subject, blocks=blocks + 1, settings=settings) as run:
        run.wait_for_the_end()
    recording = run.recording
    if recording.breaks:
        raise LongLiveError(f"{subject.config}: a worker was started again: {one_line(recording.breaks[0])}")
    recording.blocks = [times for times in recording.blocks if times.block < blocks]
    recording.frames = [played for played in recording.frames if played.block < blocks]
    return recording


def _command(subject: Subject, blocks: int | None, settings: Sequence[str]) -> list[str]:
    command = [*subject.program, "start", "--config", subject.config, "--out", "null:"]
    if blocks is not None:
        config = load_config(subject.config, (*subject.overrides, *settings))
        command += ["--seconds", repr(config.stream.first_frame(blocks) / config.video.fps)]
    for setting in (*subject.overrides, *settings):
        command += ["--set", setting]
    return command


def _environment(directory: Path, further: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    """The runtime beside this file is measured, also where another one is installed."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "LONGLIVE_RUN_DIR": str(directory), **dict(further)}


def _connected(directory: Path, daemon: "subprocess.Popen[bytes]", errors: Path, recording: Recording) -> Client:
    deadline = time.monotonic() + START_S
    while True:
        try:
            client = Client(directory)
        except NotRunning:
            if daemon.poll() is not None:
                raise LongLiveError(f"the daemon did not start: {_tail(errors)}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        recording.answered_ns = time.monotonic_ns()
        return client


def _listen(directory: Path, recording: Recording, clock: Callable[[], int] = time.monotonic_ns) -> None:
    """Takes events in until the daemon ends, and now and again asks for a snapshot."""
    with Client(directory) as client:
        events = client.events()
        asked_ns = clock()
        _ask(client, recording)
        for event in events:
            now = clock()
            recording.note(event, now)
            if now - asked_ns >= ASK_NS and isinstance(event, BlockTimes):
                asked_ns = now
                _ask(client, recording)


def _ask(client: Client, recording: Recording) -> None:
    try:
        status = client.status()
    except NotRunning:
        return
    recording.underruns = status.underruns
    recording.pids["orchestrator"] = status.pid
    shared = Counter(stage.pid for stage in status.stages.values())
    for name, stage in status.stages.items():
        worker = "models" if shared[stage.pid] > 1 else name
        recording.pids[worker] = stage.pid
        recording.device_peaks[worker] = max(recording.device_peaks[worker], stage.device_memory_bytes)


def _tail(errors: Path) -> str:
    return one_line(errors.read_text(encoding="utf-8", errors="replace"))[-400:]
