"""A live run from its first to its last breath: prompts, recordings, signals, deaths, and nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command import Command, alive, family, until
from rtmp_server import RtmpServer
from tiny_files import TINY
from video_file import probe

from configs.schema import MODEL_STAGES
from ipc.errors import NotRunning, Refused
from ipc.messages import Applied, OnAir, PresetChanged, Status, Superseded
from orchestrator.async_client import AsyncClient
from orchestrator.client import Client

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "run")


Start = Callable[..., "Live"]


class Live:
    """A started daemon with a client."""

    def __init__(self, command: Command, process: subprocess.Popen[str]) -> None:
        self.command = command
        self.process = process
        self.family: list[psutil.Process] = []
        self.clients: list[Client] = []

    def client(self) -> Client:
        """Connected; the daemon may still be warming up."""

        def connects() -> bool:
            assert self.process.poll() is None, self.process.communicate()[0]
            try:
                self.clients.append(Client(self.command.run_directory))
            except NotRunning:
                return False
            return True

        until(connects, 60)
        return self.clients[-1]

    def generating(self) -> Client:
        """Connected once frames are played."""
        client = self.client()
        until(lambda: client.status().frame > 0, 60)
        self.family = family(self.process)
        return client

    def worker(self, status: Status, stage: str) -> int:
        return status.stages[stage].pid

    def ends(self, timeout_s: float = 120) -> str:
        """Waits for the end; what it printed. Nothing of it is left."""
        output = self.process.communicate(timeout=timeout_s)[0]
        until(lambda: not alive(self.family), 5)
        return output


@pytest.fixture
def start(command: Command) -> Iterator[Start]:
    started: list[Live] = []

    def begin(*arguments: object) -> Live:
        started.append(Live(command, command.start("start", *arguments)))
        return started[-1]

    yield begin
    for live in started:
        for client in live.clients:
            client.close()
        if live.process.poll() is None:
            left = family(live.process)
            live.process.kill()
            live.process.communicate()
            until(lambda left=left: not alive(left), 20)


def test_prompts_while_it_records(start: Start, command: Command, tmp_path: Path) -> None:
    """Two prompts from another shell get their three answers; the file has exactly its frames."""
    path = tmp_path / "new" / "first.mp4"
    live = start("--seconds", 8, "--prompt", "a red circle moving right", "--out", path, "--out", "null:")
    live.generating()
    answers = [command.run("prompt", text, "--wait") for text in ("a blue star", "two green squares")]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
        accepted, applied, on_air = answer.stdout.splitlines()
        assert accepted.startswith("accepted")
        assert applied.startswith("applied at block ")
        assert on_air.startswith("on air after ")
    output = live.ends()
    assert live.process.returncode == 0, output
    info = probe(path)
    assert (info.codec, info.pixels, info.fps, info.frames) == ("h264", "yuv420p", 16, 128)
    assert not command.run_directory.exists()
    assert "abstract" not in output


def test_ctrl_c_finishes_the_file(start: Start, command: Command, tmp_path: Path) -> None:
    live = start("--out", tmp_path / "a.mp4")
    client = live.generating()
    until(lambda: client.status().frame > 30, 30)
    live.process.send_signal(signal.SIGINT)
    output = live.ends(20)
    assert live.process.returncode == 0, output
    assert probe(tmp_path / "a.mp4").frames > 30
    assert not command.run_directory.exists()


def test_stop_answers_when_outputs_are_closed(start: Start, command: Command, tmp_path: Path) -> None:
    """A second daemon was refused before, and the first went on."""
    live = start("--out", tmp_path / "a.mp4")
    client = live.generating()
    second = command.run("start")
    assert second.returncode == 3
    assert len(second.stderr.strip().splitlines()) == 1
    assert "orchestrator status" in second.stderr
    assert client.status().pid == live.process.pid
    stopped = command.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    frames = int(stopped.stdout.split()[-2])
    assert probe(tmp_path / "a.mp4").frames == frames
    live.ends()
    assert live.process.returncode == 0
    assert command.run("status").returncode == 4


def test_a_signal_during_warm_up_ends_at_once(start: Start, command: Command) -> None:
    live = start()
    live.client()
    live.family = family(live.process)
    live.process.send_signal(signal.SIGTERM)
    live.ends(5)
    assert live.process.returncode in (0, 130, 143)
    assert not command.run_directory.exists()


def test_everybody_dies_with_a_killed_daemon_and_the_next_start_is_clean(
    start: Start, command: Command, tmp_path: Path
) -> None:
    live = start("--out", tmp_path / "a.mp4")
    client = live.generating()
    until(lambda: client.status().frame > 70, 30)
    live.process.kill()
    live.ends(5)
    assert probe(tmp_path / "a.mp4").frames > 16
    again = start("--seconds", 1, "--pace", "free")
    assert "16 frames" in again.ends()
    assert again.process.returncode == 0


def test_a_killed_worker_is_started_again(start: Start, command: Command, tmp_path: Path) -> None:
    """Whichever it is, one after the other: the stream goes on, a prompt sent meanwhile is applied, and it is told."""
    live = start("--out", tmp_path / "a.mp4")
    client = live.generating()
    for stage in MODEL_STAGES:
        os.kill(live.worker(client.status(), stage), signal.SIGKILL)
        text = f"sent while {stage} was dead"
        handle = client.prompt(text)
        assert isinstance(handle.result(60), Applied), stage
        handle.on_air(60)
        status = client.status()
        assert status.stages[stage].restarts == 1
        assert f"{stage} died: killed by SIGKILL" in (status.last_error or "")
        assert status.prompt == text
    live.family = family(live.process)
    client.stop()
    live.ends()
    assert probe(tmp_path / "a.mp4").frames > 0
    assert not command.run_directory.exists()


def test_a_dead_output_ends_the_run_and_says_why(start: Start, command: Command, tmp_path: Path) -> None:
    live = start("--out", tmp_path / "a.mp4")
    client = live.generating()
    until(lambda: client.status().frame > 70, 30)
    os.kill(live.worker(client.status(), "output"), signal.SIGKILL)
    output = live.ends()
    assert live.process.returncode == 1
    assert "output died: killed by SIGKILL" in output
    assert probe(tmp_path / "a.mp4").frames > 16


def test_every_prompt_gets_one_answer(start: Start) -> None:
    """A burst: the last is applied, the others are superseded; one for a block takes effect there.

    One for a far block is cancelled at the end.
    """
    live = start("--pace", "free")
    client = live.generating()
    far = client.prompt("never", at=10**6)
    burst = [client.prompt(f"number {number}") for number in range(20)]
    results = [handle.result(60) for handle in burst]
    assert isinstance(results[-1], Applied)
    assert all(isinstance(result, Applied | Superseded) for result in results)
    with pytest.raises(Refused) as caught:
        client.prompt("many words " * 400).result(60)
    assert caught.value.code == "too_long"
    again = client.prompt("number 19")
    again.result(60)
    until(lambda: client.status().cache_hits >= 1, 20)
    at = client.status().block + 6
    there = client.prompt("right then", at=at).result(60)
    assert isinstance(there, Applied)
    assert (there.block, there.frame) == (at, 12 * at - 3)
    client.stop()
    assert far.result(60).type == "cancelled"
    live.ends()


@pytest.mark.parametrize(("placement", "recache"), [("process", "recent(6)"), ("thread", "blend(1.5)")])
def test_prompts_that_abort_blocks_give_the_frames_of_their_schedule(
    placement: str, recache: str, start: Start, command: Command, tmp_path: Path
) -> None:
    """Whenever they came: offline, where nothing is aborted, the same blocks make the same video."""
    texts = ["a red circle", "a blue star", "a green square"]
    settings = ("--set", f"placement={placement}", "--set", f"stream.recache={recache}", "--seconds", 6, "--seed", 7)
    live = start("--pace", "free", "--prompt", texts[0], "--set", "stream.switch=abort", *settings)
    client = live.generating()
    switched = [client.prompt(text).result(60) for text in texts[1:]]
    digest = sha256_in(live.ends())
    frames = ",".join(str(3 * applied.block) for applied in switched)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompts": texts}) + "\n", encoding="utf-8")
    done = command.run("generate", "--prompts", prompts, "--switch-frames", frames, "--out", "null:", *settings)
    assert done.returncode == 0, done.stderr
    assert sha256_in(done.stdout) == digest


def sha256_in(output: str) -> str:
    """Of the frames, as a run's last lines say it."""
    return next(line.split()[-1] for line in output.splitlines() if line.startswith("sha256"))


