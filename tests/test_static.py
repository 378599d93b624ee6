"""The fast path is one sequence of operations: traced once it goes on for ever, and it reads nothing back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case, case_id, cases, load, relative_error
from stream_case import CPU, SMALL, case_rollout, embeds, new_rollout, tiny_transformer
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from configs.schema import StreamConfig, VideoConfig
from workers.models.audit import run_watched
from workers.models.denoise import Rollout
from workers.models.noise import DrawnNoise, GivenNoise, NoiseSource
from workers.models.static import Shape, TextKV, padding_biases
from workers.models.static_passes import StaticPasses, all_plans

ropes = pytest.mark.parametrize("rope", ["relative", "absolute"])
WINDOW = 4
"""Blocks of the default window."""


def goes_on(config: dict[str, Any]) -> bool:
    """Whether a golden stream of one prompt is longer than its window."""
    frames = config["num_blocks"] * config["num_frame_per_block"]
    return not config["switch_frame_indices"] and frames > config["local_attn_size"]


UNSWITCHED = [path for path in cases("stream") if goes_on(load(path).config)]


def static_rollout(rope: str, **stream: object) -> tuple[Rollout, StaticPasses]:
    """A static stream under a prompt, at its first block."""
    rollout = new_rollout(tiny_transformer(), StreamConfig(rope=rope, **stream), SMALL, execution="static")
    rollout.switch(embeds(0))
    assert isinstance(rollout.passes, StaticPasses)
    return rollout, rollout.passes


def plain_stream(rope: str, blocks: int) -> Tensor:
    rollout = new_rollout(tiny_transformer(), StreamConfig(rope=rope), SMALL)
    rollout.switch(embeds(0))
    noise = DrawnNoise(0, rollout.shape)
    return torch.cat([rollout.denoise_block(noise) for _ in range(blocks)], 1)


def steady_block(passes: StaticPasses) -> Callable[[], None]:
    """All that a block with a full window does on the device: the sink's move, every step, the clean pass."""
    static, stream = passes.static, passes.stream
    shape = Shape(1, stream.window_blocks, 0, passes.text_keys)

    def block() -> None:
        if stream.rope == "relative" and stream.sink:
            static.store.move_sink(static.sink_turn)
        for step in range(len(static.sigmas)):
            static.step(step, shape)
        static.remember(shape)

    return block


def go_on(
    rollout: Rollout,
    passes: StaticPasses,
    block: Callable[[], object],
    until: int,
    noise: NoiseSource | None = None,
) -> Tensor:
    """Blocks by one function alone, its buffers filled before each; their latents."""
    noise, made = noise or DrawnNoise(0, rollout.shape), []
    for number in range(rollout.block, until):
        passes.fill(rollout.layout.denoise(number, rollout.anchor), number, noise)
        block()
        made.append(passes.static.latents.clone())
    return torch.cat(made)[None]


def first_blocks(rollout: Rollout, noise: NoiseSource | None = None) -> None:
    """Until the window is full."""
    noise = noise or DrawnNoise(0, rollout.shape)
    for _ in range(rollout.stream.window_blocks):
        rollout.denoise_block(noise)


class GivenThenDrawn:
    """A golden case's noise, and drawn noise for the blocks that it does not have."""

    def __init__(self, case: Case, rollout: Rollout) -> None:
        steps = len(rollout.schedule.steps)
        self._given = GivenNoise(case.tensors["noise"], case.tensors["renoise"], rollout.shape, steps)
        self._drawn, self._blocks = DrawnNoise(0, rollout.shape), case.config["num_blocks"]

    def start(self, block: int) -> Tensor:
        return (self._given if block < self._blocks else self._drawn).start(block)

    def between(self, block: int, step: int) -> Tensor:
        return (self._given if block < self._blocks else self._drawn).between(block, step)

    def expect(self, block: int, steps: int) -> None:
        """Nothing is got ready."""


