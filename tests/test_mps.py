"""CUDA's multi-process service: begun where processes share a GPU, and gone with the run however that ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.load import load_config
from orchestrator.checkout import with_sources
from orchestrator.mps import Mps, begin_where_shared, gpu_is_shared, is_provided
from orchestrator.mps_keeper import DEVICES, LOGS, PIPES, of_client
from orchestrator.supervisor import worker_groups

CONTROL = """\
#!{python}
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
if sys.argv[1:] == ["-f"]:
    server = subprocess.Popen(["sleep", "600"])
    (folder.parent / "pids").write_text(f"{{os.getpid()}} {{server.pid}}")
    (folder / "control").touch()
    while {obeys} is False or not (folder / "quit").exists():
        time.sleep(0.01)
    server.kill()
elif sys.stdin.read() == "quit\\n":
    (folder / "quit").touch()
"""
"""Stands for NVIDIA's program and the server that it starts."""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """One that ends when it is told to."""
    return written(tmp_path / "control", CONTROL.format(python=sys.executable, obeys=True))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def warnings() -> list[str]:
    return []


Begin = Callable[..., Mps]


@pytest.fixture
def service(tmp_path: Path, program: Path, warnings: list[str]) -> Iterator[Begin]:
    """Makes services that end with the test."""
    made: list[Mps] = []

    def make(control: Path = program, trial: tuple[str, ...] = ("true",)) -> Mps:
        made.append(Mps(str(control), tmp_path, {}, warnings.append, trial))
        return made[-1]

    yield make
    for mps in made:
        mps.end()


def pids(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def is_gone(pid: int) -> bool:
    """Ended, whoever has yet to hear of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(held: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not held():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folders(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("mps-*"))


def test_it_is_there_for_workers_and_gone_after_them(tmp_path: Path, service: Begin, warnings: list[str]) -> None:
    mps = service()
    assert mps.begin()
    (folder,) = folders(tmp_path)
    assert mps.for_worker() == {PIPES: str(folder), LOGS: str(folder)}
    assert folder.stat().st_mode & 0o077 == 0
    running = pids(tmp_path)
    assert not any(map(is_gone, running))
    mps.end()
    mps.end()
    assert all(map(is_gone, running))
    assert folders(tmp_path) == []
    assert warnings == []


def test_one_that_does_not_end_by_itself_is_killed_with_its_server(tmp_path: Path, service: Begin) -> None:
    mps = service(written(tmp_path / "deaf", CONTROL.format(python=sys.executable, obeys=False)))
    assert mps.begin()
    running = pids(tmp_path)
    mps.end()
    assert all(map(is_gone, running))


def test_one_that_died_is_begun_anew_for_the_next_worker(tmp_path: Path, service: Begin) -> None:
    mps = service()
    assert mps.begin()
    before, first = mps.for_worker(), pids(tmp_path)
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, first)))
    wait_until(lambda: folders(tmp_path) == [])
    after = mps.for_worker()
    assert after != before
    assert not any(map(is_gone, pids(tmp_path)))


def test_it_ends_with_a_keeper_that_is_killed(tmp_path: Path, service: Begin) -> None:
    """The next worker has a new one; NVIDIA's server ends when its control program does."""
    mps = service()
    assert mps.begin()
    before, (control, server) = mps.for_worker(), pids(tmp_path)
    (keeper,) = (int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: is_gone(control))
    os.kill(server, signal.SIGKILL)
    assert mps.for_worker() != before
    assert not any(map(is_gone, pids(tmp_path)))


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path, program: Path) -> None:
    """Whose own end cannot say so: the service holds GPU memory."""
    code = f"""
        import pathlib, sys
        from orchestrator.mps import Mps
        mps = Mps({str(program)!r}, pathlib.Path({str(tmp_path)!r}), {{}}, print, ("true",))
        print(mps.begin(), flush=True)
        sys.stdin.read()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=with_sources(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "True\n"
        running = pids(tmp_path)
        parent.kill()
    wait_until(lambda: all(map(is_gone, running)))
    wait_until(lambda: folders(tmp_path) == [])


@pytest.mark.parametrize(
    ("control", "trial", "said"),
    [
        ("#!/bin/sh\nexit 3\n", ("true",), "it ended with code 3"),
        (None, ("false",), "a GPU cannot be used through it (code 1)"),
    ],
)
def test_where_it_cannot_be_used_processes_take_turns(
    control: str | None,
    trial: tuple[str, ...],
    said: str,
    tmp_path: Path,
    program: Path,
    service: Begin,
    warnings: list[str],
) -> None:
    mps = service(written(tmp_path / "other", control) if control else program, trial)
    assert not mps.begin()
    assert warnings == [
        f"stages.mps: CUDA's multi-process service: {said}; used instead: processes that take turns on the GPU"
    ]
    assert mps.for_worker() == {}
    assert folders(tmp_path) == []


GPU = ("device=cuda",)


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ((), False),
        (GPU, True),
        ((*GPU, "placement=thread"), False),
        ((*GPU, "stages.vae_decoder.device=cuda:1", "stages.text_encoder.device=cpu"), False),
        ((*GPU, "stages.vae_decoder.device=cuda:1", "stages.text_encoder.device=cuda:1"), True),
        ((*GPU, "stages.vae_decoder.device=cuda:1", "stages.text_encoder.device=cuda:0"), True),
    ],
)
def test_it_is_for_processes_that_share_a_gpu(settings: tuple[str, ...], shared: bool) -> None:
    config = load_config("pocket", settings)
    assert gpu_is_shared(config, worker_groups(config).values()) is shared


@pytest.mark.parametrize(
    ("setting", "environment", "warned"),
    [
        ("auto", {"PATH": ""}, 0),
        ("true", {"PATH": ""}, 1),
        ("false", {}, 0),
        ("true", {PIPES: "/there"}, 0),
    ],
)
def test_none_is_begun_where_none_is_wanted_or_can_be(
    setting: str, environment: dict[str, str], warned: int, tmp_path: Path, program: Path, warnings: list[str]
) -> None:
    """Not wanted, not installed, or one provided by somebody else: only what was asked for is said."""
    program.rename(tmp_path / "nvidia-cuda-mps-control")
    environment = {"PATH": str(tmp_path), **environment}
    config = load_config("pocket", [*GPU, f"stages.mps={setting}"])
    groups = worker_groups(config).values()
    assert begin_where_shared(config, groups, tmp_path, environment, warnings.append) is None
    assert len(warnings) == warned
    assert folders(tmp_path) == []


def test_the_machine_s_own_service_is_left_to_be_used(tmp_path: Path) -> None:
    assert not is_provided({}, tmp_path)
    (tmp_path / "control").touch()
    assert is_provided({}, tmp_path)


@pytest.mark.parametrize(("given", "seen"), [("2", "0"), ("3,1", "0,1"), ("GPU-8f2,GPU-77a", "0,1")])
def test_clients_count_the_gpus_that_the_service_was_given(given: str, seen: str) -> None:
    assert of_client(Path("/there"), {DEVICES: given})[DEVICES] == seen
    assert DEVICES not in of_client(Path("/there"), {})
