"""Imports go one way, the daemon stays without torch, and some things are nowhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("configs", "ipc", "workers", "orchestrator")
STAGES = {"workers.text_encoder", "workers.denoiser", "workers.vae_decoder", "workers.output"}
WITH_TORCH = {"ipc.tensor_ring", "ipc.cuda_ipc"}
FILES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*.py", "*.md", "*.yaml", "*.toml", "*.txt")
    for path in REPOSITORY.rglob(pattern)
    if not {".venv", ".git", "build", "out"} & set(path.relative_to(REPOSITORY).parts)
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Our modules that a file names in an import, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = {module_of(file) for file in FILES}
    return {name for name in names if name in known}


def allowed(importer: str, target: str) -> bool:
    """Whether an arrow may be."""
    if importer.startswith("configs."):
        return target.startswith("configs.") or target == "ipc.errors"
    if importer.startswith("ipc."):
        return target.startswith("ipc.")
    if importer.startswith("workers.models."):
        return target.startswith(("configs.", "workers.models.")) or target == "ipc.errors"
    if importer in STAGES:
        return not target.startswith("orchestrator.") and target not in STAGES
    if importer.startswith("workers."):
        return not target.startswith("orchestrator.")
    if target.startswith("workers."):
        return target in ("workers.process", "workers.spec")
    return target not in WITH_TORCH


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_point_one_way(path: Path) -> None:
    wrong = {target for target in imported(path) if not allowed(module_of(path), target)}
    assert not wrong, f"{module_of(path)} may not import {sorted(wrong)}"


def test_only_the_assembly_knows_the_stages() -> None:
    knowing = {module_of(path) for path in FILES if imported(path) & STAGES}
    assert knowing == {"workers.assembly"}


def test_the_daemon_imports_no_torch() -> None:
    """Nor does the client, the command line, or what a worker runs before it knows its stage."""
    names = "orchestrator.cli, orchestrator.daemon, orchestrator.client, orchestrator.async_client, workers.output"
    code = f"import sys, {names}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_packages_are_empty_and_names_say_something() -> None:
    for path in FILES:
        assert path.stem not in {"utils", "common", "helpers", "manager"}, path
        if path.name == "__init__.py":
            assert path.read_text() == "", path


FORBIDDEN = {
    "a shell": r"shell\s*=\s*True|os\.system\(",
    "code from weights": r"weights_only\s*=\s*False|trust_remote_code\s*=\s*True",
    "pickle": r"\bpickle\.(loads?|dumps?)\(|recv_pyobj|send_pyobj",
    "wall-clock time": r"\btime\.time\(",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_is_nowhere_in_the_runtime(what: str) -> None:
    found = [path for path in FILES if re.search(FORBIDDEN[what], path.read_text(encoding="utf-8"))]
    assert not found


def test_the_repository_speaks_of_no_machine() -> None:
    """No path of one machine in any text."""
    pattern = re.compile("/" + "work/|/" + "root/|/" + "home/")
    found = [path for path in TEXTS if pattern.search(path.read_text(encoding="utf-8"))]
    assert not found
