"""Frames of a video become a sheet; a wrong choice of frames is said in one line."""

import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "scripts" / "frame_sheet.py"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """24 frames of 32x48, each of one brightness: 10 times its number."""
    path = tmp_path / "video.mp4"
    writer = imageio_ffmpeg.write_frames(str(path), (48, 32), fps=16, macro_block_size=16)
    writer.send(None)
    for number in range(24):
        writer.send(np.full((32, 48, 3), 10 * number, np.uint8).tobytes())
    writer.close()
    return path


def sheet(video: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(video), "--out", str(video.with_suffix(".png")), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_frames_before_and_after_lie_in_two_rows(video: Path) -> None:
    ran = sheet(video, "--at", "12", "--every", "2")
    assert ran.returncode == 0, ran.stderr
    picture = np.asarray(Image.open(video.with_suffix(".png")).convert("L")).astype(int)
    assert picture.shape == (2 * 34 - 2, 5 * 50 - 2)
    shown = [[int(picture[row + 16, column + 24]) // 10 for column in range(0, 250, 50)] for row in (0, 34)]
    assert np.abs(np.array(shown) - [[2, 4, 6, 8, 10], [13, 15, 17, 19, 21]]).max() <= 1


def test_frames_that_are_not_there_are_said(video: Path) -> None:
    ran = sheet(video, "--at", "20", "--every", "2")
    assert ran.returncode == 2
    assert "found 24 frames, expected frames 10 to 29" in ran.stderr
