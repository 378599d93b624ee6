"""Looks into video files with ffmpeg alone."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@dataclass(frozen=True)
class VideoInfo:
    """What ffmpeg says of a file after it decoded all of it; `frames` were decoded without error."""

    codec: str
    pixels: str
    width: int
    height: int
    fps: float
    frames: int
    audio: str | None


def probe(path: Path) -> VideoInfo:
    """Decodes a file from its first to its last frame."""
    ran = subprocess.run(
        [FFMPEG, "-hide_banner", "-nostdin", "-i", path, "-map", "0:v", "-f", "null", "-"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    video = re.search(r"Stream #.*Video: (\w+).*?, (yuv\w+|rgb\w+).*?, (\d+)x(\d+).*?, ([\d.]+) fps", ran.stderr)
    assert video is not None, ran.stderr
    audio = re.search(r"Stream #.*Audio: (\w+)", ran.stderr)
    frames = re.findall(r"frame=\s*(\d+)", ran.stderr)
    return VideoInfo(
        codec=video[1],
        pixels=video[2],
        width=int(video[3]),
        height=int(video[4]),
        fps=float(video[5]),
        frames=int(frames[-1]),
        audio=audio[1] if audio else None,
    )


def read_frames(path: Path) -> np.ndarray:
    """All frames, [F, H, W, 3] uint8."""
    info = probe(path)
    ran = subprocess.run(
        [FFMPEG, "-v", "error", "-nostdin", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    return np.frombuffer(ran.stdout, np.uint8).reshape(-1, info.height, info.width, 3)
