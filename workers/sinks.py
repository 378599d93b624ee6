"""Outputs: each takes whole frames into a bounded queue and writes them from a thread of its own.

A sink never blocks who offers. A file is kept up to what was written, and goes on in a new segment when its ffmpeg
dies; a stream drops frames that it cannot send. Knows nothing of blocks, prompts or the pace of playout.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from configs.schema import OutputConfig, VideoConfig
from configs.targets import Target, next_free
from ipc.errors import InputError
from ipc.messages import SinkStatus
from workers.ffmpeg import Ffmpeg, file_command, rtmp_command

QUEUE_SECONDS = 2
"""Video a sink may be behind."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
MOST_FAILURES, FORGIVEN_S = 5, 10
"""Deaths of ffmpeg without this many seconds of video between them, after which a sink gives up."""
NO_SPACE = ("No space left on device", "File too large", "Disk quota exceeded", "Read-only file system")
"""What ffmpeg says when the next segment could not be written either (errno(3))."""


class Sink(Protocol):
    """One output.

    Attributes:
        live: whether its time goes on when no frame comes.
        lossless: whether it must get every frame, so that who offers waits for room.
    """

    live: bool
    lossless: bool

    def has_room(self) -> bool:
        """Whether the next frame would be taken."""

    def offer(self, frame: bytes) -> None:
        """Takes one frame, [H, W, 3] rgb24; without room it is dropped and counted."""

    def finish(self) -> None:
        """No further frame will come: write what is queued and close; returns at once."""

    @property
    def done(self) -> bool:
        """Whether it is closed."""

    def abort(self) -> None:
        """Closes at once; what is queued is lost."""

    def status(self) -> SinkStatus:
        """How it does."""


