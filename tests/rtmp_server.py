"""An RTMP server on loopback that records what it receives: ffmpeg itself, listening."""

import signal
import socket
import subprocess
from pathlib import Path

from command import until
from video_file import FFMPEG


class RtmpServer:
    """Takes one stream and records it.

    Args:
        recording: FLV file.
    """

    def __init__(self, recording: Path, port: int | None = None) -> None:
        self.recording = recording
        self.port = port or _free_port()
        self.address = f"rtmp://127.0.0.1:{self.port}/live/key"
        self._process = subprocess.Popen(
            [
                *(FFMPEG, "-hide_banner", "-nostdin", "-loglevel", "error", "-listen", "1"),
                *("-i", self.address, "-c", "copy", "-y", "-f", "flv", str(recording)),
            ],
            stdin=subprocess.DEVNULL,
        )
        until(self._listens, 20)

    def _listens(self) -> bool:
        """Whether the port takes connections; not tried, because the server takes only one (proc(5), net/tcp)."""
        lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        fields = (line.split() for line in lines)
        return any(local.endswith(f":{self.port:04X}") and state == "0A" for _, local, _, state, *_ in fields)

    def wait(self, timeout_s: float = 30) -> None:
        """Until the stream ended and the recording is closed."""
        self._process.wait(timeout_s)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