def test_asyncio_and_events(start: Start, command: Command) -> None:
    """The same client by asyncio; events tell of blocks, prompts and what is on air."""
    random = ("--set", "model.path=null", "--set", "model.random_weights=true")
    live = start("--seconds", 5, *random)
    live.generating()

    async def talk() -> tuple[object, Status, set[str]]:
        async with AsyncClient(command.run_directory) as client:
            events = await client.events(timeout_s=20)
            handle = await client.prompt("a blue star")
            applied = await handle.result()
            kinds: set[str] = set()
            async for event in events:
                kinds.add(event.type)
                if isinstance(event, OnAir):
                    break
            return applied, await client.status(), kinds

    applied, status, kinds = asyncio.run(talk())
    assert isinstance(applied, Applied)
    assert status.prompt == "a blue star"
    assert {"event.block", "event.applied", "event.on_air"} <= kinds
    assert "abstract" in live.ends()


TINY_SETTINGS = (*TINY, "video.height=32", "video.width=32", "placement=thread")
TINY_RUN = [argument for setting in TINY_SETTINGS for argument in ("--set", setting)]
"""Networks as small as they come in one process, for what does not depend on them."""
BETWEEN_TWO = ("--set", "adaptive.presets=[quality, balanced]", "--set", "adaptive.wait=2")


