"""Prompts as people give them: one text, or a file of several and the latent frames at which they change.

Files have the format of LongLive's interactive inference: JSON lines of `{"prompts": ["..."]}`, one video a line.
Lines of `{"prompt": "..."}` are taken as well, one prompt a line. Knows no tokenizer and no daemon.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.schema import StreamConfig
from ipc.errors import InputError, Refused
from orchestrator.plan import ScheduledPrompt
from orchestrator.session import MAX_PENDING, check_text


def checked_prompt(text: str, where: str) -> str:
    """The text, if it can be a prompt. Raises InputError that begins with `where`."""
    try:
        check_text(text)
    except Refused as error:
        raise InputError(f"{where}: {str(error).removeprefix('prompt: ')}") from error
    return text


def read_prompts(path: Path, line: int | None = None) -> tuple[str, ...]:
    """The prompts of one video.

    Args:
        path: a JSON lines file.
        line: which line to use, counted from 1. None: the first with `prompts`, or all lines where they have `prompt`.

    Raises:
        InputError: what, in which line, found, expected.
    """
    entries = dict(_entries(path, line))
    if not entries:
        found = "no prompts" if line is None else f"nothing in line {line}"
        raise InputError(f'{path}: found {found}, expected {{"prompts": ["...", "..."]}}')
    first, entry = next(iter(entries.items()))
    if "prompts" in entry:
        return _list_of_prompts(entry["prompts"], f"{path}: line {first}")
    return tuple(_single_prompt(entry, f"{path}: line {number}") for number, entry in entries.items())


def read_stories(path: Path) -> tuple[tuple[str, ...], ...]:
    """The prompts of every line, each a video of its own. Raises InputError as `read_prompts`."""
    numbers = [number for number, text in enumerate(_lines(path), start=1) if text.strip()]
    if not numbers:
        raise InputError(f'{path}: found no prompts, expected {{"prompts": ["...", "..."]}} in every line')
    return tuple(read_prompts(path, number) for number in numbers)


def schedule(
    prompts: Sequence[str], switch_frames: Sequence[int] | None, blocks: int, stream: StreamConfig
) -> tuple[ScheduledPrompt, ...]:
    """Which prompt takes effect at which block.

    Args:
        switch_frames: for every prompt but the first the latent frame from which it is wanted; it takes effect with
            the first block that starts there or later (LongLive v1.0, interactive inference). None spreads the prompts
            evenly over the blocks.
        blocks: length of the stream.

    Raises:
        InputError: not one number for every switch, out of order, two in one block, past the end, or too many.
    """
    if len(prompts) > MAX_PENDING:
        raise InputError(f"{len(prompts)} prompts, at most {MAX_PENDING} are taken")
    if switch_frames is None:
        if len(prompts) > blocks:
            raise InputError(f"{len(prompts)} prompts need at least {len(prompts)} blocks, found {blocks}")
        starts = [index * blocks // len(prompts) for index in range(len(prompts))]
    else:
        starts = _switch_blocks(len(prompts), switch_frames, stream)
        if starts[-1] >= blocks:
            raise InputError(
                f"switch frame {switch_frames[-1]} begins block {starts[-1]}, past the last block {blocks - 1};"
                " make the video longer or switch earlier"
            )
    return tuple(ScheduledPrompt(text, at) for text, at in zip(prompts, starts, strict=True))


def _switch_blocks(prompts: int, switch_frames: Sequence[int], stream: StreamConfig) -> list[int]:
    if len(switch_frames) != prompts - 1:
        raise InputError(
            f"{prompts} prompts need {prompts - 1} switch frames, one for each change; found {len(switch_frames)}"
        )
    starts = [0]
    for index, frame in enumerate(switch_frames):
        start = math.ceil(frame / stream.frames_per_block)
        if index and frame <= switch_frames[index - 1]:
            raise InputError(f"switch frames must rise, found {switch_frames[index - 1]} before {frame}")
        if start <= starts[-1]:
            raise InputError(
                f"switch frame {frame} begins block {start}, where another prompt begins already;"
                f" a block has {stream.frames_per_block} latent frames"
            )
        starts.append(start)
    return starts


def _entries(path: Path, wanted: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects: the wanted line, or the lines up to the first with `prompts`."""
    lines = _lines(path)
    if wanted is not None and not 1 <= wanted <= len(lines):
        raise InputError(f"{path}: found {len(lines)} lines, asked for line {wanted}")
    for number, text in enumerate(lines, start=1):
        if wanted not in (None, number) or not text.strip():
            continue
        entry = _entry(text, f"{path}: line {number}")
        yield number, entry
        if "prompts" in entry:
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8, expected JSON lines") from error


def _entry(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(value, dict) or len({"prompt", "prompts"} & set(value)) != 1:
        raise InputError(f'{where}: expected an object with either "prompts" or "prompt"')
    return value


def _list_of_prompts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise InputError(f"{where}: prompts: found {found}, expected a list of texts")
    return tuple(_text(text, f"{where}: prompt {index}") for index, text in enumerate(value, start=1))


def _single_prompt(entry: dict[str, Any], where: str) -> str:
    if "prompt" not in entry:
        raise InputError(f'{where}: found "prompts" after lines with "prompt"; use one kind, or choose with --line')
    return _text(entry["prompt"], f"{where}: prompt")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: found {type(value).__name__}, expected a text")
    return checked_prompt(value, where)
