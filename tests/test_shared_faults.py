"""What the daemon decides when workers that share a GPU fall together; no process is started."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from configs.load import load_config
from configs.schema import StageName
from ipc.messages import EndOfStream, Message
from orchestrator.daemon import Daemon, Phase
from orchestrator.prepare import live_plan
from orchestrator.run_directory import RunDirectory
from orchestrator.supervisor import Worker

NAMES: tuple[StageName, ...] = ("text_encoder", "denoiser", "vae_decoder", "output")
FAULT = "AcceleratorError: CUDA error: made up"


class Bench:
    """A daemon at work, whose workers are made up and share a GPU through a service of its own."""

    def __init__(self, stack: ExitStack) -> None:
        config = load_config("pocket", ["device=cuda"])
        directory = stack.enter_context(RunDirectory.temporary())
        self.now = 1
        plan = live_plan(config, None, None)
        self.daemon = Daemon(config, plan, directory, Mock(), stack, clock=lambda: self.now)
        self.daemon._mps = Mock(is_there=True)
        self.daemon._phase = Phase.RUNNING
        self.killed: list[str] = []
        self.sent: list[tuple[str, Message]] = []
        self.daemon._supervisor.kill = lambda worker: self.killed.append(worker.name)  # type: ignore[method-assign]
        self.daemon._send = lambda stage, message: self.sent.append((stage, message))  # type: ignore[method-assign]
        for name in NAMES:
            self.start(name)

    def start(self, name: StageName) -> None:
        process = SimpleNamespace(pid=1, exitcode=1)
        self.daemon._supervisor.workers[name] = Worker(name, (name,), process, -1, self.now)  # type: ignore[arg-type]

    def dies(self, name: StageName, reason: str) -> None:
        """A moment later."""
        self.now += 1
        self.daemon._reasons[name] = (reason, False)
        self.daemon._died(self.daemon._supervisor.workers.pop(name), "exit code 1")

    def is_again(self) -> None:
        """All that died are started again."""
        self.now += 1
        for name in NAMES:
            if name not in self.daemon._supervisor.workers:
                self.daemon._forget_reasons(name)
                self.start(name)
        self.killed.clear()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


def test_a_fault_ends_the_others_on_gpus_once(bench: Bench) -> None:
    """One of them that meets it too does not end what was started again since."""
    bench.dies("denoiser", FAULT)
    assert bench.killed == ["text_encoder", "vae_decoder"]
    bench.start("denoiser")
    bench.dies("vae_decoder", FAULT)
    assert bench.killed == ["text_encoder", "vae_decoder"]
    assert bench.daemon._mps is not None
    assert bench.daemon._mps.spoil.call_count == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("reason", "is_there"), [("ValueError: made up", True), (FAULT, False)])
def test_other_deaths_end_nobody_else(bench: Bench, reason: str, is_there: bool) -> None:
    bench.daemon._mps = Mock(is_there=is_there)
    bench.dies("denoiser", reason)
    assert bench.killed == []


def test_deaths_by_another_s_fault_do_not_end_a_run(bench: Bench) -> None:
    for culprit in (*2 * ("denoiser", "vae_decoder"), "text_encoder", "denoiser", "vae_decoder"):
        bench.dies(culprit, FAULT)
        for victim in list(bench.killed):
            bench.dies(victim, FAULT)  # type: ignore[arg-type]
        bench.is_again()
    assert bench.daemon._phase is Phase.RUNNING


def test_a_second_failure_while_outputs_are_closed_does_not_cut_them_off(bench: Bench) -> None:
    for _ in range(5):
        bench.dies("denoiser", "ValueError: made up")
        bench.is_again()
    assert bench.daemon._phase is Phase.DRAINING
    for _ in range(5):
        bench.dies("vae_decoder", "ValueError: made up")
        bench.is_again()
    assert bench.daemon._phase is Phase.DRAINING
    assert ("output", EndOfStream(blocks=0)) in bench.sent
    bench.dies("output", "ValueError: made up")
    assert bench.daemon._phase is Phase.ENDED


def test_of_several_last_words_a_person_s_error_counts(bench: Bench) -> None:
    worker = bench.daemon._supervisor.workers["denoiser"]
    worker.stages = ("denoiser", "vae_decoder")
    bench.daemon._reasons |= {"denoiser": (FAULT, False), "vae_decoder": ("config: found 1, expected 2", True)}
    assert bench.daemon._last_words(worker) == ("config: found 1, expected 2", True)
    assert bench.daemon._reasons == {}


def test_only_workers_on_gpus_are_clients(bench: Bench) -> None:
    assert bench.daemon._mps is not None
    bench.daemon._mps.for_worker.return_value = {"A": "b"}  # type: ignore[attr-defined]
    assert bench.daemon._worker_environment(("denoiser",)) == {"A": "b"}
    assert bench.daemon._worker_environment(("output",)) == {}
