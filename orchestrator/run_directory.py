"""The run directory: one daemon at a time, its sockets, and nothing left behind.

    $LONGLIVE_RUN_DIR, else $XDG_RUNTIME_DIR/longlive, else /tmp/longlive-<uid>      0700, ours
    ├── lock            held by flock(2) as long as the daemon lives; holds its pid
    ├── control.sock    clients' commands (ROUTER)
    ├── events.sock     events for everybody who listens (PUB)
    ├── <stage>.sock    inboxes of the stages
    └── mps-*           sockets of CUDA's multi-process service, where this run has one of its own

ZeroMQ's second bind on an ipc:// path silently steals it from the first, so sockets are touched only under the lock.
Knows nothing of what is said over the sockets.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from configs.schema import STAGES
from ipc.channel import endpoint, remove_stale_socket
from ipc.errors import AlreadyRunning, ConfigError

CONTROL = "control"
EVENTS_SOCKET = "events"
LOCK = "lock"
ATTEMPTS = 100
"""How often opening starts over because another process removed the directory or the lock file in between."""


def locate() -> Path:
    """Where this user's run directory is, whether or not it exists; absolute. Raises ConfigError for a bad `~`."""
    if chosen := os.environ.get("LONGLIVE_RUN_DIR"):
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(f"LONGLIVE_RUN_DIR {chosen}: no such home folder; write the path in full") from error
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_absolute() and Path(runtime).is_dir():
        return Path(runtime) / "longlive"
    return Path("/tmp") / f"longlive-{os.getuid()}"


class RunDirectory:
    """A run directory that this process holds; made by `open` or `temporary`, given up by `close`.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: Path, lock: int, created: bool) -> None:
        self.path = path
        self._lock: int | None = lock
        self._created = created
        self._temporary = False

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Creates the directory if need be, takes its lock and clears what a dead daemon left.

        Raises:
            AlreadyRunning: another process holds the lock.
            ConfigError: the directory is not ours, open to others, or its path too long for a socket.
        """
        for name in (CONTROL, EVENTS_SOCKET, *STAGES):
            endpoint(path, name)
        created = False
        for _ in range(ATTEMPTS):
            created = _make_private(path) or created
            lock = _take_lock(path)
            if lock is not None:
                directory = cls(path, lock, created)
                directory._clear_stale_sockets()
                return directory
        raise ConfigError(f"run directory {path}: its lock file keeps changing; set LONGLIVE_RUN_DIR to another")

    @classmethod
    def temporary(cls) -> "RunDirectory":
        """A new directory that nobody else will look for; `close` removes it with all that is in it."""
        path = Path(tempfile.mkdtemp(prefix="longlive-", dir=_short_parent()))
        directory = cls.open(path)
        directory._temporary = True
        return directory

    def address(self, name: str) -> str:
        """The ZeroMQ endpoint of a named socket in this directory."""
        return endpoint(self.path, name)

    def close(self) -> None:
        """Removes sockets and the lock file, then lets go of the lock. A second call does nothing."""
        if self._lock is None:
            return
        for path in self.path.glob("*.sock"):
            if path.is_socket():
                path.unlink(missing_ok=True)
        (self.path / LOCK).unlink(missing_ok=True)
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self._created:
            # Not empty means that the next daemon is already in.
            with contextlib.suppress(OSError):
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _clear_stale_sockets(self) -> None:
        try:
            for path in self.path.glob("*.sock"):
                remove_stale_socket(path)
            for path in self.path.glob("mps-*"):
                shutil.rmtree(path, ignore_errors=True)  # or its keeper is at it
        except ConfigError:
            self.close()
            raise


def _short_parent() -> str | None:
    """A folder for temporary directories whose sockets have paths short enough; None for the usual one."""
    usual = Path(tempfile.gettempdir())
    try:
        endpoint(usual / "longlive-12345678", max(STAGES, key=len))
    except ConfigError:
        return "/tmp"
    return None


def _make_private(path: Path) -> bool:
    """Creates the directory, or checks the one that is there. True if created. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except FileExistsError:
        _check_private(path)
        return False
    except OSError as error:
        raise ConfigError(f"run directory {path}: cannot be made: {error.strerror}; set LONGLIVE_RUN_DIR") from error
    return True


def _check_private(path: Path) -> None:
    """Whoever may write here can steal the sockets; a link may lead anywhere. Raises ConfigError."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"run directory {path}: cannot be used: {error.strerror}; set LONGLIVE_RUN_DIR") from error
    if not stat.S_ISDIR(status.st_mode):
        found = "a link" if stat.S_ISLNK(status.st_mode) else "a file"
        raise ConfigError(f"run directory {path}: found {found}, expected a directory; set LONGLIVE_RUN_DIR to another")
    if status.st_uid != os.getuid():
        raise ConfigError(
            f"run directory {path}: found owner {status.st_uid}, expected {os.getuid()};"
            " set LONGLIVE_RUN_DIR to a directory of your own"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(f"run directory {path}: found mode {mode:04o}, expected 0700; chmod 700 {path}")


def _take_lock(path: Path) -> int | None:
    """The descriptor that holds the lock; None where the file was removed meanwhile. Raises AlreadyRunning.

    A holder that ends unlinks the file before it lets go. Who then gets the lock of the unlinked file holds nothing:
    a third process would lock a new file beside it. Hence the comparison after the lock is taken.
    """
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path / LOCK}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
        gone = not _is_at(path / LOCK, lock)
        os.close(lock)
        if gone:
            return None
        raise AlreadyRunning(_already_running(path, holder)) from None
    if not _is_at(path / LOCK, lock):
        os.close(lock)
        return None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _already_running(path: Path, holder: str) -> str:
    who = f"pid {holder}" if holder else "another process"
    return (
        f"run directory {path}: {who} already runs there; see it with `orchestrator status`, end it with"
        " `orchestrator stop`, or set LONGLIVE_RUN_DIR to another directory"
    )
