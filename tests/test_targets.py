"""Outputs are told from one word; what is no output never reaches ffmpeg."""

import os
from pathlib import Path

import pytest

from configs.targets import check_target, next_free, parse_target
from ipc.errors import ConfigError


def test_the_three_kinds(tmp_path: Path) -> None:
    file = parse_target(f"{tmp_path}/a.mp4")
    assert (file.kind, file.path) == ("file", tmp_path / "a.mp4")
    assert parse_target("null:").kind == "null"
    assert parse_target("rtmp://host:1935/live/key").kind == "rtmp"
    assert parse_target("rtmps://[::1]/live/key").kind == "rtmp"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-y",
        "-y.mp4",
        "a.mkv",
        "a",
        "file:a.mp4",
        "tee:a.mp4",
        "concat:a.mp4|b.mp4",
        "unix:/a.mp4",
        "http://host/a.mp4",
        "pipe:1",
        "null",
        "a\n.mp4",
        "a\0.mp4",
        "rtmp://",
        "rtmp://host",
        "rtmp://host:99999/live/key",
        "rtmp://h/a -f null x",
        "rtmp://h/a|[f=flv]b",
        "rtmp://h/a'b",
    ],
)
def test_all_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="expected") as caught:
        parse_target(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtmp://host/live/secret", "rtmp://host/live/***"),
        ("rtmp://user:secret@host:1935/live/secret?auth=secret", "rtmp://host:1935/live/***"),
        ("rtmp://host/live?key=secret", "rtmp://host/live/***"),
    ],
)
def test_keys_are_never_shown(text: str, shown: str) -> None:
    assert parse_target(text).redacted == shown
    with pytest.raises(ConfigError) as caught:
        parse_target(text + " secret")
    assert "secret" not in str(caught.value)


def test_the_folder_is_made(tmp_path: Path) -> None:
    check_target(parse_target(f"{tmp_path}/new/deep/a.mp4"))
    assert (tmp_path / "new" / "deep").is_dir()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        check_target(parse_target(f"{tmp_path}/file/a.mp4"))
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ConfigError, match="found a directory"):
        check_target(parse_target(f"{tmp_path}/a.mp4"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_access_is_said(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="not writable"):
        check_target(parse_target(f"{tmp_path}/locked/a.mp4"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert next_free(path) == path
    path.write_text("")
    assert next_free(path) == tmp_path / "a-1.mp4"
    (tmp_path / "a-1.mp4").write_text("")
    assert next_free(path) == tmp_path / "a-2.mp4"


def test_a_name_that_no_file_can_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long"):
        check_target(parse_target(f"{tmp_path}/{'x' * 300}.mp4"))
    with pytest.raises(ConfigError, match="no home folder"):
        parse_target("~nobody-9/a.mp4")


def test_a_key_is_not_shown_by_itself_either() -> None:
    target = parse_target("rtmp://host/live/topsecret?auth=1")
    line = "error: topsecret is no stream; rtmp://host/live/topsecret?auth=1 refused topsecret?auth=1"
    assert target.redact(line) == "error: *** is no stream; rtmp://host/live/*** refused ***"
