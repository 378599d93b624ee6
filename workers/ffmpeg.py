"""ffmpeg as a child that eats raw frames: its command lines, its life, and its orderly end.

A frame is rgb24, [H, W, 3] bytes. Files are fragmented MP4, playable up to the last fragment whatever happens;
RTMP goes through the fifo muxer, so that a dead or frozen server never blocks us. No shell. Knows nothing of playout.
"""

import os
import select
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from configs.schema import OutputConfig, VideoConfig
from configs.targets import Target
from ipc.errors import InputError

GOP_SECONDS = 2
LAST_LINES = 20
TERM_S = 5.0
"""How long ffmpeg may take to end after its one SIGTERM."""
STUCK_S = 10.0
"""How long ffmpeg may leave a frame lying before it counts as stuck."""


def find_ffmpeg(explicit: Path | None) -> Path:
    """The program to run: the one asked for, else that of imageio-ffmpeg. Raises InputError if it does not work."""
    if explicit is None:
        import imageio_ffmpeg

        try:
            path = Path(imageio_ffmpeg.get_ffmpeg_exe())
        except RuntimeError as error:
            raise InputError("ffmpeg: none found; pass --ffmpeg PATH or install imageio-ffmpeg") from error
    else:
        path = explicit
    try:
        version, encoders = (_answer(path, question) for question in ("-version", "-encoders"))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"ffmpeg {path}: cannot be run ({error}); pass --ffmpeg PATH") from error
    if not version.startswith(b"ffmpeg version"):
        raise InputError(f"ffmpeg {path}: does not answer as ffmpeg does; pass --ffmpeg PATH")
    if b" libx264 " not in encoders:
        raise InputError(
            f"ffmpeg {path}: found no encoder libx264 in it, expected one; pass another with --ffmpeg PATH"
        )
    return path


def _answer(ffmpeg: Path, question: str) -> bytes:
    return subprocess.run(
        [ffmpeg, question], capture_output=True, timeout=20, check=False, stdin=subprocess.DEVNULL
    ).stdout


def file_command(ffmpeg: Path, path: Path, video: VideoConfig, output: OutputConfig) -> list[str]:
    """H.264 yuv420p in fragmented MP4 (ffmpeg's muxer page, `movflags`), into a file that the caller has claimed.

    The encoder looks at no later frame: videos of equal frames are equal up to the first that differs.
    """
    return [
        *_reads_frames(ffmpeg, video),
        *_h264(video),
        *("-preset", "veryfast", "-tune", "zerolatency", "-crf", str(output.crf)),
        *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1"),
        *("-f", "mp4", "-y", f"file:{path}"),
    ]


def rtmp_command(ffmpeg: Path, address: str, video: VideoConfig, output: OutputConfig) -> list[str]:
    """H.264 yuv420p and silent AAC in FLV, through a queue that reconnects (ffmpeg's muxer page, `fifo`).

    It logs at `info`, because only there it says that it has the server again.
    """
    rate = f"{output.live_bitrate_kbit}k"
    return [
        *_reads_frames(ffmpeg, video, loglevel="level+info"),
        *("-f", "lavfi", "-i", "anullsrc=channel_layout=stereo:sample_rate=44100"),
        *("-map", "0:v", "-map", "1:a", "-shortest"),
        *_h264(video),
        *("-preset", "veryfast", "-tune", "zerolatency", "-b:v", rate, "-maxrate", rate, "-bufsize", rate),
        *("-c:a", "aac", "-b:a", "96k", "-flags", "+global_header"),
        *("-f", "fifo", "-fifo_format", "flv", "-format_opts", "flvflags=no_duration_filesize"),
        *("-queue_size", "120", "-drop_pkts_on_overflow", "1"),
        *("-attempt_recovery", "1", "-recover_any_error", "1", "-recovery_wait_time", "1"),
        *("-restart_with_keyframe", "1", address),
    ]


def _reads_frames(ffmpeg: Path, video: VideoConfig, loglevel: str = "level+warning") -> list[str]:
    return [
        *(str(ffmpeg), "-hide_banner", "-loglevel", loglevel, "-nostats"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{video.width}x{video.height}"),
        *("-framerate", str(video.fps), "-thread_queue_size", "64", "-i", "pipe:0"),
    ]


def _h264(video: VideoConfig) -> list[str]:
    return [
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-threads", "1"),
        *("-g", str(GOP_SECONDS * video.fps), "-r", str(video.fps)),
    ]


class Ffmpeg:
    """A running ffmpeg.

    Args:
        command: its arguments, the program first.
        target: whose address is hidden in what it says.
        stuck_s: how long it may leave a frame lying before it counts as stuck.

    Attributes:
        cut_off: whether it has no connection to its server and tries to get one.
    """

    def __init__(self, command: Sequence[str], target: Target, stuck_s: float = STUCK_S) -> None:
        self._target, self._stuck_s = target, stuck_s
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self.cut_off = False
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stderr is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        self._room = select.poll()
        self._room.register(self._stdin.fileno(), select.POLLOUT)
        self._reader = threading.Thread(target=self._read, name="ffmpeg stderr", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The last line it wrote, redacted."""
        return self._lines[-1] if self._lines else ""

    def said(self, phrases: Sequence[str]) -> str:
        """The last line it wrote that has one of these phrases, redacted; empty if there is none."""
        return next((line for line in reversed(self._lines) if any(phrase in line for phrase in phrases)), "")

    def write(self, frame: bytes) -> None:
        """One whole frame; waits while ffmpeg's input is full.

        Raises BrokenPipeError when it is gone, TimeoutError when it takes nothing for too long.
        """
        view = memoryview(frame)
        while view:
            if not self._room.poll(self._stuck_s * 1000):
                raise TimeoutError(f"ffmpeg took no frame for {self._stuck_s:g} s")
            view = view[os.write(self._stdin.fileno(), view) :]

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, wait_s: float) -> int:
        """Ends the input and waits that long; then one SIGTERM; then SIGKILL. The exit code."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        for patience_s, number in ((wait_s, signal.SIGTERM), (TERM_S, signal.SIGKILL)):
            try:
                return self._ended(self._process.wait(patience_s))
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)
        return self._ended(self._process.wait())

    def stop(self) -> None:
        """Makes it end at once, so that whoever writes to it gets BrokenPipeError; may be called from any thread."""
        self._process.kill()

    def kill(self) -> None:
        """Ends it at once and waits; by the thread that writes. A second call does nothing more."""
        self._process.kill()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._ended(self._process.wait())

    def _ended(self, code: int) -> int:
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        return code

    def _read(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = " ".join(raw.decode("utf-8", "replace").split())
            if line.startswith("[fifo @"):
                self.cut_off = "Recovery successful" not in line and (self.cut_off or "Error opening" in line)
            if line and "[info]" not in line:
                self._lines.append(self._target.redact(line))
