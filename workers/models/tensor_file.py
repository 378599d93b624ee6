"""Weights files as named tensors that are read one by one: safetensors, whole or sharded, and torch's zip files.

Nothing in a file is ever executed: torch files are read with `weights_only=True`. Knows no model.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipc.errors import CheckpointError

LONGEST_SHOWN = 120
"""Characters of a file's own words, such as a tensor's name, that an error line repeats."""

Described = tuple[tuple[int, ...], str]
"""Shape of a tensor and the word for its dtype, such as `bfloat16`."""

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_TORCH_ERRORS = (RuntimeError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError, EOFError)
"""What torch.load raises for a zip file that is damaged or not of its making."""


class TensorFile(Protocol):
    """Named tensors of one file or of a set of shards.

    Attributes:
        path: of the file a person knows.
        shapes: shape and dtype of every tensor.
    """

    path: Path
    shapes: Mapping[str, Described]

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, where possible without reading more than itself."""


def open_tensors(path: Path, roots: tuple[str, ...] = ()) -> TensorFile:
    """Opens a file by its ending.

    Args:
        roots: keys below which a torch file may hold its tensors; the first that is there is used, else the top.

    Raises:
        CheckpointError: unreadable, damaged, or holding more than tensors.
    """
    if path.is_dir():
        raise damaged(path, "found a directory, expected a weights file")
    if path.name.endswith(".index.json"):
        return ShardedFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return TorchFile(path, roots)


def damaged(path: Path, text: str) -> CheckpointError:
    """An error of a file, in one line whatever characters the file's own words have."""
    line = f"{path}: {text}"
    return CheckpointError("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def shown(words: str) -> str:
    """Words from a file, short enough to stand in an error."""
    return words if len(words) <= LONGEST_SHOWN else f"{words[:LONGEST_SHOWN]}..."


class SafetensorsFile:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        head = _head(path)
        if len(head) < 9 or head[8:9] != b"{":
            raise damaged(path, f"found {_kind(head)}, expected a safetensors file; download it again")
        try:
            self._file = safe_open(path, framework="pt")
            self.shapes = {name: self._describe(name) for name in self._file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            reason = _brief(error)
            raise damaged(
                path, f"not a readable safetensors file ({reason}); it may be truncated, download it again"
            ) from error

    def _describe(self, name: str) -> Described:
        piece = self._file.get_slice(name)
        dtype = piece.get_dtype()
        return tuple(piece.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class ShardedFile:
    """Safetensors shards named by an index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where = _weight_map(path)
        self._shards = {shard: self._open(shard) for shard in sorted(set(self._where.values()))}
        self.shapes: dict[str, Described] = {}
        for name, shard in self._where.items():
            held = self._shards[shard].shapes
            if name not in held:
                raise damaged(
                    path.parent / shard,
                    f"tensor {shown(name)}: found nothing of that name, expected it by {path.name}; download both",
                )
            self.shapes[name] = held[name]

    def _open(self, shard: str) -> SafetensorsFile:
        if Path(shard).name != shard or "\0" in shard:
            raise damaged(
                self.path, f"weight_map: found shard {shown(shard)}, expected a plain file name beside the index"
            )
        file = self.path.parent / shard
        if not file.is_file():
            raise damaged(self.path, f"weight_map: shard {shown(shard)} is missing beside the index; download it")
        return SafetensorsFile(file)

    def read(self, name: str) -> Tensor:
        return self._shards[self._where[name]].read(name)


class TorchFile:
    """A file of torch.save, mapped into memory rather than read."""

    def __init__(self, path: Path, roots: tuple[str, ...]) -> None:
        self.path = path
        self._tensors = _only_tensors(path, _below(path, _load(path), roots), roots)
        self.shapes = {name: (tuple(t.shape), _dtype_word(t)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _load(path: Path) -> object:
    """What a torch file holds. Raises CheckpointError."""
    _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise damaged(
            path, f"found {_refused(error)}, expected nothing but tensors; nothing of it was run, get another file"
        ) from error
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from error
    except _TORCH_ERRORS as error:
        reason = _brief(error)
        raise damaged(path, f"not a readable torch file ({reason}); it may be damaged, download it again") from error


def _check_zip(path: Path) -> None:
    """Refuses what torch.load would take for something else, or map wrongly: tensors must lie there uncompressed."""
    head = _head(path)
    if not head.startswith(b"PK\x03\x04"):
        raise damaged(path, f"found {_kind(head)}, expected a zip file of torch.save; download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        reason = _brief(error)
        raise damaged(path, f"not a readable torch file ({reason}); it may be truncated, download it again") from error
    if packed:
        raise damaged(path, "found compressed entries, expected a file as torch.save leaves it; download it again")


def _below(path: Path, found: object, roots: tuple[str, ...]) -> dict[object, object]:
    """The dict that holds the tensors: below the first root that is there, else the top."""
    for root in roots:
        if isinstance(found, dict) and isinstance(found.get(root), dict):
            found = found[root]
            break
    if not isinstance(found, dict) or not found:
        kind = "an empty dict" if isinstance(found, dict) else type(found).__name__
        raise damaged(path, f"found {kind}, expected {_expected(roots)}")
    return found


def _only_tensors(path: Path, found: dict[object, object], roots: tuple[str, ...]) -> dict[str, Tensor]:
    """The same dict, if its keys are names and its values plain tensors."""
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        what = _no_plain_tensor(value)
        if not isinstance(name, str):
            raise damaged(path, f"found key {shown(repr(name))}, expected {_expected(roots)}")
        if what is not None or not isinstance(value, Tensor):
            raise damaged(path, f"{shown(name)}: found {what}, expected {_expected(roots)}")
        tensors[name] = value
    return tensors


def _no_plain_tensor(value: object) -> str | None:
    """What a value is if it is no tensor with numbers of its own."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    return "a tensor without data" if value.is_meta else None


def _expected(roots: tuple[str, ...]) -> str:
    return "a dict of named tensors" + (f", at the top or below {' or '.join(roots)}" if roots else "")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not a readable index ({_brief(error)}); download it again") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise damaged(path, "found no weight_map, expected one from tensor names to shards; download it again")
    return names


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from error


def _kind(head: bytes) -> str:
    """What a file is by its first bytes, when it is not what it should be."""
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file)"
    if head.lstrip().startswith(b"<"):
        return "a web page"
    if head.startswith(b"PK\x03\x04"):
        return "a zip file"
    if head.startswith(b"\x80"):
        return "a pickle, or a torch file from before 1.6"
    return "a safetensors file" if head[8:10] == b'{"' else "something else"


def _refused(error: Exception) -> str:
    """What a pickle holds beside tensors, without torch's advice to open it all the same."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return f"code ({shown(name[1])})" if name else "a pickle that is damaged or holds code"


def _dtype_word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _brief(error: Exception) -> str:
    """The words of an error, short enough to stand inside ours."""
    words = shown(" ".join(str(error).split()))
    return words if words and not isinstance(error, LookupError) else f"{type(error).__name__} {words}".strip()
