"""Reference cases: folders of config.json and tensors.safetensors, our own and those below $GOLDEN_DIRS."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Kind = Literal["stream", "vae", "umt5", "scheduler"]
MARKS: dict[Kind, frozenset[str]] = {
    "stream": frozenset({"noise", "latents"}),
    "vae": frozenset({"latents", "pixels_unclamped"}),
    "umt5": frozenset({"ids", "embeds"}),
    "scheduler": frozenset({"x", "noise", "timesteps"}),
}
"""Tensors that together only cases of a kind have; a folder with none of these sets is no case."""


@dataclass(frozen=True)
class Case:
    """One reference case."""

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def cases(kind: Kind) -> list[Path]:
    """Folders of one kind, told by the tensors they hold."""
    parents = [Path(__file__).parent / "golden"]
    parents += [Path(parent) for parent in os.environ.get("GOLDEN_DIRS", "").split(os.pathsep) if parent]
    folders = [path.parent for parent in parents for path in sorted(parent.glob("*/tensors.safetensors"))]
    return [folder for folder in folders if MARKS[kind] <= _names(folder)]


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "tensors.safetensors", framework="pt") as file:
        return set(file.keys())


def case_id(path: Path) -> str:
    """How a test's name shows its case."""
    return f"golden-{path.name}"


def load(path: Path) -> Case:
    """A case's configuration and tensors."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Case(path.name, path, config, load_file(path / "tensors.safetensors"))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, in float64."""
    assert out.shape == reference.shape, f"{list(out.shape)} against {list(reference.shape)}"
    return float(torch.linalg.norm((out - reference).double()) / torch.linalg.norm(reference.double()))
