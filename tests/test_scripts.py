"""The shell scripts: they parse, say how they are used, and pass on only what the command line takes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from configs.load import load_config, preset_names
from orchestrator.cli import app

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = REPOSITORY / "scripts"
SHELL = sorted(p for p in SCRIPTS.iterdir() if p.is_file() and p.read_bytes().startswith(b"#!/usr/bin/env bash"))
BENCHMARKS, SETUP = SCRIPTS / "run_benchmarks.sh", SCRIPTS / "setup_h100.sh"
RECORDER = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["SEEN"], "a") as seen:
    seen.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(sys.argv[1] == "quality")
"""
"""Stands for `orchestrator`; as quality's gate it refuses."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script, where setting up does nothing and the command line is written down."""
    root = tmp_path / "checkout"
    for place in ("scripts", ".venv/bin"):
        (root / place).mkdir(parents=True)
    shutil.copy(BENCHMARKS, root / "scripts")
    for name, text in (("scripts/setup", "#!/bin/sh\n"), (".venv/bin/orchestrator", RECORDER)):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    return root


def benchmarks(checkout: Path, *arguments: str) -> tuple[int, str, list[list[str]]]:
    """Exit code, what it says, and the command lines that it ran."""
    seen = checkout / "seen"
    done = subprocess.run(
        [checkout / "scripts" / BENCHMARKS.name, *arguments],
        cwd=checkout,
        env={**os.environ, "SEEN": str(seen)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = seen.read_text().splitlines() if seen.exists() else []
    return done.returncode, done.stderr, [json.loads(line) for line in lines]


def parsed(line: list[str]) -> dict[str, Any]:
    """What the command line makes of the words, by the command's own names; raises what a person would be told."""
    command, words = typer.main.get_command(app), list(line)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    values: dict[str, Any] = command.make_context(line[0], words).params
    return values


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", [BENCHMARKS, SETUP], ids=lambda path: path.name)
def test_help_names_every_option_and_touches_nothing(script: Path, tmp_path: Path) -> None:
    """Run where there is nothing to set up."""
    (tmp_path / "scripts").mkdir()
    done = subprocess.run(
        [shutil.copy(script, tmp_path / "scripts"), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    cases = re.findall(r"^ +(--[a-z-]+(?: \| --?[a-z-]+)*)\)", script.read_text(), flags=re.MULTILINE)
    options = {word for case in cases for word in case.split(" | ") if word != "-h"}
    assert len(options) >= 4
    assert all(re.search(rf"^  {option}\b", done.stdout, flags=re.MULTILINE) for option in options)
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize("config", ["pocket", "longlive-1.3b"])
@pytest.mark.parametrize("quick", [(), ("--quick",)], ids=["full", "quick"])
def test_every_part_is_a_command_line_that_is_taken(checkout: Path, config: str, quick: tuple[str, ...]) -> None:
    parts = ("all", "quality", "reference", "compare", "roofline")
    only = [word for part in parts for word in ("--only", part)]
    given = ("--config", config, "--set", "seed=3", *only, "--out", "results")
    code, said, lines = benchmarks(checkout, *quick, *given)
    values = [parsed(line) for line in lines]
    assert [line[:2] for line in lines] == [["bench", "all"], ["quality", config], *(["bench", p] for p in parts[2:])]
    assert [v["out"] for v in values] == [Path("results", part) for part in parts]
    assert all(v.get("quick", True) is bool(quick) for v in values if "quick" in v)
    for v in values:
        settings = v["overrides"] if "overrides" in v else v["both"]
        assert settings[-1] == "seed=3"
        assert load_config(config, settings).model.random_weights is (config != "pocket")
    assert code == 1 and said.endswith("failed: quality\n"), "the gate refused, and the parts after it were run"


def test_all_presets_are_compared(checkout: Path) -> None:
    code, _, lines = benchmarks(checkout, "--only", "compare")
    assert code == 0 and sorted(parsed(lines[0])["sides"]) == sorted(preset_names())
    _, _, lines = benchmarks(checkout, "--only", "quality")
    quality = parsed(lines[-1])
    named = [quality["preset_a"], *(side.removeprefix("preset=") for side in quality["b"])]
    assert sorted(named) == sorted(preset_names())


def test_weights_are_named_instead_of_drawn(checkout: Path) -> None:
    (checkout / "weights").mkdir()
    _, _, lines = benchmarks(checkout, "--config", "longlive-1.3b", "--model-path", "weights", "--only", "roofline")
    model = load_config("longlive-1.3b", parsed(lines[0])["overrides"]).model
    assert (model.path, model.random_weights) == (checkout / "weights", False)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--fast",), "found --fast"),
        (("--config",), "--config: found nothing"),
        (("--only", "everything"), "--only: found everything"),
        (("--model-path", "nowhere"), "--model-path: nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(checkout: Path, arguments: tuple[str, ...], found: str) -> None:
    code, said, lines = benchmarks(checkout, *arguments)
    assert (code, lines, len(said.splitlines())) == (2, [], 1)
    assert said.startswith(f"run_benchmarks: {found}")


def test_setup_without_a_driver_is_one_line(tmp_path: Path) -> None:
    """Before it makes or installs anything."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    done = subprocess.run(
        [tools / "bash", SETUP], env={"PATH": str(tools)}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "setup_h100: nvidia-smi: not found, expected NVIDIA's driver; install it\n"


def test_the_tests_that_setup_runs_are_there() -> None:
    named = re.findall(r"^ +(tests/test_\w+\.py)::(\w+)$", SETUP.read_text(), flags=re.MULTILINE)
    assert len(named) >= 5
    for path, test in named:
        assert re.search(rf"^def {test}\(", (REPOSITORY / path).read_text(), flags=re.MULTILINE), test


def test_what_setup_tells_to_type_is_taken() -> None:
    text = SETUP.read_text()
    (start,) = re.findall(r"^  \.venv/bin/orchestrator (start .*)$", text, flags=re.MULTILINE)
    values = parsed(start.split())
    assert load_config(values["config"], values["overrides"]).name == "longlive-1.3b"
    told = re.findall(r"run_benchmarks\.sh ([^(\n]*)", text)
    known = set(re.findall(r"--[a-z-]+", BENCHMARKS.read_text()))
    assert len(told) == 2 and all(set(re.findall(r"--[a-z-]+", line)) <= known for line in told)


def test_setup_builds_the_flash_attn_that_the_project_names() -> None:
    found = re.search(r"'(flash-attn\S+)'", SETUP.read_text())
    assert found is not None and f'"{found[1]}"' in (REPOSITORY / "pyproject.toml").read_text()
