"""Some frames of a video side by side as a PNG, such as those around a prompt switch.

.venv/bin/python scripts/frame_sheet.py out/first.mp4 --at 141 --every 12 --out docs/pocket.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pocket.videos import read

COLUMNS = 5
GAP = 2
"""Pixels between frames."""


def main() -> int:
    """Command line: two rows, the upper one before the frame `--at`, the lower one from it on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--at", type=int, required=True, help="first frame of the lower row's time")
    parser.add_argument("--every", type=int, default=12, help="frames between two shown")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    frames = read(given.video)
    first, last = given.at - COLUMNS * given.every, given.at + COLUMNS * given.every - 1
    if first < 0 or last >= len(frames):
        found = f"{given.video}: found {len(frames)} frames"
        print(f"{found}, expected frames {first} to {last}; choose another --at or --every", file=sys.stderr)  # noqa: T201
        return 2
    before = frames[first : given.at : given.every]
    after = frames[given.at + given.every - 1 : last + 1 : given.every]
    Image.fromarray(sheet([before, after])).save(given.out)
    return 0


def sheet(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of frames [n, H, W, 3] uint8, white between them; [H', W', 3]."""
    framed = [np.pad(row, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in framed])[:-GAP, :-GAP]


if __name__ == "__main__":
    sys.exit(main())
