"""The run directory: never two daemons in one, nothing left behind, and nobody else's directory is trusted."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipc.errors import AlreadyRunning, ConfigError
from orchestrator.run_directory import RunDirectory, locate

HOLD = "import sys; from pathlib import Path; from orchestrator.run_directory import RunDirectory as R\n"
HOLD += "with R.open(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
HOLD_WITH_CHILD = "import subprocess, sys, time; from pathlib import Path\n"
HOLD_WITH_CHILD += "from orchestrator.run_directory import RunDirectory as R\n"
HOLD_WITH_CHILD += """
with R.open(Path(sys.argv[1])):
    print(subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid, flush=True)
    time.sleep(60)
"""
RACE = "import sys; from pathlib import Path; from ipc.errors import AlreadyRunning\n"
RACE += "from orchestrator.run_directory import RunDirectory as R\n"
RACE += """
path, marks, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
held = 0
while held < rounds:
    try:
        directory = R.open(path)
    except AlreadyRunning:
        continue
    (marks / "inside").mkdir()
    (marks / "inside").rmdir()
    directory.close()
    held += 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A run directory that does not exist yet, with a path short enough for sockets."""
    with RunDirectory.temporary() as scratch:
        yield scratch.path / "run"


@contextmanager
def another_process_in(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_daemon_is_refused_and_told_how_to_reach_the_first(path: Path) -> None:
    with another_process_in(path) as first, pytest.raises(AlreadyRunning) as error:
        RunDirectory.open(path)
    text = str(error.value)
    assert f"pid {first.pid} " in text
    assert "orchestrator status" in text and "orchestrator stop" in text and "LONGLIVE_RUN_DIR" in text
    assert "\n" not in text and error.value.exit_code == 3


def test_the_same_process_cannot_hold_it_twice(path: Path) -> None:
    with RunDirectory.open(path), pytest.raises(AlreadyRunning):
        RunDirectory.open(path)


def test_a_killed_daemon_leaves_no_lock_and_its_sockets_are_cleared(path: Path) -> None:
    with another_process_in(path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    _bind(path / "control.sock")
    with RunDirectory.open(path):
        assert sorted(child.name for child in path.iterdir()) == ["lock"]


def test_a_daemon_that_ends_leaves_nothing(path: Path) -> None:
    with RunDirectory.open(path) as directory:
        _bind(path / "control.sock")
        assert directory.path == path
    assert not path.exists()


def test_a_directory_that_was_there_stays_and_so_do_other_files_in_it(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "notes.txt").write_text("mine")
    with RunDirectory.open(path):
        pass
    assert [child.name for child in path.iterdir()] == ["notes.txt"]


def test_closing_twice_does_not_touch_the_next_daemon(path: Path) -> None:
    first = RunDirectory.open(path)
    first.close()
    with RunDirectory.open(path):
        first.close()
        with pytest.raises(AlreadyRunning):
            RunDirectory.open(path)


def test_processes_that_open_and_close_at_once_are_never_in_together(path: Path, tmp_path: Path) -> None:
    """Unlinking a lock file that others wait for is where such locks break: mkdir fails if two are inside."""
    command = [sys.executable, "-c", RACE, str(path), str(tmp_path), "60"]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for racer in racers:
        _, errors = racer.communicate(timeout=50)
        assert racer.returncode == 0, errors
    assert not path.exists() or list(path.iterdir()) == []


def test_a_child_that_outlives_a_killed_daemon_does_not_keep_the_next_one_out(path: Path) -> None:
    """An ffmpeg or a worker may live on for a moment; a lock it had inherited would live on with it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_WITH_CHILD, str(path)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        first.kill()
        first.wait()
        try:
            with RunDirectory.open(path):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_it_is_private(path: Path) -> None:
    with RunDirectory.open(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((path / "lock").stat().st_mode) == 0o600


def open_to_others(path: Path) -> str:
    path.mkdir()
    path.chmod(0o750)
    return "mode 0750, expected 0700; chmod 700"


def a_link(path: Path) -> str:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")
    return "found a link, expected a directory"


def a_file(path: Path) -> str:
    path.write_text("")
    return "found a file, expected a directory"


def below_a_file(path: Path) -> str:
    path.parent.joinpath("run").write_text("")
    return "Not a directory"


def a_foreign_owner(path: Path) -> str:
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)
    return f"found owner 12345, expected {os.getuid()}"


def a_linked_lock(path: Path) -> str:
    path.mkdir(mode=0o700)
    (path / "lock").symlink_to("/tmp/somewhere")
    return "cannot be opened"


def a_file_for_a_socket(path: Path) -> str:
    path.mkdir(mode=0o700)
    (path / "control.sock").write_text("precious")
    return "expected a socket or nothing"


WRONG = [open_to_others, a_link, a_file, below_a_file, a_foreign_owner, a_linked_lock, a_file_for_a_socket]


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_directory_that_cannot_be_trusted_is_refused(path: Path, spoil: Callable[[Path], str]) -> None:
    if spoil is a_foreign_owner and os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    expected = spoil(path)
    with pytest.raises(ConfigError) as error:
        RunDirectory.open(path / "deeper" if spoil is below_a_file else path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_directory_is_not_locked(path: Path) -> None:
    a_file_for_a_socket(path)
    with pytest.raises(ConfigError):
        RunDirectory.open(path)
    (path / "control.sock").unlink()
    with RunDirectory.open(path):
        pass


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107"):
        RunDirectory.open(tmp_path / ("x" * 90))


def test_temporary_directories_are_separate_and_go_with_all_that_is_in_them() -> None:
    with RunDirectory.temporary() as first, RunDirectory.temporary() as second:
        assert first.path != second.path
        assert first.address("events") == f"ipc://{first.path}/events.sock"
        (first.path / "scratch").mkdir()
    assert not first.path.exists() and not second.path.exists()


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGLIVE_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert locate() == Path(f"/tmp/longlive-{os.getuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert locate() == Path(f"/tmp/longlive-{os.getuid()}"), "a runtime directory of another session"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert locate() == tmp_path / "longlive"
    monkeypatch.setenv("LONGLIVE_RUN_DIR", "~/stream")
    assert locate() == Path.home() / "stream"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_RUN_DIR", "stream")
    assert locate() == tmp_path / "stream"
    monkeypatch.setenv("LONGLIVE_RUN_DIR", "~nobody-9/stream")
    with pytest.raises(ConfigError, match="no such home folder"):
        locate()


def _bind(path: Path) -> None:
    """A socket as a dead process leaves it."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_what_a_killed_run_left_of_its_gpu_service_is_cleared(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "mps-abc").mkdir(parents=True)
    run.chmod(0o700)
    (run / "mps-abc" / "control").touch()
    (run / "mps-link").symlink_to(tmp_path / "nowhere")
    with RunDirectory.open(run):
        assert not (run / "mps-abc").exists()
