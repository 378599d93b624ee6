"""Which workers there are, and which count as hung; with told time and no process."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.load import load_config
from configs.schema import StageName
from ipc.messages import Heartbeat
from orchestrator.rings import RingHouse
from orchestrator.supervisor import NS, Supervisor, Worker, worker_groups
from workers.spec import RunLimits, WorkerSpec


class Bench:
    """A supervisor whose workers are made up."""

    def __init__(self) -> None:
        config = load_config("pocket", ["supervision.hang_s=2", "supervision.start_s=100"])
        self.now = 0
        self.rings = RingHouse(config)
        self.supervisor = Supervisor(config, Path("/"), self.rings, RunLimits(), None, clock=lambda: self.now)
        self.killed: list[str] = []
        self.supervisor._signal = lambda worker, number: self.killed.append(worker.name)  # type: ignore[method-assign]

    def add(self, name: StageName) -> Worker:
        process = SimpleNamespace(pid=1, exitcode=None)
        worker = Worker(name, (name,), process, pidfd=-1, started_ns=self.now)  # type: ignore[arg-type]
        self.supervisor.workers[name] = worker
        return worker

    def beat(self, name: StageName, progress: int) -> None:
        self.supervisor.heartbeat(
            Heartbeat(stage=name, progress=progress, busy=False, memory_bytes=0, device_memory_bytes=0)
        )

    def at(self, seconds: float) -> dict[str, str]:
        self.now = int(seconds * NS)
        return self.supervisor.kill_overdue()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_loading_may_take_longer_than_hanging(bench: Bench) -> None:
    """A stage that loads for a minute makes no progress meanwhile, and is not hung when it is up."""
    bench.add("denoiser")
    for second in range(60):
        bench.beat("denoiser", 0)
        assert bench.at(second) == {}
    bench.supervisor.ready("denoiser")
    bench.beat("denoiser", 0)
    assert bench.at(60.5) == {}


def test_every_worker_is_given_the_variables_of_its_own_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say may have changed when one is started again."""
    config, starts = load_config("pocket"), iter(range(99))
    rings = RingHouse(config)
    given: list[WorkerSpec] = []

    class Spawned:
        pid = os.getpid()

        def __init__(self, args: tuple[WorkerSpec], **_: object) -> None:
            given.extend(args)

        def start(self) -> None:
            """Nothing runs."""

    monkeypatch.setattr(multiprocessing, "get_context", lambda way: SimpleNamespace(Process=Spawned))
    supervisor = Supervisor(config, Path("/"), rings, RunLimits(), None, lambda stages: {stages[0]: str(next(starts))})
    supervisor.start(["denoiser", "output"])
    supervisor.start(["denoiser"])
    assert [(spec.name, spec.environment) for spec in given] == [
        ("denoiser", {"denoiser": "0"}),
        ("output", {"output": "1"}),
        ("denoiser", {"denoiser": "2"}),
    ]
    rings.close()


def test_no_progress_is_hung(bench: Bench) -> None:
    bench.add("denoiser")
    bench.supervisor.ready("denoiser")
    for tenth in range(20):
        bench.beat("denoiser", tenth)
        assert bench.at(tenth) == {}
    assert bench.at(21.5) == {"denoiser": "hung: denoiser made no progress for 2 s"}
    assert bench.killed == ["denoiser"]


def test_a_worker_that_never_gets_ready_is_given_up(bench: Bench) -> None:
    bench.add("vae_decoder")
    assert bench.at(99) == {}
    assert bench.at(101) == {"vae_decoder": "not ready after 100 s"}


def test_a_worker_that_says_nothing_after_ready_is_hung(bench: Bench) -> None:
    """Stopped before its first heartbeat."""
    bench.add("output")
    bench.supervisor.ready("output")
    assert bench.at(3) == {"output": "hung: output made no progress for 2 s"}


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ((), ["text_encoder", "denoiser", "vae_decoder", "output"]),
        (("placement=thread",), ["models", "output"]),
        (("stages.denoiser.placement=thread",), ["models", "text_encoder", "vae_decoder", "output"]),
    ],
    ids=str,
)
def test_placement_says_who_shares_a_process(settings: tuple[str, ...], groups: list[str]) -> None:
    made = worker_groups(load_config("pocket", settings))
    assert list(made) == groups
    assert sorted(stage for stages in made.values() for stage in stages) == sorted(
        ["text_encoder", "denoiser", "vae_decoder", "output"]
    )
