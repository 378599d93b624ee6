"""A worker's end, whatever ended it."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeDriver, FakeGpus

from configs.load import load_config
from configs.schema import RuntimeConfig, StageName
from ipc import cuda_ipc
from ipc.errors import RingError
from orchestrator.rings import RingHouse
from workers import assembly, process
from workers.assembly import Assembly
from workers.process import Worker
from workers.spec import PassedFd, PassedRing, RunLimits, WorkerSpec


class Unclosable:
    """What a worker has after a CUDA error: every later call of the driver fails too."""

    def __init__(self, *_: object) -> None:
        self.closed = 0

    def close(self) -> None:
        raise RingError("cudaIpcCloseMemHandle failed: cudaErrorIllegalAddress")


def spec_of(config: RuntimeConfig, directory: Path, stage: StageName) -> WorkerSpec:
    """Of a worker with one stage, without rings."""
    return WorkerSpec(
        name=stage,
        stages=(stage,),
        config=config.model_dump_json(),
        directory=directory,
        parent=0,
        rings={},
        history=PassedFd(-1),
        limits=RunLimits(),
        log=None,
    )


@pytest.mark.parametrize("code", [0, 1, 2])
def test_memory_that_cannot_be_closed_does_not_keep_last_words_back(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context, which sends what is queued as it ends, is ended all the same; the code stays a person's error."""
    spec = spec_of(load_config("pocket"), tmp_path, "vae_decoder")
    monkeypatch.setattr(process, "Assembly", Unclosable)
    monkeypatch.setattr(Worker, "_run_stage", lambda worker, *_: worker._codes.append(code))
    worker = Worker(spec)
    assert worker.run() == max(code, 1)
    assert worker._context.closed


def test_a_worker_has_its_variables_before_it_loads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reads them once, when it is first used."""
    monkeypatch.delenv("LONGLIVE_TEST", raising=False)
    seen = []

    class Looks:
        def __init__(self, spec: WorkerSpec) -> None:
            seen.append(os.environ["LONGLIVE_TEST"])

        def run(self) -> int:
            return 0

    spec = replace(spec_of(load_config("pocket"), tmp_path, "output"), environment={"LONGLIVE_TEST": "there"})
    monkeypatch.setattr(process, "Worker", Looks)
    for name in ("_end_with_parent", "_ignore_terminal_signals", "_start_log"):
        monkeypatch.setattr(process, name, lambda *_: None)
    monkeypatch.setattr(process.logging, "shutdown", lambda: None)
    monkeypatch.setattr(process.os, "_exit", seen.append)
    process.main(spec)
    monkeypatch.delenv("LONGLIVE_TEST")
    assert seen == ["there", 0]


@pytest.mark.parametrize(("stage", "priority"), [("text_encoder", -1), ("denoiser", 0), ("vae_decoder", 0)])
def test_the_text_encoder_s_stream_goes_before_others(
    stage: StageName, priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In CUDA a lower number does."""
    streams: list[int] = []
    monkeypatch.setattr(assembly, "_check_gpu", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: streams.append(priority))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    threads = torch.get_num_threads()
    of = SimpleNamespace(_config=load_config("pocket", ["device=cuda"]))
    with Assembly.thread_settings(of, stage):  # type: ignore[arg-type]
        assert streams == [priority]
    torch.set_num_threads(threads)


def own(passed: PassedFd) -> PassedFd:
    """As a worker of its own would have it, which closes it."""
    return PassedFd(os.dup(passed.fd))


def test_exported_memory_is_not_freed_by_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder may still have it mapped, and under a mapping freeing is undefined; it goes with the process."""
    gpus, sent = FakeGpus(("GPU-a",)), []
    monkeypatch.setattr(cuda_ipc, "RealDriver", lambda: FakeDriver(gpus))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    monkeypatch.setattr(Assembly, "_send", lambda *_: sent.append)
    config = load_config("pocket", ["device=cuda:0", "placement=process"])
    house = RingHouse(config)
    rings = {
        name: PassedRing(own(ring.header), own(ring.memory) if ring.memory else None)
        for name, ring in house.passed().items()
    }
    spec = replace(spec_of(config, tmp_path, "denoiser"), rings=rings, history=own(house.history))
    assembly = Assembly(config, spec, None)  # type: ignore[arg-type]
    assembly.build("denoiser", lambda: None)
    assembly.close()
    house.close()
    assert gpus.log == ["allocate", "export"]
    assert [message.type for message in sent] == ["ring_exported"]
