"""Where frames go: a file, an RTMP server, or nowhere; told from one word, and checked before anything runs.

Only schemes of the list are taken, so that a target never becomes an option or another protocol of ffmpeg. Keys in
RTMP addresses are secrets: what is shown is redacted. Knows no process.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ipc.errors import ConfigError

Kind = Literal["file", "rtmp", "null"]
EXPECTED = "expected a file such as out/video.mp4, rtmp://host/app/key or null:"
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_RTMP_SAFE = re.compile(r"^rtmps?://[A-Za-z0-9\[\]@:%._~/?&=+,!-]+$")


@dataclass(frozen=True)
class Target:
    """One output.

    Attributes:
        text: as it was given; for RTMP with its key.
        path: of a file, else None.
        redacted: what may be shown and logged.
    """

    kind: Kind
    text: str
    path: Path | None
    redacted: str

    def redact(self, line: str) -> str:
        """A line of somebody else's words without this target's secrets: the address, and its key alone."""
        line = line.replace(self.text, self.redacted)
        key = self.text.partition("://")[2].partition("/")[2].partition("/")[2]
        for secret in (key, key.partition("?")[0]):
            line = line.replace(secret, "***") if secret and self.kind == "rtmp" else line
        return line


def parse_target(text: str) -> Target:
    """The target that a word names. Raises ConfigError."""
    if any(not character.isprintable() for character in text) or not text.strip():
        raise ConfigError(f"output: found {text!r}, {EXPECTED}")
    if text == "null:":
        return Target("null", text, None, text)
    if text.startswith(("rtmp://", "rtmps://")):
        return _rtmp(text)
    if _SCHEME.match(text):
        scheme = text.split(":", 1)[0]
        raise ConfigError(f"output: found scheme {scheme}:, {EXPECTED}")
    if text.startswith("-"):
        raise ConfigError(f"output: found {text}, {EXPECTED}; for a file of that name write ./{text}")
    if Path(text).suffix.lower() != ".mp4":
        raise ConfigError(f"output {text}: found ending {Path(text).suffix or 'none'}, expected .mp4")
    return Target("file", text, _at_home(text), text)


def _at_home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"output {text}: no home folder known for it, expected a path written in full") from error


def _rtmp(text: str) -> Target:
    if not _RTMP_SAFE.match(text):
        raise ConfigError(f"output: found characters that no RTMP address has in {_redact(text)}, {EXPECTED}")
    parts = urlsplit(text)
    try:
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or len(parts.path.strip("/")) == 0:
        raise ConfigError(f"output: found {_redact(text)}, expected rtmp://host[:port]/app/key")
    return Target("rtmp", text, None, _redact(text))


def _redact(text: str) -> str:
    """An RTMP address without user, password, query and what follows the app."""
    scheme, _, rest = text.partition("://")
    host, _, path = rest.partition("/")
    app = path.split("/", 1)[0].split("?", 1)[0]
    hidden = "/***" if "/" in path or "?" in path else ""
    return f"{scheme}://{host.rpartition('@')[2]}/{app}{hidden}"


def check_target(target: Target) -> None:
    """Makes a file's folder if need be. Raises ConfigError where the file could not be written."""
    if target.path is None:
        return
    folder = target.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output {target.text}: folder {folder} cannot be made: {error.strerror}; choose another with --out"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"output {target.text}: folder {folder} is not writable; choose another with --out")
    try:
        is_folder = target.path.is_dir()
    except OSError as error:
        raise ConfigError(
            f"output {target.text}: no such file can be: {error.strerror}; choose another name"
        ) from error
    if is_folder:
        raise ConfigError(f"output {target.text}: found a directory, expected a file name")


def next_free(path: Path) -> Path:
    """The path itself, or with -1, -2, ... before its ending if that exists: nothing is ever overwritten."""
    if not path.exists():
        return path
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free
