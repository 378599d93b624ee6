"""What ffmpeg, a disk or a server does wrong stays with that output: it is told, bounded, and never a storm."""

import os
import signal
import time
from pathlib import Path

import pytest
from command import until
from rtmp_server import RtmpServer
from video_file import probe

from configs.schema import OutputConfig, VideoConfig
from configs.targets import parse_target
from ipc.errors import InputError
from workers.ffmpeg import Ffmpeg, file_command, find_ffmpeg
from workers.sinks import FfmpegSink, Sink, open_sinks

VIDEO = VideoConfig(height=64, width=96)
OUTPUT = OutputConfig(pace="free")


@pytest.fixture(scope="module")
def ffmpeg() -> Path:
    return find_ffmpeg(None)


def program(path: Path, *lines: str) -> Path:
    """A shell script in ffmpeg's place."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o700)
    return path


def sink_to(target: str, ffmpeg: Path) -> FfmpegSink:
    (sink,) = open_sinks([parse_target(target)], ffmpeg, OUTPUT, VIDEO)
    assert isinstance(sink, FfmpegSink)
    return sink


def noise() -> bytes:
    """A frame that does not compress, so that it soon reaches the disk."""
    return os.urandom(VIDEO.frame_bytes)


def feed(sinks: list[Sink], count: int) -> None:
    for _ in range(count):
        for sink in sinks:
            until(sink.has_room, 20)
            sink.offer(noise())


def finish(sink: Sink) -> None:
    sink.finish()
    until(lambda: sink.done, 30)


def test_an_ffmpeg_without_the_encoder_is_refused_at_start(tmp_path: Path) -> None:
    bare = program(tmp_path / "ffmpeg", 'echo "ffmpeg version 1 built without"')
    with pytest.raises(InputError, match="found no encoder libx264"):
        find_ffmpeg(bare)


def test_two_outputs_of_one_name_never_share_a_file(ffmpeg: Path, tmp_path: Path) -> None:
    """The name is claimed before ffmpeg starts, else two of them write one file."""
    sinks = open_sinks([parse_target(str(tmp_path / "a.mp4"))] * 2, ffmpeg, OUTPUT, VIDEO)
    feed(sinks, 40)
    for sink in sinks:
        finish(sink)
    assert [sink.status().segment for sink in sinks] == [str(tmp_path / "a.mp4"), str(tmp_path / "a-1.mp4")]
    assert [sink.status().error for sink in sinks] == [None, None]
    assert [probe(tmp_path / name).frames for name in ("a.mp4", "a-1.mp4")] == [40, 40]


def test_a_full_disk_ends_the_recording_at_once_and_not_the_run(ffmpeg: Path, tmp_path: Path) -> None:
    """Every further segment would fail as well: no storm of files, what was written plays, frames are still taken."""
    limited = program(tmp_path / "ffmpeg", 'trap "" XFSZ', "ulimit -f 600", f'exec "{ffmpeg}" "$@"')
    (tmp_path / "out").mkdir()
    sink = sink_to(str(tmp_path / "out" / "a.mp4"), limited)
    deadline = time.monotonic() + 20
    while sink.status().state != "failed":
        assert time.monotonic() < deadline
        sink.offer(noise())
        time.sleep(0.001)
    assert "File too large" in (sink.status().error or "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.mp4"]
    assert probe(tmp_path / "out" / "a.mp4").frames > 0
    assert sink.has_room()
    finish(sink)


def test_an_ffmpeg_that_cannot_be_started_again_ends_the_sink(ffmpeg: Path, tmp_path: Path) -> None:
    """The writer's thread must outlive it: a full queue that nobody empties would hold a lossless run for ever."""
    program_path = tmp_path / "ffmpeg"
    program_path.symlink_to(ffmpeg)
    sink = sink_to(str(tmp_path / "a.mp4"), program_path)
    feed([sink], 2)
    program_path.unlink()
    os.kill(sink._ffmpeg.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while sink.status().state != "failed":
        assert time.monotonic() < deadline and not sink.done
        sink.offer(noise())
        time.sleep(0.001)
    assert sink.has_room()
    finish(sink)


def test_an_ffmpeg_that_stands_still_is_noticed(ffmpeg: Path, tmp_path: Path) -> None:
    running = Ffmpeg(
        file_command(ffmpeg, tmp_path / "a.mp4", VIDEO, OUTPUT), parse_target(str(tmp_path / "a.mp4")), stuck_s=0.3
    )
    running.write(noise())
    os.kill(running.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match="took no frame"):
        for _ in range(20):
            running.write(noise())
    running.kill()
    assert not running.alive()


def test_an_aborted_output_says_so(ffmpeg: Path, tmp_path: Path) -> None:
    sink = sink_to(str(tmp_path / "a.mp4"), ffmpeg)
    feed([sink], 3)
    sink.abort()
    until(lambda: sink.done, 10)
    assert sink.status().state == "aborted"


def test_an_output_that_cannot_be_made_is_refused(ffmpeg: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened: No such file or directory"):
        sink_to(str(tmp_path / "gone" / "a.mp4"), ffmpeg)


@pytest.mark.timeout(90)
def test_a_stream_finds_a_server_that_comes_late(ffmpeg: Path, tmp_path: Path) -> None:
    """Without a server the sink says `reconnecting` and counts its frames as dropped; with one the stream goes on."""
    server = RtmpServer(tmp_path / "none.flv")
    server.close()
    sink = sink_to(server.address, ffmpeg)

    def state_is(state: str) -> bool:
        sink.offer(noise())
        return sink.status().state == state

    until(lambda: state_is("reconnecting"), 20)
    until(lambda: state_is("reconnecting") and sink.status().dropped > 0, 20)
    server = RtmpServer(tmp_path / "r.flv", server.port)
    until(lambda: state_is("open"), 20)
    written = sink.status().frames
    until(lambda: state_is("open") and sink.status().frames >= written + 60, 20)
    finish(sink)
    server.wait()
    assert probe(tmp_path / "r.flv").frames > 0
