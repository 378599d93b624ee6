"""What a comparison looks like: A, B and their difference side by side, as a video and as a sheet of the worst blocks.

Knows frames and ffmpeg, no model. Frames are [F, H, W, 3] uint8.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from configs.schema import OutputConfig, VideoConfig
from configs.targets import Target
from ipc.errors import InputError
from workers.ffmpeg import Ffmpeg, file_command

AMPLIFIED = 8
"""Times the absolute difference that is shown; 32 of 255 and more are full brightness."""
SHOWN_BLOCKS = 4
GAP = 4
"""White pixels between pictures of the sheet."""
CLOSE_S = 30.0


def beside(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A, B and the amplified absolute difference: [F, H, 3 W, 3]."""
    off = np.abs(one.astype(np.int32) - other.astype(np.int32)) * AMPLIFIED
    return np.concatenate([one, other, off.clip(0, 255).astype(np.uint8)], axis=2)


class SideBySide:
    """An MP4 that is written as frames come: H.264, yuv420p."""

    def __init__(self, ffmpeg: Path, path: Path, video: VideoConfig) -> None:
        wide = video.model_copy(update={"width": 3 * video.width})
        self._path = path
        self._ffmpeg = Ffmpeg(
            file_command(ffmpeg, path, wide, OutputConfig()), Target("file", str(path), path, str(path))
        )

    def __enter__(self) -> "SideBySide":
        return self

    def put(self, one: np.ndarray, other: np.ndarray) -> None:
        """Frames of A and of B. Raises InputError if they cannot be written."""
        try:
            for frame in beside(one, other):
                self._ffmpeg.write(frame.tobytes())
        except (BrokenPipeError, TimeoutError) as error:
            raise InputError(f"{self._path}: cannot be written: {self._ffmpeg.last_words or error}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._ffmpeg.kill()
        elif self._ffmpeg.close(CLOSE_S):
            raise InputError(f"{self._path}: cannot be written: {self._ffmpeg.last_words}")


@dataclass(frozen=True)
class Shown:
    """A block on the sheet: A and B at the frame where they differ most, each [H, W, 3]."""

    decibels: float
    one: np.ndarray
    other: np.ndarray


class WorstBlocks:
    """Keeps the few blocks with the least PSNR."""

    def __init__(self) -> None:
        self.shown: list[Shown] = []

    def see(self, decibels: float, one: np.ndarray, other: np.ndarray) -> None:
        """A block's frames of A and B."""
        off = np.square(one.astype(np.int32) - other.astype(np.int32)).mean(axis=(1, 2, 3))
        frame = int(off.argmax())
        self.shown.append(Shown(decibels, one[frame], other[frame]))
        self.shown = sorted(self.shown, key=lambda block: block.decibels)[:SHOWN_BLOCKS]

    def sheet(self) -> np.ndarray:
        """One row a block, the worst first: A, B, difference; [H', W', 3]."""
        rows = [_framed(beside(block.one[None], block.other[None])[0]) for block in self.shown]
        return np.concatenate(rows)[:-GAP]


def _framed(row: np.ndarray) -> np.ndarray:
    """White between three pictures and below them."""
    white = ((0, GAP), (0, GAP), (0, 0))
    parts = [np.pad(part, white, constant_values=255) for part in np.split(row, 3, axis=1)]
    return np.concatenate(parts, axis=1)[:, :-GAP]


def write_png(ffmpeg: Path, path: Path, picture: np.ndarray) -> None:
    """A picture [H, W, 3] uint8 as PNG. Raises InputError."""
    height, width = picture.shape[:2]
    command = [
        *(str(ffmpeg), "-hide_banner", "-loglevel", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-i", "pipe:0"),
        *("-frames:v", "1", "-c:v", "png", "-f", "image2pipe", "pipe:1"),
    ]
    done = subprocess.run(command, input=picture.tobytes(), capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise InputError(f"{path}: cannot be made: {done.stderr.decode('utf-8', 'replace').strip()[-200:]}")
    try:
        path.write_bytes(done.stdout)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
