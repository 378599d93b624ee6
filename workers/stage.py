"""What a stage is, and the loop that runs one: drain the inbox, do one unit of work, or wait.

The loop knows nothing of tensors, prompts or pixels. Messages only wake it: a lost one costs at most `wait_s`.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from configs.schema import StageName
from ipc.messages import Message, Shutdown

IDLE_WAIT_S = 0.05
"""Longest sleep between two looks at the rings' headers."""


class Stage(Protocol):
    """One stage of the pipeline; all calls come from one thread.

    Attributes:
        note: what the person should know once it is loaded, such as the attention backend in use; None for nothing.
        warnings: a line for each thing that was asked for and is not to be had here, with what is used instead.
    """

    name: StageName
    note: str | None
    warnings: list[str]

    def load(self) -> None:
        """Brings weights and devices in place. Raises UserError where the person must change something."""

    def warm_up(self) -> float | None:
        """Runs the work once on scratch data; milliseconds a block, None where a block costs it nothing."""

    def receive(self, message: Message) -> None:
        """Takes a message in; does no work."""

    def process(self) -> bool:
        """Does one unit of work if there is any; False if there is none now."""

    def wait_s(self) -> float:
        """Seconds it may sleep when nothing arrives."""

    def close(self) -> None:
        """Gives everything back; called once, after any failure too."""


class Mailbox(Protocol):
    """Where messages come from; an `ipc.channel.Inbox` is one."""

    def drain(self) -> Iterator[Message]: ...

    def wait(self, timeout_s: float) -> None: ...


class Progress:
    """A counter that rises while a stage is alive; what the heartbeat reports.

    Attributes:
        count: turns of the loop and units inside them, such as transformer passes.
        busy: whether the stage is inside a unit of work.
    """

    def __init__(self) -> None:
        self.count = 0
        self.busy = False

    def step(self) -> None:
        self.count += 1


def run_stage(stage: Stage, inbox: Mailbox, progress: Progress, stopped: threading.Event) -> None:
    """Runs a loaded stage until it is told to shut down or `stopped` is set by a sibling's failure."""
    while not stopped.is_set():
        for message in inbox.drain():
            if isinstance(message, Shutdown):
                return
            stage.receive(message)
        progress.step()
        if not _one_unit(stage.process, progress):
            inbox.wait(stage.wait_s())


def _one_unit(process: Callable[[], bool], progress: Progress) -> bool:
    progress.busy = True
    try:
        return process()
    finally:
        progress.busy = False
