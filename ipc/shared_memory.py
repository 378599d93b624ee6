"""Host memory that two processes share: an anonymous file, passed by its descriptor, gone with its last holder.

A memfd has no name in any file system, so nothing is left behind however its users die (memfd_create(2)). Knows
bytes only.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

from ipc.errors import RingError


class SharedMemory:
    """A mapped memfd.

    Attributes:
        fd: its descriptor, open until `close`.
        nbytes: its size, fixed by seals.
        buffer: writable view of all of it.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, nbytes)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, name: str, nbytes: int) -> "SharedMemory":
        """Zeroed memory, all of it reserved now: a later write never ends in SIGBUS.

        Args:
            name: for /proc/PID/maps only.

        Raises:
            OSError: there is not that much memory. Asked first, because the kernel would rather kill somebody than
                refuse an allocation that is too large for the machine.
        """
        if nbytes > available_bytes():
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, nbytes)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> "SharedMemory":
        """The memory behind a received descriptor, which it owns from now on. Raises RingError for another size."""
        found = os.fstat(fd).st_size
        if found != nbytes:
            os.close(fd)
            raise RingError(f"shared memory: found {found} bytes, expected {nbytes}")
        return cls(fd, nbytes)

    def close(self) -> None:
        """Gives the memory back; views that are still in use keep the mapping until they go."""
        if self.fd < 0:
            return
        # Dropped, not unmapped: a tensor made of the buffer refers to it but exports nothing that would refuse.
        del self.buffer, self._map
        os.close(self.fd)
        self.fd = -1


def available_bytes() -> int:
    """Memory that can be had without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise RingError("/proc/meminfo: found no MemAvailable, expected a Linux kernel of 3.14 or newer")
