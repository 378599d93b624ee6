"""SIGINT, SIGTERM and SIGHUP as something a poll can wait for. Knows not what they mean to the run."""

import os
import signal
from contextlib import suppress
from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalWatch:
    """Counts signals from its creation on; only in the main thread.

    Attributes:
        fd: readable when one has come.
    """

    def __init__(self) -> None:
        self._count = 0
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._came) for number in WATCHED}

    def _came(self, number: int, frame: FrameType | None) -> None:
        self._count += 1

    def taken(self) -> int:
        """How many came since the last call."""
        with suppress(BlockingIOError):
            os.read(self.fd, 4096)
        count, self._count = self._count, 0
        return count

    def close(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.fd)
        os.close(self._write)
