"""One run of the shipped runtime, seen from outside: the command in a process of its own, from its start to its end.

Every wait has a deadline. Knows nothing of the runtime's inside.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configs.load import load_config
from configs.schema import RuntimeConfig
from ipc.errors import LongLiveError, NotRunning
from ipc.messages import Stopped
from orchestrator.bench.recording import Listener, Recording
from orchestrator.checkout import with_sources
from orchestrator.client import Client
from orchestrator.progress import one_line

RUNTIME = (sys.executable, "-m", "orchestrator.cli")
QUIET_S = 900.0
"""How long a run may take to come up, and to play its next block."""
END_S = 60.0
"""How long it may take to end once its last event came."""
LOOK_S = 0.01


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


class LiveRun:
    """A running daemon.

    Attributes:
        client: for the thread that started it.
        recording: filled by a thread of its own until the daemon ends.
        pid: the daemon's.
        stopped: what it answered to being stopped.
    """

    def __init__(
        self,
        client: Client,
        listener: Listener,
        daemon: "subprocess.Popen[bytes]",
        errors: Path,
        may_restart: bool,
    ) -> None:
        self.client = client
        self.recording = listener.recording
        self.pid = daemon.pid
        self.stopped: Stopped | None = None
        self._listener = listener
        self._daemon = daemon
        self._may_restart = may_restart
        self._errors = errors

    @property
    def last_block(self) -> int:
        """The last one whose frames were all played; -1 before the first."""
        frames = self.recording.frames
        return frames[-1].block if frames else -1

    def wait_for_block(self, block: int) -> None:
        """Returns when a block's frames were played.

        Raises:
            LongLiveError: the run ended before, or no block was played for `QUIET_S`.
        """
        self._wait(f"block {block}", lambda: self.last_block >= block)

    def wait_for_the_end(self) -> None:
        """Returns when the daemon has told all. Raises LongLiveError: no block was played for `QUIET_S`."""
        self._wait("its end", lambda: not self._listener.is_alive())

    def stop(self) -> None:
        """Ends the run where it does not end by itself. Raises LongLiveError: it failed, or not in time."""
        if self._daemon.poll() is None and self._listener.is_alive():
            try:
                self.stopped = self.client.stop(END_S)
            except NotRunning:
                pass  # it was about to end
            except TimeoutError as error:
                raise LongLiveError(f"the run did not end within {END_S:g} s of being asked to") from error
        self._listener.join(END_S)
        code = self._code()
        if code != 0:
            raise LongLiveError(f"the run ended with code {code}: {_tail(self._errors)}")
        if self.recording.breaks and not self._may_restart:
            raise LongLiveError(f"a worker was started again: {one_line(self.recording.breaks[0])}")

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        seen, since = self.last_block, time.monotonic()
        while True:
            ended = not self._listener.is_alive()
            if done():
                return
            if ended:
                raise LongLiveError(f"the run ended before {what}, with code {self._code()}: {_tail(self._errors)}")
            if self.last_block != seen:
                seen, since = self.last_block, time.monotonic()
            elif time.monotonic() - since > QUIET_S:
                raise LongLiveError(f"waited for {what} of a run that played no block for {QUIET_S:g} s")
            time.sleep(LOOK_S)

    def _code(self) -> int:
        try:
            return self._daemon.wait(END_S)
        except subprocess.TimeoutExpired as error:
            raise LongLiveError(f"the run did not end within {END_S:g} s of the last that it told") from error


@contextmanager
def running(
    subject: Subject,
    *,
    blocks: int | None = None,
    settings: Sequence[str] = (),
    out: str = "null:",
    may_restart: bool = False,
) -> Iterator[LiveRun]:
    """Starts the runtime; what it leaves behind ends with it.

    Args:
        blocks: how many it makes; None until it is stopped.
        settings: changes beside the subject's own.
        out: where its frames go.
        may_restart: for who ends workers on purpose; else a run in which one was started again counts as failed.

    Raises:
        LongLiveError: it did not start, ended with an error, or a worker was started again.
    """
    with tempfile.TemporaryDirectory(prefix="longlive-bench-") as folder:
        directory, errors = Path(folder) / "run", Path(folder) / "errors"
        command = _command(subject, blocks, settings, out)
        with errors.open("w", encoding="utf-8") as log:
            listener = Listener(directory, Recording(spawned_ns=time.monotonic_ns()), QUIET_S + END_S)
            daemon = subprocess.Popen(
                command, env=_environment(directory, subject.environment), stdout=subprocess.DEVNULL, stderr=log
            )
        try:
            with _connected(directory, daemon, errors) as client:
                listener.recording.answered_ns = time.monotonic_ns()
                listener.start()
                run = LiveRun(client, listener, daemon, errors, may_restart)
                yield run
                run.stop()
        finally:
            daemon.kill()
            daemon.wait()
            if listener.is_alive():
                listener.join(END_S)


def record(subject: Subject, blocks: int, settings: Sequence[str] = ()) -> Recording:
    """A run of some blocks from start to end. Raises LongLiveError.

    It makes one block more: the run ends with the last frame, before every stage has told of its last block.
    """
    with running(subject, blocks=blocks + 1, settings=settings) as run:
        run.wait_for_the_end()
    recording = run.recording
    recording.blocks = [times for times in recording.blocks if times.block < blocks]
    recording.frames = [played for played in recording.frames if played.block < blocks]
    return recording


def _command(subject: Subject, blocks: int | None, settings: Sequence[str], out: str) -> list[str]:
    command = [*subject.program, "start", "--config", subject.config, "--out", out]
    if blocks is not None:
        config = load_config(subject.config, (*subject.overrides, *settings))
        command += ["--seconds", repr(config.stream.first_frame(blocks) / config.video.fps)]
    for setting in (*subject.overrides, *settings):
        command += ["--set", setting]
    return command


def _environment(directory: Path, further: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    return {**with_sources(), "LONGLIVE_RUN_DIR": str(directory), **dict(further)}


def _connected(directory: Path, daemon: "subprocess.Popen[bytes]", errors: Path) -> Client:
    deadline = time.monotonic() + QUIET_S
    while True:
        try:
            return Client(directory)
        except NotRunning:
            if daemon.poll() is not None:
                raise LongLiveError(f"the daemon did not start: {_tail(errors)}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def _tail(errors: Path) -> str:
    """The error that the command ended with; where it told none, the end of what it said."""
    text = errors.read_text(encoding="utf-8", errors="replace")
    told = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    return one_line(told[-1] if told else text)[-400:]