class NullSink:
    """Takes everything and keeps nothing."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._frames = 0
        self.live = False
        self.lossless = False
        self.done = False

    def has_room(self) -> bool:
        return True

    def offer(self, frame: bytes) -> None:
        self._frames += 1

    def finish(self) -> None:
        self.done = True

    def abort(self) -> None:
        self.done = True

    def status(self) -> SinkStatus:
        state = "closed" if self.done else "open"
        return SinkStatus(target=self._target.redacted, state=state, frames=self._frames, dropped=0)


class FfmpegSink:
    """A file or a stream, written by an ffmpeg that is started again when it dies.

    Args:
        command: makes the command line of the next ffmpeg and names the file it writes, None for a stream.
        capacity: frames that may wait.
        fps: frames in a second of video.
        close_s: how long ffmpeg may take to end by itself.
    """

    def __init__(
        self,
        target: Target,
        command: Callable[[], tuple[list[str], Path | None]],
        *,
        live: bool,
        lossless: bool,
        capacity: int,
        fps: int,
        close_s: float,
    ) -> None:
        self.live, self.lossless = live, lossless
        self._target, self._command, self._fps, self._close_s = target, command, fps, close_s
        self._queue: queue.Queue[bytes | None] = queue.Queue(capacity)
        self._state, self._error = "open", ""
        self._segment: Path | None = None
        self._frames = self._dropped = 0
        self._abort = threading.Event()
        self._finishing = False
        self._start()
        self._thread = threading.Thread(target=self._run, name=f"sink {target.kind}", daemon=True)
        self._thread.start()

    def has_room(self) -> bool:
        return self._state == "failed" or not self._queue.full()

    def offer(self, frame: bytes) -> None:
        try:
            self._queue.put_nowait(frame)
        except queue.Full:
            self._dropped += 1

    def finish(self) -> None:
        if not self._finishing:
            self._finishing = True
            threading.Thread(target=self._queue.put, args=(None,), daemon=True).start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def abort(self) -> None:
        self._abort.set()
        self._ffmpeg.stop()
        self.finish()

    def status(self) -> SinkStatus:
        return SinkStatus(
            target=self._target.redacted,
            state="reconnecting" if self._state == "open" and self._ffmpeg.cut_off else self._state,
            frames=self._frames,
            dropped=self._dropped,
            segment=None if self._segment is None else str(self._segment),
            error=(self._error or self._ffmpeg.last_words)[:4000] or None,
        )

    def _start(self) -> None:
        command, self._segment = self._command()
        self._ffmpeg = Ffmpeg(command, self._target)

    def _run(self) -> None:
        failures, written = 0, 0
        while (frame := self._queue.get()) is not None:
            while not self._abort.is_set() and self._state != "failed":
                try:
                    self._ffmpeg.write(frame)
                except OSError as error:
                    failures = 1 if written > FORGIVEN_S * self._fps else failures + 1
                    written = 0
                    self._recover(failures, error)
                    continue
                written += 1
                if self._ffmpeg.cut_off:
                    self._dropped += 1
                else:
                    self._frames += 1
                break
            else:
                self._dropped += 1
        self._close()

    def _recover(self, failures: int, error: OSError) -> None:
        """After ffmpeg died: a pause, then another one with a new segment; or the end, where that cannot help."""
        self._ffmpeg.kill()
        no_space = self._ffmpeg.said(NO_SPACE)
        self._error = no_space or self._ffmpeg.last_words or str(error)
        self._drop_empty_segment()
        if no_space or failures >= MOST_FAILURES:
            self._state = "failed"
            return
        self._state = "restarting"
        if self._abort.wait(min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)):
            return
        try:
            self._start()
        except OSError as again:
            self._recover(failures + 1, again)
            return
        self._state = "open"

    def _drop_empty_segment(self) -> None:
        if self._segment is not None and self._segment.exists() and self._segment.stat().st_size == 0:
            self._segment.unlink()

    def _close(self) -> None:
        if self._state == "failed" or self._abort.is_set():
            self._ffmpeg.kill()
            self._state = "failed" if self._state == "failed" else "aborted"
            return
        code = self._ffmpeg.close(self._close_s)
        if code != 0 and self._target.kind == "file":
            self._state = "failed"
            self._error = self._ffmpeg.last_words or f"ffmpeg ended with code {code}"
        else:
            self._state = "closed"


def open_sinks(targets: Sequence[Target], ffmpeg: Path | None, output: OutputConfig, video: VideoConfig) -> list[Sink]:
    """Opens all outputs; files get every frame unless playout is paced. Raises InputError.

    Args:
        ffmpeg: the program; None where every target is `null:`.
    """
    sinks: list[Sink] = []
    for target in targets:
        try:
            sinks.append(_open(target, ffmpeg, output, video))
        except OSError as error:
            for sink in sinks:
                sink.abort()
            raise InputError(f"output {target.redacted}: cannot be opened: {error.strerror}; choose another") from error
    return sinks


def _open(target: Target, ffmpeg: Path | None, output: OutputConfig, video: VideoConfig) -> Sink:
    if target.kind == "null":
        return NullSink(target)
    assert ffmpeg is not None, "looked up for targets that need it"
    if target.kind == "rtmp":
        command = rtmp_command(ffmpeg, target.text, video, output)
        return FfmpegSink(
            target,
            lambda: (command, None),
            live=True,
            lossless=False,
            capacity=QUEUE_SECONDS * video.fps,
            fps=video.fps,
            close_s=3.0,
        )
    assert target.path is not None
    wanted = target.path

    def next_segment() -> tuple[list[str], Path | None]:
        path = _claim(wanted)
        return file_command(ffmpeg, path, video, output), path

    return FfmpegSink(
        target,
        next_segment,
        live=False,
        lossless=output.pace != "live",
        capacity=QUEUE_SECONDS * video.fps,
        fps=video.fps,
        close_s=20.0,
    )


def _claim(wanted: Path) -> Path:
    """Makes the next free file, so that no other output and no other program takes the name before ffmpeg writes."""
    while True:
        path = next_free(wanted)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
