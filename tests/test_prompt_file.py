"""Prompt files: LongLive's format is read as LongLive reads it, and each mistake names its line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import StreamConfig
from ipc.errors import InputError
from orchestrator.plan import ScheduledPrompt
from orchestrator.prompt_file import read_prompts, schedule

STREAM = StreamConfig()


def _file(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_line_of_the_interactive_format_is_one_video(tmp_path: Path) -> None:
    path = _file(tmp_path, {"prompts": ["a", "b"]}, {"prompts": ["c", "d", "e"]})
    assert read_prompts(path) == ("a", "b")
    assert read_prompts(path, 2) == ("c", "d", "e")


def test_single_prompts_are_one_video_of_all_lines(tmp_path: Path) -> None:
    path = _file(tmp_path, {"prompt": "a"}, "", {"prompt": "b", "note": "other keys are left alone"}, "")
    assert read_prompts(path) == ("a", "b")
    assert read_prompts(path, 3) == ("b",)


def test_files_from_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes('\ufeff{"prompts": ["ein Fuchs\u2028", "狐"]}\r\n'.encode())
    assert read_prompts(path) == ("ein Fuchs\u2028", "狐")


def test_lines_after_the_one_that_is_used_are_not_read(tmp_path: Path) -> None:
    path = _file(tmp_path, {"prompts": ["a"]}, "not json", "not json either")
    assert read_prompts(path) == ("a",)
    with pytest.raises(InputError, match="line 3: not JSON"):
        read_prompts(path, 3)


MISTAKES: dict[str, tuple[list[object], str]] = {
    "empty": ([""], "found no prompts"),
    "blank": (["", "  ", ""], "found no prompts"),
    "not json": (["a fox"], "line 1: not JSON: Expecting value at column 1"),
    "cut off": (['{"prompts": ["a"'], "line 1: not JSON"),
    "deep": (["[" * 100_000], "line 1: not JSON"),
    "long number": (['{"prompt": ' + "9" * 5000 + "}"], "line 1: not JSON"),
    "no object": (["[1]"], 'either "prompts" or "prompt"'),
    "no key": ([{"text": "a"}], 'either "prompts" or "prompt"'),
    "both keys": ([{"prompt": "a", "prompts": ["b"]}], 'either "prompts" or "prompt"'),
    "second line": ([{"prompt": "a"}, {"text": "b"}], "line 2: expected"),
    "mixed": ([{"prompt": "a"}, {"prompts": ["b"]}], "line 2: found"),
    "no list": ([{"prompts": "a"}], "prompts: found str, expected a list"),
    "empty list": ([{"prompts": []}], "found an empty list"),
    "no text": ([{"prompts": ["a", 3]}], "line 1: prompt 2: found int, expected a text"),
    "null": ([{"prompt": None}], "line 1: prompt: found NoneType"),
    "blank prompt": ([{"prompts": ["a", " "]}], "line 1: prompt 2: found no text"),
    "nul": ([{"prompts": ["a\0"]}], "NUL"),
    "surrogate": (['{"prompts": ["\\ud800"]}'], "surrogate"),
    "long": ([{"prompt": "x" * 20_001}], "20001 characters"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_place(case: str, tmp_path: Path) -> None:
    lines, words = MISTAKES[case]
    path = _file(tmp_path, *lines)
    with pytest.raises(InputError) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="Is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(tmp_path / "binary")
    with pytest.raises(InputError, match="asked for line 3"):
        read_prompts(_file(tmp_path, {"prompts": ["a"]}, ""), 3)
    with pytest.raises(InputError, match="nothing in line 2"):
        read_prompts(_file(tmp_path, {"prompts": ["a"]}, ""), 2)


def _blocks(prompts: int, switch_frames: list[int] | None, blocks: int) -> list[int | None]:
    return [scheduled.at for scheduled in schedule(["x"] * prompts, switch_frames, blocks, STREAM)]


def test_a_switch_takes_effect_with_the_first_block_that_starts_there_or_later() -> None:
    """LongLive's example, 240 latent frames: blocks start at 0, 3, 6, ..., 42 is the first from 40 on."""
    assert _blocks(6, [40, 80, 120, 160, 200], 80) == [0, 14, 27, 40, 54, 67]
    assert _blocks(2, [3], 2) == [0, 1]
    assert _blocks(2, [1], 2) == [0, 1]
    assert _blocks(1, [], 1) == [0]


def test_prompts_keep_their_texts() -> None:
    assert schedule(["a", "b"], [6], 4, STREAM) == (ScheduledPrompt("a", 0), ScheduledPrompt("b", 2))


@given(st.integers(1, 50), st.integers(0, 300))
def test_without_switch_frames_every_prompt_gets_a_fair_share(prompts: int, more: int) -> None:
    starts = _blocks(prompts, None, prompts + more)
    ends = [*starts[1:], prompts + more]
    shares = [end - start for start, end in zip(starts, ends, strict=True) if start is not None and end is not None]
    assert starts[0] == 0 and min(shares) >= 1 and max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("prompts", "switch_frames", "blocks", "words"),
    [
        (3, [40], 80, "3 prompts need 2 switch frames"),
        (1, [40], 80, "1 prompts need 0 switch frames"),
        (2, [], 80, "2 prompts need 1 switch frames"),
        (2, [0], 80, "begins block 0, where another prompt begins"),
        (3, [40, 41], 80, "begins block 14, where another prompt begins"),
        (3, [80, 40], 80, "must rise, found 80 before 40"),
        (3, [40, 40], 80, "must rise"),
        (2, [240], 80, "past the last block 79"),
        (2, [238], 80, "past the last block 79"),
        (5, None, 4, "need at least 5 blocks, found 4"),
        (1001, None, 2000, "at most 1000"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(
    prompts: int, switch_frames: list[int] | None, blocks: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        _blocks(prompts, switch_frames, blocks)
