"""From what a person typed to a checked configuration and a plan, before any process starts.

Knows the options' meaning, not the command line that carries them.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.load import check_model_files, load_config
from configs.schema import RuntimeConfig
from configs.targets import check_target, parse_target
from ipc.errors import InputError
from orchestrator.options import expanded
from orchestrator.plan import RunPlan, ScheduledPrompt
from orchestrator.prompt_file import checked_prompt, read_prompts, schedule

SECONDS_A_PROMPT = 10.0
"""What `generate` gives each prompt where nobody says a length; LongLive's example changes every 40 latent frames."""
MOST_FRAMES = 2**53


@dataclass(frozen=True)
class RunOptions:
    """What `start` and `generate` have in common; None leaves a setting to the configuration."""

    config: str
    overrides: Sequence[str] = ()
    prompt: str | None = None
    seed: int | None = None
    out: Sequence[str] = ()
    pace: Literal["live", "free"] | None = None
    ffmpeg: Path | None = None


@dataclass(frozen=True)
class Length:
    """How long a run is; both None is without an end."""

    frames: int | None = None
    blocks: int | None = None


def prepare_config(options: RunOptions) -> RuntimeConfig:
    """The configuration with the options applied; everything it names is there. Raises UserError."""
    config = load_config(options.config, options.overrides)
    output = {
        "out": tuple(options.out) or config.output.out,
        "pace": options.pace or config.output.pace,
        "ffmpeg": _executable(options.ffmpeg or config.output.ffmpeg),
    }
    prompt = config.prompt if options.prompt is None else options.prompt
    config = config.model_copy(
        update={
            "prompt": checked_prompt(prompt, "prompt"),
            "seed": config.seed if options.seed is None else options.seed,
            "output": config.output.model_copy(update=output),
        }
    )
    check_model_files(config)
    for target in [parse_target(text) for text in config.output.out]:
        check_target(target)
    return config


def live_plan(config: RuntimeConfig, seconds: float | None, log: Path | None) -> RunPlan:
    """The plan of `start`: one prompt, clients steer from there. Raises InputError."""
    length = checked_length(config, seconds, None)
    if length == Length():
        length = Length(blocks=config.stream.most_blocks)
    return RunPlan(
        prompts=(ScheduledPrompt(config.prompt, 0),),
        frames=length.frames,
        blocks=length.blocks,
        inputs=None,
        dump_latents=None,
        live=True,
        log=_writable(log, "--log"),
    )


def file_plan(
    config: RuntimeConfig,
    prompts: Sequence[str],
    switch_frames: Sequence[int] | None,
    length: Length,
    inputs: Path | None = None,
    dump_latents: Path | None = None,
) -> RunPlan:
    """The plan of `generate`: prompts at their blocks, then the end. Raises InputError."""
    if length == Length():
        length = _default_length(config, len(prompts), switch_frames)
    blocks = _blocks(config, length)
    if inputs is not None and not inputs.is_file():
        raise InputError(f"--inputs {inputs}: no such file")
    return RunPlan(
        prompts=schedule(prompts, switch_frames, blocks, config.stream),
        frames=length.frames,
        blocks=length.blocks,
        inputs=None if inputs is None else inputs.absolute(),
        dump_latents=_writable(dump_latents, "--dump-latents"),
        live=False,
        log=None,
    )


def prompts_of(path: Path, line: int | None) -> tuple[str, ...]:
    """The prompts of a file; `~` is the home folder. Raises InputError."""
    return read_prompts(expanded(path, "--prompts"), line)


def parse_switch_frames(text: str | None) -> tuple[int, ...] | None:
    """Latent frames from text such as `40,80`. Raises InputError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        raise InputError(f"--switch-frames: found {text}, expected latent frame numbers such as 40,80")
    return tuple(int(part) for part in parts)


def checked_length(config: RuntimeConfig, seconds: float | None, blocks: int | None) -> Length:
    """The length asked for. Raises InputError: two lengths, no positive one, or one past the position table."""
    if seconds is not None and blocks is not None:
        raise InputError("found both --seconds and --blocks, expected one of them")
    if seconds is None:
        length = Length(blocks=blocks)
    else:
        most = MOST_FRAMES / config.video.fps
        if not math.isfinite(seconds) or not 0 < seconds <= most:
            raise InputError(f"--seconds: found {seconds:g}, expected a number above 0 and at most {most:g}")
        length = Length(frames=max(1, round(seconds * config.video.fps)))
    _blocks(config, length)
    return length


def _default_length(config: RuntimeConfig, prompts: int, switch_frames: Sequence[int] | None) -> Length:
    """Ten seconds a prompt, or ten seconds after the last given switch."""
    share = round(SECONDS_A_PROMPT * config.video.fps)
    if not switch_frames:
        return Length(frames=share * prompts)
    last = math.ceil(switch_frames[-1] / config.stream.frames_per_block)
    return Length(frames=config.stream.first_frame(last) + share)


def _blocks(config: RuntimeConfig, length: Length) -> int:
    """How many blocks a length needs, 0 for one without an end. Raises InputError where the positions run out."""
    blocks = length.blocks if length.blocks is not None else config.stream.blocks_for_frames(length.frames or 0)
    most = config.stream.most_blocks
    if most is not None and blocks > most:
        seconds = config.stream.first_frame(most) / config.video.fps
        raise InputError(
            f"{blocks} blocks asked for, with stream.rope absolute a stream has at most {most} ({seconds:g} s);"
            " shorten it, or pass --set stream.rope=relative"
        )
    return blocks


def _executable(path: Path | None) -> Path | None:
    if path is None:
        return None
    found = shutil.which(expanded(path, "ffmpeg"))
    if found is None:
        raise InputError(f"ffmpeg {path}: found no executable file there, expected the ffmpeg program")
    return Path(found).absolute()


def _writable(path: Path | None, option: str) -> Path | None:
    """The absolute path of a file that can be written. Raises InputError."""
    if path is None:
        return None
    path = expanded(path, option)
    if path.is_dir():
        raise InputError(f"{option} {path}: found a folder, expected a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: its folder does not exist")
    return path.absolute()
