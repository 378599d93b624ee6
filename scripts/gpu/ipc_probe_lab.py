"""Children of probe_cuda_ipc.py: each answers in time or is killed, and none outlives its question."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, str(Path(__file__).with_name("ipc_probe_child.py")))
ANSWER_S = 15.0
"""What a child has for an answer; its start, with torch's import, has twice that."""
Answer = dict[str, Any]


class Unanswered(Exception):
    """A child that died, or did not answer in time."""


class Deadline:
    """The whole run's."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._until - time.monotonic())


class Child:
    """A process that answers one line of JSON for one, in time.

    Args:
        program: what to start.
        env: on top of ours.
    """

    def __init__(
        self, deadline: Deadline, program: tuple[str, ...] = PROGRAM, env: dict[str, str] | None = None
    ) -> None:
        self._deadline = deadline
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
        )
        self._lines = b""
        self._machine: Answer | None = None
        self.pid = self._process.pid

    def machine(self) -> Answer:
        """What it says first: `gpus`, by name, and the versions of `torch` and `cuda`. Raises Unanswered."""
        if self._machine is None:
            self._machine = self.answer(2 * ANSWER_S)
        return self._machine

    def ask(self, name: str, limit_s: float = ANSWER_S, **given: Any) -> Answer:
        """An answer; with `error` where the child could not. Raises Unanswered."""
        self.tell(name, **given)
        return self.answer(limit_s, name)

    def must(self, name: str, **given: Any) -> Answer:
        """An answer without error. Raises Unanswered."""
        answer = self.ask(name, **given)
        if "error" in answer:
            raise Unanswered(f"{name}: {answer['error']}")
        return answer

    def tell(self, name: str, **given: Any) -> None:
        """Asks, and leaves the answer for later."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": name, **given}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unanswered(self._how_it_ended(name)) from None

    def answer(self, limit_s: float = ANSWER_S, name: str = "start") -> Answer:
        """The next line. Raises Unanswered."""
        assert self._process.stdout is not None
        until = time.monotonic() + min(limit_s, self._deadline.left())
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._lines:
                left = until - time.monotonic()
                if left <= 0 or not ready.select(left):
                    self.kill()
                    raise Unanswered(f"{name}: no answer in time")
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    raise Unanswered(self._how_it_ended(name))
                self._lines += read
        line, _, self._lines = self._lines.partition(b"\n")
        found: Answer = json.loads(line)
        return found

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone; one that hangs in the driver is left to it."""
        self._process.send_signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def end(self) -> None:
        """Whatever it does. Its pipes are closed."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):  # what it never read
                    stream.close()

    def _how_it_ended(self, name: str) -> str:
        code = self._process.wait(10)
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{name}: child ended by {how}{': ' + said[-1] if said else ''}"


class Lab:
    """Starts children ahead of the question that needs them, and ends them with it."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._spare: list[Child] = []
        self._started: list[Child] = []

    def ahead(self, count: int) -> None:
        """Has so many children import torch meanwhile; a spare one has no context and so no memory of the GPU."""
        while len(self._spare) < count:
            self._spare.append(Child(self._deadline))

    def machine(self) -> Answer:
        """As a child sees it."""
        self.ahead(1)
        return self._spare[0].machine()

    def child(self, device: int = 0, env: dict[str, str] | None = None) -> Child:
        """A process with a context."""
        child = self._spare.pop(0) if self._spare and env is None else Child(self._deadline, env=env)
        self._started.append(child)
        child.machine()
        child.must("begin", device=device)
        return child

    def end_question(self) -> None:
        """Ends all that it used."""
        while self._started:
            self._started.pop().end()

    def end(self) -> None:
        """Ends all."""
        self.end_question()
        while self._spare:
            self._spare.pop().end()
