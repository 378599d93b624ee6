"""CUDA's multi-process service: begun where processes share a GPU, and gone with the run however that ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from orchestrator import mps as mps_module
from orchestrator.checkout import with_sources
from orchestrator.mps import Mps, begin_where_shared, is_fault, is_provided, shared_gpus
from orchestrator.mps_keeper import LOGS, PIPES
from orchestrator.supervisor import worker_groups

CONTROL = """\
#!{python}
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
if sys.argv[1:] == ["-f"]:
    server = subprocess.Popen(["sleep", "600"])
    place = pathlib.Path(os.environ.get("PLACE", folder.parent))
    with (place / "folders").open("a") as begun:
        print(folder, file=begun)
    (place / "pids").write_text(f"{{os.getpid()}} {{server.pid}}")
    (folder / "control").touch()
    while {obeys} is False or not (folder / "quit").exists():
        time.sleep(0.01)
    server.kill()
    (place / "ended").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
elif sys.stdin.read() == "quit\\n":
    (folder / "quit").touch()
"""
"""Stands for NVIDIA's program and the server that it starts."""


@pytest.fixture
def place() -> Iterator[Path]:
    """On a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="longlive-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def program(place: Path) -> Path:
    """One that ends when it is told to."""
    return written(place / "control", CONTROL.format(python=sys.executable, obeys=True))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def warnings() -> list[str]:
    return []


Begin = Callable[..., Mps]
AS_CLIENT = ("sh", "-c", 'test -e "$CUDA_MPS_PIPE_DIRECTORY/control"')
"""A trial that succeeds where the service is."""


@pytest.fixture
def service(place: Path, program: Path, warnings: list[str]) -> Iterator[Begin]:
    """Makes services that end with the test."""
    made: list[Mps] = []

    def make(control: Path = program, trial: tuple[str, ...] = ("true",), interrupted: int | None = None) -> Mps:
        made.append(Mps(str(control), place, warnings.append, trial, interrupted))
        return made[-1]

    yield make
    for mps in made:
        mps.end()


def pids(place: Path) -> list[int]:
    return [int(pid) for pid in (place / "pids").read_text().split()]


def is_gone(pid: int) -> bool:
    """Ended, whoever has yet to hear of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until(held: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not held():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folders(place: Path) -> list[Path]:
    return list(place.glob("mps-*"))


def test_it_is_there_for_workers_and_gone_after_them(place: Path, service: Begin, warnings: list[str]) -> None:
    mps = service()
    assert mps.begin()
    (folder,) = folders(place)
    assert mps.for_worker() == {PIPES: str(folder), LOGS: str(folder)}
    assert folder.stat().st_mode & 0o077 == 0
    running = pids(place)
    assert not any(map(is_gone, running))
    mps.end()
    mps.end()
    assert all(map(is_gone, running))
    assert folders(place) == []
    assert warnings == []


def test_gpus_have_their_own_numbers_with_it_and_without(
    place: Path, service: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service shows all, clients see those that they are given; and it is told to end before it is killed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    mps = service(trial=("sh", "-c", 'test "$CUDA_VISIBLE_DEVICES" = 1'))
    assert mps.begin()
    assert mps.for_worker().keys() == {PIPES, LOGS}
    mps.end()
    assert (place / "ended").read_text() == "all"


def test_one_that_does_not_end_by_itself_is_killed_with_its_server(place: Path, service: Begin) -> None:
    mps = service(written(place / "deaf", CONTROL.format(python=sys.executable, obeys=False)))
    assert mps.begin()
    running = pids(place)
    mps.end()
    assert all(map(is_gone, running))


def test_one_that_died_is_begun_anew_for_the_next_worker(place: Path, service: Begin) -> None:
    mps = service()
    assert mps.begin()
    before, first = mps.for_worker(), pids(place)
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, first)))
    wait_until(lambda: folders(place) == [])
    after = mps.for_worker()
    assert after != before
    assert not any(map(is_gone, pids(place)))


