"""Where these sources lie, so that processes of our own run the same ones, also where others are installed."""

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout; of an installed package the folder that it lies in."""
SCRIPTS = ROOT / "scripts"


def with_sources(folders: Sequence[Path] = ()) -> dict[str, str]:
    """This process's environment, in which Python looks in the checkout first, then in `folders`."""
    places = [str(ROOT), *map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
