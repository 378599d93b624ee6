"""Weights files as named tensors that are read one by one: safetensors, whole or sharded, and torch's zip files.

Nothing in a file is ever executed: torch files are read with `weights_only=True`. Knows no model.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipc.errors import CheckpointError

_TORCH_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
)
"""What torch.load raises for files that are damaged, or that hold more than tensors."""


class TensorFile(Protocol):
    """Named tensors of one file or of a set of shards.

    Attributes:
        path: of the file a person knows.
        shapes: shape and dtype of every tensor.
    """

    path: Path
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

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
        raise CheckpointError(f"{path}: found a directory, expected a weights file")
    if path.name.endswith(".index.json"):
        return ShardedFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return TorchFile(path, roots)


class SafetensorsFile:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.shapes = {name: self._describe(name) for name in self._file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({_brief(error)}); it may be truncated, download it again"
            ) from error

    def _describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        piece = self._file.get_slice(name)
        dtype = _DTYPES.get(piece.get_dtype(), torch.uint8)
        return tuple(piece.get_shape()), dtype

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64}


class ShardedFile:
    """Safetensors shards named by an index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: dict[str, SafetensorsFile] = {}
        names = _weight_map(path)
        for shard in sorted(set(names.values())):
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{path}: weight_map: found shard {shard!r}, expected a plain file name beside it"
                )
            if not (path.parent / shard).is_file():
                raise CheckpointError(f"{path}: weight_map: shard {shard} is missing beside it; download it")
            self._shards[shard] = SafetensorsFile(path.parent / shard)
        self._where = names
        self.shapes = {}
        for name, shard in names.items():
            if name not in self._shards[shard].shapes:
                raise CheckpointError(f"{path.parent / shard}: tensor {name}: not found, expected it by {path.name}")
            self.shapes[name] = self._shards[shard].shapes[name]

    def read(self, name: str) -> Tensor:
        return self._shards[self._where[name]].read(name)


class TorchFile:
    """A file of torch.save, mapped into memory rather than read."""

    def __init__(self, path: Path, roots: tuple[str, ...]) -> None:
        self.path = path
        found = _load(path)
        for root in roots:
            if isinstance(found, dict) and isinstance(found.get(root), dict):
                found = found[root]
                break
        if not isinstance(found, dict) or not found:
            expected = f" or one below {' or '.join(roots)}" if roots else ""
            raise CheckpointError(f"{path}: found {type(found).__name__}, expected a dict of tensors{expected}")
        other = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
        if other is not None:
            kind = type(found[other]).__name__
            where = f"; expected the tensors below {' or '.join(roots)}" if roots else ""
            raise CheckpointError(f"{path}: {other}: found {kind}, expected a tensor{where}")
        self._tensors: dict[str, Tensor] = found
        self.shapes = {name: (tuple(value.shape), value.dtype) for name, value in found.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds something other than tensors ({_brief(error)}); not opened any further, get it from its"
            " publisher"
        ) from error
    except _TORCH_ERRORS as error:
        raise CheckpointError(
            f"{path}: not a readable torch file ({_brief(error)}); it may be truncated, download it again"
        ) from error


def _weight_map(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("weight_map")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable index ({_brief(error)})") from error
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise CheckpointError(f"{path}: found no weight_map of names, expected one")
    return names


def _brief(error: Exception) -> str:
    """The first line of an error, short enough to stand inside ours."""
    text = " ".join(str(error).split())
    return text[:160] if text else type(error).__name__
