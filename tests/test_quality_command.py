"""`orchestrator quality`: what a person types becomes the right job, mistakes are one line, and a small run works."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command
from tiny_files import TINY

from orchestrator import quality
from orchestrator.cli import main
from workers.quality.job import Job
from workers.quality.report import Report

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """Jobs that would have been run."""
    found: list[Job] = []

    def compare(job: Job) -> int:
        found.append(job)
        return 0

    monkeypatch.setattr(quality, "compare", compare)
    monkeypatch.chdir(tmp_path)
    return found


def settings(job: Job) -> list[tuple[str, str, str]]:
    """Name, preset and three settings of every B."""
    return [
        (b.name, b.config.preset or "-", f"{b.config.execution.kv} {b.config.stream.recache} {b.config.stream.sink}")
        for b in job.against
    ]


def test_one_option_by_flags(jobs: list[Job]) -> None:
    assert main(["quality", "pocket", "pocket", "--set-b", "execution.kv=int8", "--preset-b", "balanced"]) == 0
    assert settings(jobs[0]) == [("pocket preset=balanced execution.kv=int8", "balanced", "int8 full 3")]
    assert jobs[0].a.config.execution.kv == "model"
    assert jobs[0].out.is_dir() and jobs[0].out.name == "quality"


def test_several_options_and_what_all_share(jobs: list[Job]) -> None:
    """A change alone is a change of A; a name begins anew, but for what `--set` says of all."""
    main(
        [
            "quality",
            "pocket stream.recache=none",
            "execution.kv=int8",
            "preset=speed",
            "pocket",
            "--set",
            "stream.sink=6",
        ]
    )
    assert settings(jobs[0]) == [
        ("execution.kv=int8", "-", "int8 none 6"),
        ("preset=speed", "speed", "model none 6"),
        ("pocket", "-", "model full 6"),
    ]
    assert jobs[0].a.config.stream.recache == "none"


def test_own_stories_are_a_video_a_line(jobs: list[Job]) -> None:
    Path("own.jsonl").write_text('{"prompts": ["a", "b"]}\n\n{"prompt": "c"}\n')
    main(["quality", "pocket", "pocket", "--prompts", "own.jsonl", "--blocks", "4", "--seed", "7"])
    found = [(story.seed, [(scene.text, scene.block) for scene in story.prompts]) for story in jobs[0].stories]
    assert found == [(7, [("a", 0), ("b", 2)]), (8, [("c", 0)])]


def test_our_stories_have_switches(jobs: list[Job]) -> None:
    main(["quality", "pocket", "pocket"])
    assert [len(story.prompts) for story in jobs[0].stories] == [1, 2, 2, 2]
    assert jobs[0].stories[1].prompts[1].block == 5


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no B": (["pocket"], ["argument", "B"]),
    "unknown A": (["pockt", "pocket"], ["did you mean pocket?"]),
    "unknown B": (["pocket", "pockt"], ["did you mean pocket?"]),
    "A without a name": (["execution.kv=int8", "pocket"], ["A: found 'execution.kv=int8'", "such as pocket"]),
    "two names": (["pocket", "pocket pocket"], ["a shipped name or a file, then KEY=VALUE"]),
    "open quote": (["pocket", 'pocket "x'], ["open quote"]),
    "unknown key": (["pocket", "execution.kw=int8"], ["unknown key execution.kw"]),
    "preset": (["pocket", "pocket", "--preset-b", "sped"], ["did you mean speed?"]),
    "size": (["pocket", "video.height=64"], ["video.height: found 64, expected 96 as in A: pocket"]),
    "block": (
        ["pocket", "stream.frames_per_block=1"],
        ["stream.frames_per_block: found 1, expected 3 as in A: pocket"],
    ),
    "no weights": (["pocket", "longlive-1.3b"], ["model.path"]),
    "positions": (["pocket", "stream.rope=absolute", "--blocks", "342"], ["342 blocks", "at most 341"]),
    "blocks": (["pocket", "pocket", "--blocks", "0"], ["--blocks"]),
    "one block": (["pocket", "pocket", "--blocks", "1"], ["2 prompts need at least 2 blocks"]),
    "gate": (["pocket", "pocket", "--gate", "both"], ["--gate", "both"]),
    "decibels": (["pocket", "pocket", "--max-worst-block-db", "-1"], ["--max-worst-block-db"]),
    "no file": (["pocket", "pocket", "--prompts", "gone.jsonl"], ["gone.jsonl", "No such file"]),
    "empty file": (["pocket", "pocket", "--prompts", "empty.jsonl"], ["empty.jsonl", "found no prompts"]),
    "wrong line": (["pocket", "pocket", "--prompts", "wrong.jsonl"], ["wrong.jsonl: line 2", "not JSON"]),
    "out": (["pocket", "pocket", "--out", "empty.jsonl"], ["--out", "no folder can be made"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = WRONG[case]
    Path("empty.jsonl").write_text("\n")
    Path("wrong.jsonl").write_text('{"prompt": "a"}\n{\n')
    assert main(["quality", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert [word for word in words if word not in errors] == []
    assert jobs == []


def test_the_smallest_run(tmp_path: Path) -> None:
    """Other weights fail the gate, the plain way passes it: exit code 1, and the line names the one that failed."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompts": ["a red circle", "a blue square"]}) + "\n", encoding="utf-8")
    small = [part for setting in (*TINY, "video.height=32", "video.width=32") for part in ("--set", setting)]
    done = Command(tmp_path / "run").run(
        *("quality", "pocket", "execution.denoiser=plain", "model.random_weights_seed=1"),
        *("--blocks", 2, "--prompts", prompts, "--out", tmp_path / "out", *small),
    )
    assert done.returncode == 1, done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and failed[0].startswith("failed: model.random_weights_seed=1: teacher-forced, story 0")
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [one.passed for one in report.against] == [True, False]
    written = {"report.json", *(file for one in report.against for file in one.files)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    assert [line for line in report.not_measured if line not in " ".join(done.stdout.split("\n"))] == []
    assert "judge: not measured" in done.stdout
