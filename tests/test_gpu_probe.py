"""The probe of CUDA IPC: its children end in time, and its questions tell a driver as assumed from another."""

import sys
from pathlib import Path
from typing import Any

import ipc_probe_child
import ipc_probe_lab
import probe_cuda_ipc
import psutil
import pytest
import torch
from fake_cuda import FakeDriver, FakeGpus
from ipc_probe_lab import Answer, Child, Deadline, Lab, Unanswered
from probe_cuda_ipc import Finding, ask, line

RING = 4 << 20
SILENT = "import time; time.sleep(600)"
DYING = "import sys; sys.stdin.readline(); print('libcuda is gone', file=sys.stderr); sys.exit(3)"
ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def child(program: str, seconds: float = 20.0) -> Child:
    return Child(Deadline(seconds), (sys.executable, "-c", program))


def test_a_child_that_does_not_answer_is_killed() -> None:
    silent = child(SILENT)
    with pytest.raises(Unanswered, match="read: no answer in time"):
        silent.ask("read", limit_s=0.1)
    assert not psutil.pid_exists(silent.pid)
    silent.end()


def test_no_answer_takes_longer_than_the_whole_run_may() -> None:
    silent = child(SILENT, seconds=0.1)
    with pytest.raises(Unanswered, match="no answer in time"):
        silent.ask("read")
    silent.end()


def test_a_child_that_died_is_told_with_its_last_words() -> None:
    dying = child(DYING)
    with pytest.raises(Unanswered, match="read: child ended by exit code 3: libcuda is gone"):
        dying.ask("read")
    dying.end()


def test_who_asks_a_killed_child_is_told() -> None:
    killed = child(ECHO)
    assert killed.ask("read", slot=1) == {"ask": "read", "slot": 1}
    killed.kill()
    with pytest.raises(Unanswered, match="read: child ended by SIGKILL"):
        killed.ask("read")
    killed.end()


def test_without_a_gpu_the_probe_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(probe_cuda_ipc, "AHEAD", 1)
    seen = 'print(\'{"gpus": [], "torch": "2.13.0+cpu", "cuda": null}\', flush=True)'
    monkeypatch.setattr(ipc_probe_lab.Child.__init__, "__defaults__", ((sys.executable, "-c", seen), None))
    monkeypatch.setattr(sys, "argv", ["probe_cuda_ipc.py"])
    assert probe_cuda_ipc.main() == 1
    assert capsys.readouterr().err == "error: needs an NVIDIA GPU, found none that torch 2.13.0+cpu can use\n"


class SimulatedChild(ipc_probe_child.Child):
    """The child's own code in this process, over the fake driver; memory holds what is allocated or mapped."""

    def __init__(self, gpus: FakeGpus, pid: int) -> None:
        super().__init__()
        self._gpus, self._pid = gpus, pid
        self._device = torch.device("cuda", 0)
        self._driver = FakeDriver(gpus)
        self._late: list[tuple[int, int]] = []

    def ask(self, name: str, **given: Any) -> Answer:
        try:
            return getattr(self, name)(**given)
        except Exception as error:  # as in the child
            return {"error": str(error)}

    def must(self, name: str, **given: Any) -> Answer:
        answer = self.ask(name, **given)
        if "error" in answer:
            raise Unanswered(f"{name}: {answer['error']}")
        return answer

    def receive(self, message: Answer) -> Answer:
        return super().receive(message | {"pid": 1})

    def alive(self) -> Answer:
        return {"sum": 1000}

    def used(self) -> Answer:
        return {"bytes": sum(len(memory) for memory in {id(m): m for m in self._gpus.memory.values()}.values())}

    def publish(self, slot: int, value: int, cycles: int, wait: bool = True) -> Answer:
        for late in self._late:
            self._slot(late[0]).fill_(late[1])
        self._late = [] if wait else [(slot, value)]
        if wait:
            self._slot(slot).fill_(value)
        return {}

    def kill(self) -> None:
        self._driver.die()


class SimulatedLab(Lab):
    def __init__(self, gpus: FakeGpus, kind: type[SimulatedChild] = SimulatedChild) -> None:
        super().__init__(Deadline(20))
        self._gpus, self._kind = gpus, kind

    def child(self, device: int = 0, env: dict[str, str] | None = None) -> SimulatedChild:  # type: ignore[override]
        return self._kind(self._gpus, 100)

    def machine(self) -> Answer:
        return {"gpus": ["one"]}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {"RING": RING, "STEADY_S": 0.0, "ROUNDS": 20}.items():
        monkeypatch.setattr(probe_cuda_ipc, name, value)
    return FakeGpus(("GPU-a",))


