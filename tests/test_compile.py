"""Compiled, the static path gives what it gives; nothing is compiled once a stream runs."""

from functools import partial

import pytest
import torch
from golden_cases import relative_error
from stream_case import SMALL, embeds, tiny_transformer
from torch import Tensor
from torch._dynamo.utils import counters

from configs.schema import KVKind, StreamConfig
from workers.models.attention import Attend, attend_sdpa
from workers.models.denoise import Rollout
from workers.models.fp8 import Fp8Linears, MakeLinear, plain_linear
from workers.models.fp8_attention import widened
from workers.models.noise import DrawnNoise
from workers.models.static_passes import StaticPasses


def blocks(passes: StaticPasses, number: int, switches: tuple[int, ...]) -> Tensor:
    """The clean latents of a stream's first blocks."""
    rollout = Rollout(passes.model, passes.stream, SMALL, passes=passes)
    noise, made = DrawnNoise(0, rollout.shape), []
    for block in range(number):
        if block in (0, *switches):
            rollout.switch(embeds(block))
        made.append(rollout.denoise_block(noise))
    return torch.cat(made, 1)


def assert_compiled_equals(
    stream: StreamConfig,
    kv: KVKind = "model",
    switches: tuple[int, ...] = (),
    linear: MakeLinear = plain_linear,
    attend_fp8: Attend | None = None,
) -> None:
    """Over 21 blocks after everything was compiled; a stream that compiles more would raise."""
    model = tiny_transformer()
    build = partial(StaticPasses, model, stream, SMALL, kv=kv, linear=linear, attend_fp8=attend_fp8)
    plain = blocks(build(), 21, switches)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    passes = build(compiled=True)
    passes.record_all()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= before + 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = blocks(passes, 21, switches)
    assert counters["stats"]["unique_graphs"] == graphs
    assert relative_error(compiled, plain) <= 1e-5


@pytest.mark.parametrize(
    ("stream", "kv"),
    [
        (StreamConfig(rope="relative"), "model"),
        (StreamConfig(rope="absolute", global_sink=False), "int8"),
        (StreamConfig(frames_per_block=1, window=7, sink=2, steps=(1000,)), "model"),
    ],
    ids=["relative", "absolute-int8", "many-shapes"],
)
def test_every_shape_is_compiled_before_a_stream_begins(
    stream: StreamConfig, kv: KVKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compilation of each of the three methods serves all layers and steps, and none is left for later."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert_compiled_equals(stream, kv, switches=(1, 3, 9, 14))


def test_layers_that_differ_in_fp8_are_compiled_before_a_stream_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear is kept; a layer ends with what the next one takes, and the last with a tensor for the head."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    stream = StreamConfig(frames_per_block=1, window=2, sink=1, steps=(1000,))
    assert_compiled_equals(stream, switches=(1, 4), linear=Fp8Linears(["blocks.0.ffn.2"]))


@pytest.mark.parametrize("sink", [0, 2])
def test_a_block_that_sees_itself_alone_is_compiled_too(sink: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention in fp8 it asks in another dtype than the blocks after it, the sink's second among them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    stream = StreamConfig(frames_per_block=1, window=4, sink=sink, steps=(1000,))
    assert_compiled_equals(stream, switches=(1, 3, 9), attend_fp8=widened(attend_sdpa, torch.float32))


@pytest.mark.timeout(300)
def test_generated_code_equals_the_operations() -> None:
    """By the compiler's own C++, for the one shape of a window of one block."""
    assert_compiled_equals(StreamConfig(frames_per_block=1, window=1, sink=0, steps=(1000, 500)), switches=(4,))
