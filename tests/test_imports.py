"""Imports go one way, the daemon stays free of torch, and no file does what the project never does."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "ipc", "workers", "orchestrator")
STAGES = {f"workers.{name}" for name in ("text_encoder", "denoiser", "vae_decoder", "output")}
WITH_TORCH = {"ipc.tensor_ring", "ipc.cuda_ipc"}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
SOURCES = [*MODULES.values(), *sorted((ROOT / "scripts").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: str) -> set[str]:
    """Our modules that a module imports anywhere in its text; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def reached(module: str) -> set[str]:
    """All our modules that a module imports, directly or through others."""
    seen: set[str] = set()
    new = {module}
    while new:
        seen |= new
        new = set().union(*(imports(name) for name in new if name in MODULES)) - seen
    return seen - {module}


def may_import(module: str, other: str) -> bool:
    """The arrows. `ipc.errors`, the error tree, imports nothing and is open to all."""
    if other == "ipc.errors":
        return True
    if module.startswith("configs"):
        return other.startswith("configs.")
    if module.startswith("ipc"):
        return other.startswith("ipc.")
    if module.startswith("workers.models"):
        return other.startswith(("configs.", "workers.models."))
    if module.startswith("workers"):
        return not other.startswith("orchestrator")
    # What the daemon spawns, and the plain data that goes to other processes.
    if other in {"workers.process", "workers.spec", "workers.quality.job"}:
        return True
    return other.startswith(("configs.", "ipc.", "orchestrator.")) and other not in WITH_TORCH


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert {other for other in imports(module) if not may_import(module, other)} == set()


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_never_knows_another(stage: str) -> None:
    """Not even through a module in between."""
    assert stage in MODULES
    assert reached(stage) & STAGES == set()


def test_the_error_tree_imports_nothing() -> None:
    assert imports("ipc.errors") == set()


@pytest.mark.parametrize("module", ["orchestrator.cli", "orchestrator.daemon", "workers.process", "ipc.channel"])
def test_the_daemon_loads_no_torch(module: str) -> None:
    """In a fresh interpreter, through whatever it imports: start-up, and a parent clean of CUDA for `spawn`."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_init_files_are_empty() -> None:
    found = {dotted(path) for path in MODULES.values() if path.name == "__init__.py" and path.read_bytes()}
    assert found == set()


def test_every_package_has_an_init_file() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert {folder.name for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_tests_are_no_package() -> None:
    """A `tests/ipc/__init__.py` would shadow the real `ipc`."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_file_is_named_after_nothing() -> None:
    assert {path.stem for path in SOURCES} & {"utils", "util", "common", "helpers", "helper", "manager"} == set()


def never(node: ast.AST) -> bool:
    """A shell, unpickling of weights, or objects pickled onto a socket."""
    if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
        return (node.arg, node.value.value) in {("shell", True), ("weights_only", False)}
    if isinstance(node, ast.Attribute):
        pickled = isinstance(node.value, ast.Name) and node.value.id == "pickle" and node.attr in {"load", "loads"}
        return pickled or node.attr in {"send_pyobj", "recv_pyobj"}
    return False


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_no_shell_and_no_pickle(path: Path) -> None:
    assert [f"{path.name}:{node.lineno}" for node in ast.walk(tree(path)) if never(node)] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("ipc", "orchestrator"))])
def test_what_talks_never_imports_pickle(module: str) -> None:
    names = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert names & {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"} == set()


def texts() -> list[Path]:
    """Every text file of the tree that is ours."""
    folders = (*PACKAGES, "scripts", "tests", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += ROOT.glob("*")
    endings = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".html", ".js", ".css", ""}
    return [path for path in files if path.is_file() and path.suffix in endings and "__pycache__" not in path.parts]


def test_no_path_of_one_machine() -> None:
    """A file that names where somebody's checkout lies works for nobody else."""
    private = re.compile(rb"(?<![\w.])/(?:work|root)(?:/|\b)")
    found = {str(path.relative_to(ROOT)) for path in texts() if private.search(path.read_bytes())}
    assert found == set()
