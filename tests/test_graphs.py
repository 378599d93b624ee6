"""Capture and replay, on a fake of `torch.cuda`: what is recorded when, into which memory, and what a replay does."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from fake_graphs import FakeCuda
from golden_cases import relative_error
from stream_case import CPU, SMALL, embeds, new_rollout, tiny_transformer

from configs.schema import StreamConfig
from workers.models.graphs import WARM_UPS, CudaGraphs
from workers.models.noise import DrawnNoise
from workers.models.static_passes import StaticPasses


def test_a_function_is_warmed_up_then_captured_once() -> None:
    """In Python it never runs again: a replay does what it did to the same memory."""
    cuda, ran = FakeCuda(), []
    numbers = torch.zeros(3)

    def add_one() -> None:
        ran.append(list(cuda.log))
        numbers.add_(1).mul_(1)

    replay = CudaGraphs(CPU, cuda)(add_one)
    assert ran == [[]] * WARM_UPS + [[("capture", 1)]]
    numbers.zero_()
    for count in (1, 2, 3):
        replay()
        assert numbers.tolist() == [count] * 3
    assert len(ran) == WARM_UPS + 1
    assert cuda.log[1:] == ["replay"] * 3


def test_all_graphs_of_a_recorder_share_one_pool() -> None:
    """Only one of them runs at a time, so what they need in between can be the same memory."""
    cuda = FakeCuda()
    record, other = CudaGraphs(CPU, cuda), CudaGraphs(CPU, cuda)
    for _ in range(3):
        record(lambda: None)
    other(lambda: None)
    assert cuda.log == [("capture", 1)] * 3 + [("capture", 2)]


def test_stages_in_threads_record_one_at_a_time() -> None:
    """What begins a capture synchronises the device, which another capture forbids."""
    cuda, at_once = FakeCuda(), []
    begun, go_on = threading.Event(), threading.Event()

    def held() -> None:
        at_once.append("in")
        begun.set()
        go_on.wait(10)
        at_once.append("out")

    def passed() -> None:
        at_once.append("other")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(CudaGraphs(CPU, cuda), held)
        assert begun.wait(10)
        second = threads.submit(CudaGraphs(CPU, cuda), passed)
        assert not wait((second,), 0.2).done
        go_on.set()
        first.result(10), second.result(10)
    assert at_once == ["in", "out"] * (WARM_UPS + 1) + ["other"] * (WARM_UPS + 1)


def captures(cuda: FakeCuda) -> int:
    return sum(entry == ("capture", 1) for entry in cuda.log)


@pytest.mark.parametrize(
    ("rope", "recache", "graphs"),
    # Four lengths of the window, each with four steps and a clean pass; four more recaches; the sink's move.
    [("relative", "full", 25), ("absolute", "full", 24), ("relative", "blend(1.5)", 24)],
)
def test_a_stream_of_replays_equals_the_plain_stream(rope: str, recache: str, graphs: int) -> None:
    """All is captured at warm-up; from then on first blocks, a full window, switches, recaches and a restart replay."""
    model, cuda = tiny_transformer(), FakeCuda()
    stream = StreamConfig(rope=rope, recache=recache)
    plain, fast = (new_rollout(model, stream, SMALL, execution=way) for way in ("plain", "static"))
    assert isinstance(fast.passes, StaticPasses)
    fast.passes.record = CudaGraphs(CPU, cuda)
    fast.passes.record_all()
    assert captures(cuda) == graphs
    noise = DrawnNoise(0, plain.shape)
    for block in range(12):
        for rollout in (plain, fast):
            if block in (0, 2, 6, 7):
                rollout.switch(embeds(block)[:, : 1 + block % 4])
            if block == 10:
                rollout.resume(10, embeds(1))
        assert relative_error(fast.denoise_block(noise), plain.denoise_block(noise)) <= 1e-4
    assert captures(cuda) == graphs
    assert cuda.log.count("replay") >= 12 * 5