def test_a_target_out_of_reach_steps_down_and_a_restarted_denoiser_stays_there(start: Start) -> None:
    """It says so once, as an event, in the status and to whoever started it."""
    target = ("--target-rtf", 10**6, *BETWEEN_TWO, "--set", "adaptive.window=20")
    live = start("--pace", "free", *TINY_RUN, *target)
    client = live.client()
    assert client.status().preset == "quality"
    event = next(event for event in client.events(timeout_s=120) if isinstance(event, PresetChanged))
    assert (event.old, event.new, event.unit, event.target) == ("quality", "balanced", "rtf", 10**6)
    assert event.block == 4 + 1 + 20, "of a full window, without the first"
    assert 0 < event.measured < event.target
    live.generating()
    os.kill(live.worker(client.status(), "denoiser"), signal.SIGKILL)
    until(lambda: client.status().stages["denoiser"].restarts == 1, 20)
    block = client.status().block
    until(lambda: client.status().block > block + 60, 60)
    assert client.status().preset == "balanced"
    client.stop()
    output = live.ends()
    assert output.count("preset balanced from block 25 on: RTF") == output.count("preset balanced from block") == 1


def test_a_target_within_reach_steps_up(command: Command, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompts": ["a red circle"]}) + "\n", encoding="utf-8")
    target = ("--target-p99-ms", 10**6, "--preset", "balanced", *BETWEEN_TWO, "--set", "adaptive.window=2")
    done = command.run("generate", "--prompts", prompts, "--blocks", 9, "--out", "null:", *TINY_RUN, *target)
    assert done.returncode == 0, done.stderr
    assert "preset quality from block 7 on: p99 " in done.stderr


def test_an_rtmp_server_and_a_file_at_once(start: Start, tmp_path: Path) -> None:
    server = RtmpServer(tmp_path / "r.flv")
    live = start("--seconds", 5, "--out", server.address, "--out", tmp_path / "a.mp4")
    output = live.ends()
    assert live.process.returncode == 0, output
    server.wait()
    recorded = probe(tmp_path / "r.flv")
    assert (recorded.codec, recorded.pixels, recorded.audio) == ("h264", "yuv420p", "aac")
    assert recorded.frames >= 64
    assert probe(tmp_path / "a.mp4").frames == 80


def test_wrong_weights_end_the_start_in_one_line(command: Command, tmp_path: Path) -> None:
    for name in ("longlive_base.pt", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).write_bytes(b"not weights")
    done = command.run("start", "--set", f"model.path={tmp_path}", "--seconds", 1)
    assert done.returncode == 2
    assert "expected" in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == 1
    assert not command.run_directory.exists()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(command: Command) -> None:
    done = command.run("start", "--set", "device=cuda", "--seconds", 1)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "no CUDA GPU" in errors[0]
    assert "Traceback" not in done.stderr