def traced_anew(passes: StaticPasses) -> torch.fx.GraphModule:
    """The operations of a steady block, the buffers as they were before."""
    kept = [(t, t.clone()) for t in passes.static.buffers()]
    traced = make_fx(steady_block(passes))()
    for tensor, before in kept:
        tensor.copy_(before)
    return traced


@pytest.mark.parametrize("path", UNSWITCHED, ids=lambda path: f"{case_id(path)}-static")
@torch.no_grad()
def test_a_block_traced_once_makes_all_that_follow(path: Path, tmp_path: Path) -> None:
    """By PyTorch's operations alone: the golden stream's last blocks, and those after them up to block 20."""
    case = load(path)
    rollout = case_rollout(case, tmp_path / "model", "static")
    passes, window, prompt = rollout.passes, rollout.stream.window_blocks, case.tensors["prompt_embeds"][:1]
    assert isinstance(passes, StaticPasses)
    noise, video = GivenThenDrawn(case, rollout), VideoConfig(height=8 * rollout.shape[2], width=8 * rollout.shape[3])
    rollout.switch(prompt)
    first_blocks(rollout, noise)
    traced = traced_anew(passes)
    assert {node.target.namespace for node in traced.graph.nodes if isinstance(node.target, OpOverload)} == {"aten"}
    made = go_on(rollout, passes, traced, 21, noise)
    plain = new_rollout(rollout.model, rollout.stream, video)
    plain.switch(prompt)
    expected = torch.cat([plain.denoise_block(noise) for _ in range(21)], 1)[:, window * rollout.shape[0] :]
    golden = case.tensors["latents"][:, window * rollout.shape[0] :]
    assert relative_error(made[:, : golden.shape[1]], golden) <= 1e-4
    assert relative_error(made, expected) <= 1e-4


def test_golden_streams_of_both_modes_are_traced() -> None:
    assert {load(path).config["rope"] for path in UNSWITCHED} == {"relative", "absolute"}


@ropes
@torch.no_grad()
def test_a_block_compiles_whole_and_once(rope: str) -> None:
    rollout, passes = static_rollout(rope)
    first_blocks(rollout)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(steady_block(passes), fullgraph=True, backend="aot_eager")
        made = go_on(rollout, passes, compiled, WINDOW + 20)
    assert relative_error(made, plain_stream(rope, WINDOW + 20)[:, 3 * WINDOW :]) <= 1e-4


@ropes
@torch.no_grad()
def test_every_block_does_the_same_and_reads_and_keeps_nothing(rope: str) -> None:
    rollout, passes = static_rollout(rope)
    first_blocks(rollout)
    block, done = steady_block(passes), []
    go_on(rollout, passes, lambda: done.append(run_watched(block, CPU)), WINDOW + 6)
    assert done[0]
    assert all(operations == done[0] for operations in done)


