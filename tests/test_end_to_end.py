"""The whole runtime through its command: golden streams across processes, placements alike, prompts that matter."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from command import Command
from golden_cases import cases, load, relative_error
from model_files import write_case
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(180)
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


def generate(command: Command, folder: Path, name: str, *options: object) -> tuple[bytes, str]:
    """Latents and the frames' sha256 of a short pocket video with two switches."""
    prompts = write_prompts(folder / "prompts.jsonl", ["a red circle", "a blue square", "a green star"])
    dump = folder / f"{name}.safetensors"
    done = command.run(
        *("generate", "--prompts", prompts, "--switch-frames", "3,9", "--seed", 7, "--blocks", 5),
        *("--out", folder / f"{name}.mp4", "--dump-latents", dump, *options),
    )
    assert done.returncode == 0, done.stderr
    digest = next(line for line in done.stdout.splitlines() if line.startswith("sha256")).split()[-1]
    return dump.read_bytes(), digest


def test_threads_and_processes_give_the_same_bits(tmp_path: Path, command: Command) -> None:
    """Placement changes where stages run and nothing else."""
    processes = generate(command, tmp_path, "process", "--set", "placement=process")
    threads = generate(command, tmp_path, "thread", "--set", "placement=thread")
    assert processes == threads
    assert (tmp_path / "process.mp4").read_bytes() == (tmp_path / "thread.mp4").read_bytes()


def test_a_run_leaves_nothing_behind(tmp_path: Path) -> None:
    """After a run there is no run directory, no temporary file and no memfd of ours."""
    with tempfile.TemporaryDirectory(prefix="llt-") as temporary:  # short, as sockets' paths must be
        command = Command(tmp_path / "run", Path(temporary))
        generate(command, tmp_path, "once")
        assert list(Path(temporary).iterdir()) == []
    assert not command.run_directory.exists()
    assert not [fd for fd in Path(f"/proc/{os.getpid()}/fd").iterdir() if "longlive" in _target(fd)]


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""