def found(number: int, gpus: FakeGpus, kind: type[SimulatedChild] = SimulatedChild) -> Finding:
    return ask(number, SimulatedLab(gpus, kind), Deadline(20))


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8, 9])
def test_a_driver_as_documented_agrees(number: int, gpus: FakeGpus) -> None:
    finding = found(number, gpus)
    assert finding.agrees is True, line(finding)


class DropsMappings(FakeDriver):
    """Memory goes with its producer, mapped or not."""

    def die(self) -> None:
        for pointer in self._own:
            for mapped, theirs in list(self._gpus.mapped.items()):
                if theirs == pointer:
                    self._gpus.memory[mapped] = bytearray(len(self._gpus.memory[pointer]))
        super().die()


class Forgetful(SimulatedChild):
    def __init__(self, gpus: FakeGpus, pid: int) -> None:
        super().__init__(gpus, pid)
        self._driver = DropsMappings(gpus)

    def read(self, slot: int = 0) -> Answer:
        at = self._importer._pointer  # type: ignore[union-attr]
        return self.look_at(at, 64)  # type: ignore[arg-type]


class Early(SimulatedChild):
    """Answers before what it wrote can be seen."""

    def publish(self, slot: int, value: int, cycles: int, wait: bool = True) -> Answer:
        return super().publish(slot, value, cycles, wait=False)


@pytest.mark.parametrize(("number", "kind"), [(3, Forgetful), (9, Early)])
def test_another_driver_differs(number: int, kind: type[SimulatedChild], gpus: FakeGpus) -> None:
    finding = found(number, gpus, kind)
    assert finding.agrees is False, line(finding)
    assert "DIFFERS" in line(finding)


def test_a_question_that_fails_says_why_and_compares_nothing(gpus: FakeGpus) -> None:
    gpus.shares = False
    finding = found(1, gpus)
    assert (finding.agrees, "failed: export: " in finding.seen) == (None, True)
    assert "\n" not in finding.seen
    assert ask(1, SimulatedLab(gpus), Deadline(0)).seen == "not asked: the time is over"


def test_one_gpu_is_said(gpus: FakeGpus) -> None:
    assert (found(7, gpus).seen, found(7, gpus).agrees) == ("one GPU", None)


SPEEDS = {"products": 500.0, "copies": 1000.0, "spins": 800.0}


@pytest.mark.parametrize(("beside", "agrees"), [(1.0, True), (0.5, False)])
def test_shares_of_the_speed_alone(
    beside: float, agrees: bool, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes get half each; streams of one process get `beside` of what each gets alone."""

    def rates(children: list[Child], groups: list[list[str]]) -> list[float]:
        kinds = [kind for group in groups for kind in group]
        part = 1.0 if len(kinds) == 1 else 0.5 if len(groups) == 2 else beside
        return [SPEEDS[kind] * part for kind in kinds]

    monkeypatch.setattr(probe_cuda_ipc, "rates", rates)
    monkeypatch.setattr(probe_cuda_ipc.shutil, "which", lambda name: None)
    finding = found(10, gpus)
    assert finding.agrees is agrees
    assert finding.values["processes, spins + spins"] == [0.5, 0.5]
    assert "MPS: no nvidia-cuda-mps-control here" in finding.seen


CONTROL = """#!/bin/sh
read -r word rest
echo "$# $word $CUDA_MPS_PIPE_DIRECTORY" >> {seen}
"""


def test_mps_is_private_and_ended_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control, seen = tmp_path / "nvidia-cuda-mps-control", tmp_path / "seen"
    control.write_text(CONTROL.format(seen=seen))
    control.chmod(0o755)
    monkeypatch.setattr(probe_cuda_ipc.shutil, "which", lambda name: str(control))
    with pytest.raises(Unanswered), probe_cuda_ipc.mps() as (env, why_not):
        assert (why_not, env is None) == (None, False)
        raise Unanswered("a client")
    assert env is not None
    pipe = env["CUDA_MPS_PIPE_DIRECTORY"]
    assert seen.read_text().splitlines() == [f"1  {pipe}", f"0 quit {pipe}"]
    assert not Path(pipe).exists()
