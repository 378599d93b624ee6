"""`orchestrator quality`: one configuration's videos against those of others, with a gate for CI.

From what a person typed to a checked job; another process compares, for which this one needs no torch. Knows no figure.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.load import check_model_files, load_config, preset_names
from configs.schema import RuntimeConfig
from ipc.errors import ConfigError, InputError, LongLiveError
from orchestrator.checkout import SCRIPTS, with_sources
from orchestrator.options import expanded, settings_of, writable_folder
from orchestrator.prepare import checked_length
from orchestrator.prompt_file import read_stories, schedule
from workers.quality.job import Gate, Job, Judged, Option, Scene, Story

STORIES = (
    ("a red circle moving right",),
    ("two yellow squares hopping on a checkered background", "two blue squares hopping on a checkered background"),
    ("a large blue star circling", "a large green star circling"),
    ("a white ring moving down on a dark red background", "a white ring moving down on a dark blue background"),
)
"""What is compared where nobody names a file: what the embedded model can show, three of four with a switch."""

Settings = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change one key of A alone, or of every B. Repeatable.")
]
Preset = Annotated[
    str | None, typer.Option(metavar="PRESET", help=f"{', '.join(preset_names())}; changes come on top.")
]


def quality(
    a: Annotated[
        str, typer.Argument(metavar="A", help="What the others are compared with: a shipped name or a YAML file.")
    ],
    b: Annotated[
        list[str],
        typer.Argument(
            metavar="B...", help='The same, or "NAME KEY=VALUE ..."; KEY=VALUE alone is A with that change. Several.'
        ),
    ],
    both: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of A and of every B.")
    ] = None,
    set_a: Settings = None,
    set_b: Settings = None,
    preset_a: Preset = None,
    preset_b: Preset = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines, a video each: {"prompts": ["...", "..."]}; else four of ours.')
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Length of every video; prompts are spread over it.")] = 10,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="Of the first video; the next has the next. Else A's.")
    ] = None,
    least_db: Annotated[
        float, typer.Option("--max-worst-block-db", min=0, help="What the worst block has to reach, PSNR in dB.")
    ] = 30.0,
    gate: Annotated[
        Literal["teacher-forced", "free-running"], typer.Option(help="Which of the two has to reach it.")
    ] = "teacher-forced",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.json and the pictures.")] = Path(
        "out/quality"
    ),
) -> None:
    """Compare videos of two or more configurations: same prompts, same noise.

    Teacher-forced, B makes each block from A's past and noise. Free-running, each goes its own way.

    Exit code 0: the worst block of every B reaches the gate. 1: one does not.

    [b]Examples[/]

    orchestrator quality pocket pocket --set-b execution.kv=int8

    orchestrator quality pocket execution.kv=int8 preset=speed "execution.linears=fp8 stream.recache=recent(6)"
    """
    reference = _side(a, None)
    of_a = (*reference.settings, *settings_of(set_a, {"preset": preset_a}))
    first = _option(Side(reference.config, of_a), both or (), _name(a, settings_of(set_a, {"preset": preset_a})))
    options = []
    for text in b:
        side = _side(text, Side(reference.config, of_a))
        own = settings_of(set_b, {"preset": preset_b})
        options.append(_option(Side(side.config, (*side.settings, *own)), both or (), _name(text, own)))
    for option in options:
        _check_alike(first, option)
    for option in (first, *options):
        checked_length(option.config, None, blocks)
    texts = STORIES if prompts is None else read_stories(expanded(prompts, "--prompts"))
    judges: Judged = "teacher_forced" if gate == "teacher-forced" else "free_running"
    job = Job(
        a=first,
        against=tuple(options),
        stories=_stories(texts, first.config, first.config.seed if seed is None else seed, blocks),
        blocks=blocks,
        gate=Gate(least_db=least_db, judges=judges),
        out=writable_folder(out, "--out"),
    )
    code = compare(job)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True)
class Side:
    """A configuration as it is typed: its name or file, and changes."""

    config: str
    settings: tuple[str, ...]


def compare(job: Job) -> int:
    """Runs the process that compares; its exit code. Raises LongLiveError if it was ended from outside.

    The embedded model's judge is found beside the sources, if they are there. Nothing may be downloaded.
    """
    environment = {**with_sources([SCRIPTS]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "workers.quality.run"]
    code = subprocess.run(command, input=job.model_dump_json(), env=environment, text=True, check=False).returncode
    if code < 0:
        raise LongLiveError(f"the process that compares was ended by signal {-code}")
    return code


def _side(text: str, a: Side | None) -> Side:
    """What A or a B says; changes alone are changes of A. Raises InputError."""
    if Path(text).is_file():
        return Side(text, ())
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{text!r}: found an open quote, expected NAME KEY=VALUE ...") from error
    names = [word for word in words if "=" not in word]
    if len(names) > 1 or not words or (names and words[0] != names[0]):
        raise InputError(f"{text!r}: expected a shipped name or a file, then KEY=VALUE ..., in quotes")
    if names:
        return Side(names[0], tuple(words[1:]))
    if a is None:
        raise InputError(f"A: found {text!r}, expected a shipped name such as pocket, or a YAML file, before changes")
    return Side(a.config, (*a.settings, *words))


def _name(text: str, settings: Sequence[str]) -> str:
    return " ".join((text.strip(), *settings))


def _option(side: Side, both: Sequence[str], name: str) -> Option:
    """Raises ConfigError."""
    config = load_config(side.config, [*both, *side.settings])
    check_model_files(config)
    return Option(name=name, config=config)


def _check_alike(a: Option, b: Option) -> None:
    """Blocks and frames are compared one by one. Raises ConfigError."""
    for key, one, other in (
        ("video.height", a.config.video.height, b.config.video.height),
        ("video.width", a.config.video.width, b.config.video.width),
        ("video.fps", a.config.video.fps, b.config.video.fps),
        ("stream.frames_per_block", a.config.stream.frames_per_block, b.config.stream.frames_per_block),
    ):
        if one != other:
            raise ConfigError(f"{b.name}: {key}: found {other}, expected {one} as in A: {a.name}")


def _stories(texts: Sequence[Sequence[str]], config: RuntimeConfig, seed: int, blocks: int) -> tuple[Story, ...]:
    """Each with a seed of its own and its prompts evenly spread. Raises InputError."""
    stories = []
    for number, prompts in enumerate(texts):
        scheduled = schedule(prompts, None, blocks, config.stream)
        scenes = [Scene(text=prompt.text, block=prompt.at) for prompt in scheduled if prompt.at is not None]
        stories.append(Story(seed=seed + number, prompts=tuple(scenes)))
    return tuple(stories)
