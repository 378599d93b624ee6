"""The whole runtime through its command: golden streams across processes, placements alike, prompts that matter."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import Command
from golden_cases import cases, load, relative_error
from model_files import write_case
from safetensors.torch import load_file
from video_file import read_frames

pytestmark = pytest.mark.timeout(300)
STORY = ("a red circle", "a blue square", "a green star")
SWITCHED = [path for path in cases("stream") if load(path).config["switch_frame_indices"]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "run")


def write_prompts(path: Path, prompts: list[str]) -> Path:
    path.write_text(json.dumps({"prompts": prompts}) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SWITCHED, ids=lambda path: f"golden-{path.name}-processes-plain")
def test_golden_stream_across_processes(path: Path, tmp_path: Path, command: Command) -> None:
    """Given noise and embeddings, the latents that leave the denoiser process are the reference's."""
    case = load(path)
    config = write_case(case.config, path / "tensors.safetensors", tmp_path / "model")
    switches = case.config["switch_frame_indices"]
    prompts = write_prompts(tmp_path / "prompts.jsonl", [f"prompt {i}" for i in range(len(switches) + 1)])
    dump = tmp_path / "latents.safetensors"
    done = command.run(
        *("generate", "--config", config, "--prompts", prompts, "--switch-frames", ",".join(map(str, switches))),
        *("--blocks", case.config["num_blocks"], "--inputs", path / "tensors.safetensors"),
        *("--dump-latents", dump, "--out", "null:"),
    )
    assert done.returncode == 0, done.stderr
    assert relative_error(load_file(dump)["latents"], case.tensors["latents"]) <= 1e-4


@dataclass(frozen=True)
class Video:
    """A short pocket video: its file, its latents' file, the frames' sha256 as the command said it."""

    path: Path
    latents: bytes
    sha256: str


def generate(command: Command, folder: Path, name: str, *options: object, prompts: tuple[str, ...] = STORY) -> Video:
    """Five blocks; each further prompt takes effect one or two blocks after the one before."""
    listed = write_prompts(folder / f"{name}.jsonl", list(prompts))
    dump, path = folder / f"{name}.safetensors", folder / f"{name}.mp4"
    at = ("--switch-frames", "3,9") if len(prompts) > 1 else ()
    done = command.run(
        *("generate", "--prompts", listed, "--seed", 7, "--blocks", 5),
        *("--out", path, "--dump-latents", dump, *at, *options),
    )
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
    digest = next(line for line in done.stdout.splitlines() if line.startswith("sha256")).split()[-1]
    return Video(path, dump.read_bytes(), digest)


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> Video:
    """A video with two switches; its run left no run directory, no temporary file and no memfd of ours."""
    folder = tmp_path_factory.mktemp("processes")
    with tempfile.TemporaryDirectory(prefix="llt-") as temporary:  # short, as sockets' paths must be
        command = Command(folder / "run", Path(temporary))
        before = memfds()
        video = generate(command, folder, "process", "--set", "placement=process")
        assert list(Path(temporary).iterdir()) == []
    assert not command.run_directory.exists()
    assert memfds() <= before
    return video


def memfds() -> set[str]:
    """Ours that this process holds open."""
    open_files = (_target(fd) for fd in Path(f"/proc/{os.getpid()}/fd").iterdir())
    return {target for target in open_files if "longlive" in target}


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def test_threads_and_processes_give_the_same_bits(by_processes: Video, tmp_path: Path, command: Command) -> None:
    """Placement changes where stages run and nothing else."""
    threads = generate(command, tmp_path, "thread", "--set", "placement=thread")
    assert (threads.latents, threads.sha256) == (by_processes.latents, by_processes.sha256)
    assert threads.path.read_bytes() == by_processes.path.read_bytes()


def test_a_prompt_matters_from_its_frame_on(by_processes: Video, tmp_path: Path, command: Command) -> None:
    """Same seed: equal up to the applied frame and different after it; another first prompt differs from frame 0."""
    switched = read_frames(by_processes.path)
    same = read_frames(generate(command, tmp_path, "same", prompts=STORY[:1]).path)
    other = read_frames(generate(command, tmp_path, "other", prompts=STORY[1:2]).path)
    applied = 12 * 1 - 3
    differs = (same != switched).any((1, 2, 3))
    assert not differs[:applied].any()
    assert differs[applied:].all()
    assert (same != other).any((1, 2, 3)).all()
