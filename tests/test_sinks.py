"""Outputs: every frame in the file, files that survive, streams that never block."""

import signal
import stat
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from command import alive, until
from rtmp_server import RtmpServer
from video_file import probe, read_frames

from configs.schema import OutputConfig, VideoConfig
from configs.targets import parse_target
from ipc.errors import InputError
from workers.ffmpeg import Ffmpeg, file_command, find_ffmpeg
from workers.sinks import FfmpegSink, Sink, open_sinks

VIDEO = VideoConfig(height=64, width=96)


@pytest.fixture(scope="module")
def ffmpeg() -> Path:
    return find_ffmpeg(None)


def picture(number: int) -> bytes:
    """A frame whose left part's brightness tells its number."""
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:, :48] = number * 5 % 250
    return frame.tobytes()


def sink_to(target: str, ffmpeg: Path, pace: str = "free") -> FfmpegSink:
    (sink,) = open_sinks([parse_target(target)], ffmpeg, OutputConfig(pace=pace), VIDEO)
    assert isinstance(sink, FfmpegSink)
    return sink


def write(sink: Sink, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        until(sink.has_room, 20)
        sink.offer(picture(number))


def finish(sink: Sink) -> None:
    sink.finish()
    until(lambda: sink.done, 30)


def test_a_file_holds_every_frame_in_order(ffmpeg: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    sink = sink_to(str(path), ffmpeg)
    write(sink, 50)
    finish(sink)
    info = probe(path)
    assert (info.codec, info.pixels, info.width, info.height, info.fps) == ("h264", "yuv420p", 96, 64, 16)
    assert info.frames == 50
    shown = read_frames(path)[:, 20:40, 10:30].mean((1, 2, 3))
    assert np.abs(shown - [number * 5 % 250 for number in range(50)]).max() < 12
    status = sink.status()
    assert (status.state, status.frames, status.dropped, status.segment) == ("closed", 50, 0, str(path))


def test_an_existing_file_is_kept(ffmpeg: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("mine")
    sink = sink_to(str(tmp_path / "a.mp4"), ffmpeg)
    write(sink, 3)
    finish(sink)
    assert (tmp_path / "a.mp4").read_text() == "mine"
    assert probe(tmp_path / "a-1.mp4").frames == 3


def ffmpeg_pid(sink: FfmpegSink) -> int:
    return sink._ffmpeg.pid


def test_a_killed_ffmpeg_leaves_a_playable_file_and_a_new_segment(ffmpeg: Path, tmp_path: Path) -> None:
    """What was closed in fragments plays; writing goes on in the next file, and it is told."""
    sink = sink_to(str(tmp_path / "a.mp4"), ffmpeg)
    write(sink, 120)
    until(lambda: (tmp_path / "a.mp4").stat().st_size > 1500 and sink.status().frames == 120, 20)
    dying = psutil.Process(ffmpeg_pid(sink))
    dying.kill()
    until(lambda: not alive([dying]), 20)  # else it takes more with it than the pipe holds
    write(sink, 40, start=120)
    finish(sink)
    assert probe(tmp_path / "a.mp4").frames >= 32
    in_the_pipe = 65536 // VIDEO.frame_bytes + 1
    assert probe(tmp_path / "a-1.mp4").frames >= 40 - in_the_pipe
    assert sink.status().segment == str(tmp_path / "a-1.mp4")


def test_an_ffmpeg_that_always_dies_ends_the_sink_and_nothing_else(ffmpeg: Path, tmp_path: Path) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    sink = sink_to(str(tmp_path / "a.mp4"), fake)
    deadline = time.monotonic() + 30
    while sink.status().state != "failed":
        assert time.monotonic() < deadline
        sink.offer(picture(0))
    assert sink.has_room()
    finish(sink)
    assert "no space left" in (sink.status().error or "")


def test_ffmpeg_that_is_none_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    for path in (fake, tmp_path / "none"):
        with pytest.raises(InputError, match="--ffmpeg PATH"):
            find_ffmpeg(path)


def test_closing_waits_for_the_index_and_kills_who_hangs(ffmpeg: Path, tmp_path: Path) -> None:
    """An ffmpeg that does not end gets one SIGTERM and then SIGKILL."""
    target = parse_target(str(tmp_path / "a.mp4"))
    running = Ffmpeg(file_command(ffmpeg, tmp_path / "a.mp4", VIDEO, OutputConfig()), target)
    running.write(picture(0))
    assert running.close(20) == 0
    stubborn = tmp_path / "stubborn"
    stubborn.write_text("#!/bin/sh\ntrap '' TERM\nwhile :; do read line || sleep 1; done\n")
    stubborn.chmod(0o700)
    hanging = Ffmpeg([str(stubborn)], target)
    assert hanging.close(0.2) == -signal.SIGKILL
    assert not hanging.alive()


@pytest.mark.timeout(90)
def test_an_rtmp_server_records_what_plays(ffmpeg: Path, tmp_path: Path) -> None:
    server = RtmpServer(tmp_path / "r.flv")
    sink = sink_to(server.address, ffmpeg, pace="live")
    for number in range(64):
        until(sink.has_room, 20)
        sink.offer(picture(number))
        time.sleep(1 / 40)  # a live stream has a pace
    finish(sink)
    server.wait()
    info = probe(tmp_path / "r.flv")
    assert (info.codec, info.pixels, info.audio) == ("h264", "yuv420p", "aac")
    assert info.frames >= 40


@pytest.mark.timeout(90)
def test_a_dead_or_frozen_server_never_blocks(ffmpeg: Path, tmp_path: Path) -> None:
    """Offers return at once whatever the server does; what finds no room is dropped and counted."""
    server = RtmpServer(tmp_path / "r.flv")
    server.freeze()
    frozen = sink_to(server.address, ffmpeg, pace="live")
    dead = sink_to("rtmp://127.0.0.1:9/live/key", ffmpeg, pace="live")
    began = time.monotonic()
    for number in range(400):
        frozen.offer(picture(number))
        dead.offer(picture(number))
    assert time.monotonic() - began < 2
    for sink in (frozen, dead):
        sink.abort()
        until(lambda sink=sink: sink.done, 20)
        status = sink.status()
        assert status.frames + status.dropped >= 300
    server.close()


def test_what_ffmpeg_says_is_redacted(ffmpeg: Path) -> None:
    sink = sink_to("rtmp://127.0.0.1:9/live/topsecret", ffmpeg, pace="live")
    write(sink, 30)
    finish(sink)
    assert "topsecret" not in sink.status().model_dump_json()