def memory_events(function: Callable[[], object]) -> list[int]:
    """Bytes that every allocation of a function took and every release gave back, as the profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@ropes
@torch.no_grad()
def test_live_bytes_are_equal_after_every_block(rope: str) -> None:
    """What a block allocates it gives back, the same every time; its buffers lie where they lay."""
    rollout, passes = static_rollout(rope)
    first_blocks(rollout)
    block, events = steady_block(passes), []
    before = [tensor.data_ptr() for tensor in passes.static.buffers()]
    go_on(rollout, passes, lambda: events.append(memory_events(block)), WINDOW + 20)
    assert len(events) == 20 and len(events[0]) > 0
    assert [sum(of_block) for of_block in events] == [0] * 20
    assert all(sorted(of_block) == sorted(events[0]) for of_block in events)
    assert [tensor.data_ptr() for tensor in passes.static.buffers()] == before


@ropes
def test_addresses_never_change(rope: str) -> None:
    """Whatever happens: first blocks, a full window, switches and recaches with prompts of any length."""
    rollout, passes = static_rollout(rope)
    noise = DrawnNoise(0, rollout.shape)
    before = [tensor.data_ptr() for tensor in passes.static.buffers()]
    for number in range(12):
        if number in (2, 5, 9):
            rollout.switch(embeds(number)[:, : 1 + number % 4])
        rollout.denoise_block(noise)
    assert [tensor.data_ptr() for tensor in passes.static.buffers()] == before


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sink": 0},
        {"sink": 6, "window": 15},
        {"recache": "recent(3)"},
        {"recache": "blend(3)"},
        {"global_sink": False},
    ],
    ids=str,
)
@ropes
def test_nothing_is_recorded_once_a_stream_runs(change: dict[str, object], rope: str) -> None:
    """`record_all` meets every shape there is; each is recorded once."""
    rollout, passes = static_rollout(rope, **change)
    recorded: list[Callable[[], None]] = []

    def record(function: Callable[[], None]) -> Callable[[], None]:
        recorded.append(function)
        function()
        return function

    passes.record = record
    passes.record_all()
    count = len(recorded)
    assert count > 0
    noise = DrawnNoise(0, rollout.shape)
    for number in range(14):
        if number in (1, 3, 4, 6, 11):
            rollout.switch(embeds(number))
        rollout.denoise_block(noise)
    rollout.resume(9, embeds(1))
    rollout.denoise_block(noise)
    passes.record_all()
    assert len(recorded) == count


def test_plans_of_a_stream_have_few_shapes() -> None:
    """Four lengths while the window fills, and what a recache meets."""
    stream = StreamConfig()
    denoised = {plan.visible for plan, denoises in all_plans(stream) if denoises}
    assert denoised == {1, 2, 3, 4}
    assert {len(plan.slots) for plan, denoises in all_plans(stream) if not denoises} == {1, 2, 3, 4}


@pytest.mark.parametrize("tokens", [1, 5, 6, 31, 32, 63, 200, 255, 256, 512])
def test_padding_counts_as_often_as_it_is_there(tokens: int) -> None:
    """One padding key stands for all: the weights of softmax are those over 512 keys."""
    model = tiny_transformer()
    model.config = model.config.model_copy(update={"text_len": 512})
    text = TextKV(model)
    embedded = torch.randn(1, tokens, model.config.text_dim, generator=torch.Generator().manual_seed(tokens))
    prompt = model.prompt_kv(embedded)
    count = text.put(prompt, tokens)
    assert count in text.lengths
    assert count > tokens or tokens == count == 512
    q = torch.randn(2, 7, model.config.head_dim)
    keys, few = prompt.k[0][0].transpose(0, 1), text.k[0, :count].transpose(0, 1)
    logits = q @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
    cut = q @ few.transpose(1, 2) / math.sqrt(q.shape[-1]) + text.bias[:, :count]
    whole = logits.softmax(-1) @ prompt.v[0][0].transpose(0, 1)
    torch.testing.assert_close(cut.softmax(-1) @ text.v[0, :count].transpose(0, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-6)])
def test_few_keys_weigh_what_all_padding_weighs(dtype: torch.dtype, far: float) -> None:
    """Whatever their number, and with biases that a dtype holds: bfloat16 alone would be up to 3 % off."""
    for count in range(513):
        biases = padding_biases(count, dtype)
        assert len(biases) == min(count, 1 if dtype == torch.float32 else 3)
        assert torch.equal(torch.tensor(biases).to(dtype).double(), torch.tensor(biases).double())
        assert sum(math.exp(bias) for bias in biases) == pytest.approx(count, rel=far)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 5, 6])
def test_biases_of_a_prompt_are_of_the_models_dtype(tokens: int, dtype: torch.dtype) -> None:
    """As kernels on a GPU want them."""
    text, model = TextKV(tiny_transformer().to(dtype)), tiny_transformer().to(dtype)
    count = text.put(model.prompt_kv(embeds(0)[:, :1].expand(1, tokens, -1)), tokens)
    assert text.bias.dtype == dtype and count == model.config.text_len
    assert float(text.bias.double().exp().sum()) == pytest.approx(model.config.text_len, rel=1e-4)