def test_it_ends_with_a_keeper_that_is_killed(place: Path, service: Begin) -> None:
    """The next worker has a new one; NVIDIA's server ends when its control program does."""
    mps = service()
    assert mps.begin()
    before, (control, server) = mps.for_worker(), pids(place)
    os.kill(parent_of(control), signal.SIGKILL)
    wait_until(lambda: is_gone(control))
    assert mps.for_worker() != before
    assert is_gone(server)
    assert not any(map(is_gone, pids(place)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_s_signals_do_not_end_it(number: signal.Signals, place: Path, service: Begin) -> None:
    """The daemon, which gets them too, may need a while to end in order."""
    mps = service()
    assert mps.begin()
    before, running = mps.for_worker(), pids(place)
    keeper = parent_of(running[0])
    assert os.getsid(keeper) == keeper
    os.kill(keeper, number)
    assert mps.for_worker() == before
    mps.end()
    assert all(map(is_gone, running))


def test_a_fault_asks_for_another_service(place: Path, service: Begin) -> None:
    mps = service()
    assert mps.begin()
    before, running = mps.for_worker(), pids(place)
    mps.spoil()
    after = mps.for_worker()
    assert after != before
    assert mps.for_worker() == after
    assert all(map(is_gone, running))


def test_nobody_waits_for_it_once_interrupted(place: Path, service: Begin, warnings: list[str]) -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    mps = service(trial=("sleep", "600"), interrupted=read)  # it would hang
    began = time.monotonic()
    assert not mps.begin()
    assert time.monotonic() - began < 10
    assert "interrupted while it began" in warnings[0]
    os.close(read)
    os.close(write)


def test_what_failed_once_is_not_waited_for_again(
    place: Path, program: Path, service: Begin, warnings: list[str]
) -> None:
    mps = service()
    assert mps.begin()
    control, _ = pids(place)
    program.unlink()
    os.kill(control, signal.SIGKILL)
    wait_until(lambda: folders(place) == [])
    assert mps.is_there
    assert (mps.for_worker(), mps.for_worker()) == ({}, {})
    assert not mps.is_there
    assert len(warnings) == 1


def test_a_folder_that_cannot_be_made_is_said(place: Path, program: Path, warnings: list[str]) -> None:
    assert not Mps(str(program), place / "gone", warnings.append, ("true",)).begin()
    assert "No such file or directory" in warnings[0]


def test_a_keeper_that_cannot_be_started_leaves_no_folder(
    place: Path, service: Begin, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps_module, "KEEPER", (str(place / "no-python"),))
    assert not service().begin()
    assert "No such file or directory" in warnings[0]
    assert folders(place) == []


def test_a_path_too_long_for_sockets_is_not_taken(place: Path, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(place))
    long = place / ("x" * 90)
    long.mkdir()
    mps = Mps(str(program), long, print, ("true",))
    folder = Path(mps.for_worker()[PIPES])
    assert len(str(folder / "control_privileged")) <= 107
    mps.end()
    assert not folder.exists()


def test_it_ends_with_a_parent_that_is_killed(place: Path, program: Path) -> None:
    """Whose own end cannot say so: the service holds GPU memory."""
    code = f"""
        import pathlib, sys
        from orchestrator.mps import Mps
        mps = Mps({str(program)!r}, pathlib.Path({str(place)!r}), print, ("true",))
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
        running = pids(place)
        parent.kill()
    wait_until(lambda: all(map(is_gone, running)))
    wait_until(lambda: folders(place) == [])


@pytest.mark.parametrize(
    ("control", "trial", "said"),
    [
        ("#!/bin/sh\nexit 3\n", ("true",), "it ended with code 3"),
        (None, ("false",), "a GPU cannot be used through it: code 1"),
    ],
)
def test_where_it_cannot_be_used_processes_take_turns(
    control: str | None,
    trial: tuple[str, ...],
    said: str,
    place: Path,
    program: Path,
    service: Begin,
    warnings: list[str],
) -> None:
    mps = service(written(place / "other", control) if control else program, trial)
    assert not mps.begin()
    assert warnings == [
        f"stages.mps: CUDA's multi-process service: {said}; used instead: processes that take turns on the GPU"
    ]
    assert mps.for_worker() == {}
    assert folders(place) == []


def test_the_daemon_ends_and_begins_all_that_share_a_gpu_after_a_fault(place: Path, program: Path) -> None:
    """With a service of their own each time, and the output goes on."""
    program.rename(place / "nvidia-cuda-mps-control")
    story = place / "story.jsonl"
    story.write_text(json.dumps({"prompts": ["a red circle"]}), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).parent / "sharing_daemon.py"), "generate", "--prompts", str(story)]
    ran = subprocess.run(
        [*command, "--blocks", "3", "--out", "null:"],
        env={**with_sources(), "PLACE": str(place), "TMPDIR": str(place), PIPES: str(place / "none")},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    assert "processes share the GPU through CUDA's multi-process service" in ran.stderr
    assert "denoiser died: RuntimeError: CUDA error: made up; starting it again" in ran.stderr
    for other in ("text_encoder", "vae_decoder"):
        assert ran.stderr.count(f"{other} died: denoiser met a fault of a GPU") == 1
    first, second = (Path(line) for line in (place / "folders").read_text().split())
    assert (place / "service").read_text() == str(first)
    assert not first.exists()
    assert not second.parent.exists()
    assert all(map(is_gone, pids(place)))


GPU = ("device=cuda",)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the trial would succeed")


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ((), set()),
        (GPU, {"cuda:0"}),
        ((*GPU, "placement=thread"), set()),
        ((*GPU, "stages.vae_decoder.device=cuda:1", "stages.text_encoder.device=cpu"), set()),
        ((*GPU, "stages.vae_decoder.device=cuda:1", "stages.text_encoder.device=cuda:1"), {"cuda:1"}),
        ((*GPU, "stages.vae_decoder.device=cuda:1", "stages.text_encoder.device=cuda:0"), {"cuda:0"}),
    ],
)
def test_it_is_for_processes_that_share_a_gpu(settings: tuple[str, ...], shared: set[str]) -> None:
    config = load_config("pocket", settings)
    assert shared_gpus(config, worker_groups(config).values()) == shared


@pytest.mark.parametrize(
    ("setting", "installed", "warned"),
    [
        ("auto", False, None),
        ("true", False, "found no nvidia-cuda-mps-control"),
        ("false", True, None),
        pytest.param("auto", True, "a GPU cannot be used through it", marks=without_gpu),
    ],
)
def test_none_is_begun_where_none_is_wanted_or_can_be(
    setting: str, installed: bool, warned: str | None, place: Path, program: Path, warnings: list[str]
) -> None:
    """Not wanted, not installed, or of no use: what was tried or asked for is said."""
    program.rename(place / "nvidia-cuda-mps-control")
    environment = {"PATH": str(place if installed else place / "bin"), PIPES: str(place / "none")}
    config = load_config("pocket", [*GPU, f"stages.mps={setting}"])
    groups = worker_groups(config).values()
    assert begin_where_shared(config, groups, place, environment, warnings.append) is None
    assert [text for text in warnings if warned is None or warned not in text] == []
    assert bool(warnings) is bool(warned)
    assert folders(place) == []


def test_one_is_begun_where_processes_share_a_gpu(
    place: Path, program: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPUs that the stages name each is tried."""
    tried: list[object] = []

    class Begins:
        def __init__(self, *args: object) -> None:
            tried.extend(args)

        def begin(self) -> bool:
            return True

    monkeypatch.setattr(mps_module, "Mps", Begins)
    program.rename(place / "nvidia-cuda-mps-control")
    environment = {"PATH": str(place), PIPES: str(place / "none")}
    config = load_config("pocket", [*GPU, "stages.text_encoder.device=cuda:2"])
    begun = begin_where_shared(config, worker_groups(config).values(), place, environment, warnings.append, 7)
    assert isinstance(begun, Begins)
    assert tried == [
        str(place / "nvidia-cuda-mps-control"),
        place,
        warnings.append,
        (*mps_module.KEEPER, "try", "0", "2"),
        7,
    ]


def test_a_service_of_somebody_else_is_left_to_be_used_where_it_answers(place: Path) -> None:
    assert not is_provided({}, place)
    (place / "control").touch()
    assert not is_provided({PIPES: str(place)})
    (place / "control").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(place / "control"))
        server.listen()
        assert is_provided({}, place)
        assert is_provided({PIPES: str(place)})
    assert not is_provided({}, place)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        ("AcceleratorError: CUDA error: device-side assert triggered", True),
        ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("cudaMalloc failed: cudaErrorIllegalAddress", True),
        ("AcceleratorError: CUDA error: out of memory", False),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", False),
        ("killed by SIGKILL", False),
    ],
)
def test_only_a_fault_of_the_gpu_is_one_of_all_clients(error: str, fault: bool) -> None:
    assert is_fault(error) is fault


def test_what_was_asked_for_and_is_of_no_use_is_said(place: Path, warnings: list[str]) -> None:
    config = load_config("pocket", ["stages.mps=true"])
    groups = worker_groups(config).values()
    assert begin_where_shared(config, groups, place, {PIPES: str(place / "none")}, warnings.append) is None
    assert warnings == ["stages.mps=true: no two processes share a GPU; used instead: none"]
