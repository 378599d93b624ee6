"""Streams through the function that the denoiser process calls: golden, endless, and against an oracle."""

import gc
from pathlib import Path

import psutil
import pytest
import torch
from golden_cases import case_id, cases, load, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_case import SMALL, case_rollout, embeds, new_rollout, oracle, play, tiny_transformer

from configs.schema import Execution, StreamConfig
from ipc.errors import NonFiniteLatents
from workers.models.denoise import LatentHistory, Rollout
from workers.models.kv_cache import CachePlan
from workers.models.noise import DrawnNoise
from workers.models.passes import PlainPasses
from workers.models.static_passes import StaticPasses

STREAMS = cases("stream")


def execution_id(execution: str) -> str:
    return execution


both = pytest.mark.parametrize("execution", ["plain", "static"], ids=execution_id)


@both
@pytest.mark.parametrize("path", STREAMS, ids=case_id)
def test_stream_equals_the_reference(path: Path, execution: Execution, tmp_path: Path) -> None:
    """Every clean latent of a stream, with its switches and its LoRA."""
    case = load(path)
    rollout = case_rollout(case, tmp_path / "model", execution)
    torch.testing.assert_close(
        torch.tensor(rollout.schedule.steps), case.tensors["denoising_steps"].float(), rtol=1e-6, atol=1e-3
    )
    assert relative_error(play(case, rollout), case.tensors["latents"]) <= 1e-4


def recaches_of_the_ring(path: Path) -> bool:
    """Whether a case has a prompt switch after its window has slid, at which the sink is kept."""
    config = load(path).config
    switches = config["switch_frame_indices"]
    return bool(config["global_sink"] and switches and max(switches) > config["local_attn_size"])


@both
@pytest.mark.parametrize("path", [path for path in STREAMS if recaches_of_the_ring(path)], ids=case_id)
def test_a_recache_of_nine_latents_equals_the_reference(path: Path, execution: Execution, tmp_path: Path) -> None:
    """The sink is kept, so that the window without it is all that is computed: exact in every block that follows."""
    case = load(path)
    rollout = case_rollout(case, tmp_path / "model", execution)
    remember, recached = rollout.passes.remember, []

    def watched(plan: CachePlan, clean: torch.Tensor) -> None:
        if len(plan.slots) > 1:
            recached.append((clean.shape[1], plan.visible))
        remember(plan, clean)

    rollout.passes.remember = watched  # type: ignore[method-assign]
    made, stream = play(case, rollout), rollout.stream
    assert recached[-1] == (stream.window - stream.sink, stream.window_blocks)
    after = max(case.config["switch_frame_indices"])
    assert relative_error(made[:, after:], case.tensors["latents"][:, after:]) <= 1e-4


@pytest.mark.parametrize("path", STREAMS, ids=case_id)
def test_single_pass_equals_the_reference(path: Path, tmp_path: Path) -> None:
    """Flow and clean latent of one pass over the first block with an empty cache."""
    case = load(path)
    rollout = case_rollout(case, tmp_path / "model")
    rollout.switch(case.tensors["prompt_embeds"][:1])
    timestep = float(case.tensors["single/timestep"].flatten()[0])
    noise = case.tensors["noise"][:, : rollout.shape[0]]
    passes = rollout.passes
    assert isinstance(passes, PlainPasses)
    with torch.inference_mode():
        flow = rollout.model(noise, timestep, passes.prompt, passes.cache, rollout.layout.denoise(0, 0))
    assert relative_error(flow, case.tensors["single/flow"]) <= 1e-4
    assert relative_error(rollout.schedule.clean(noise, flow, timestep), case.tensors["single/x0"]) <= 1e-4


@both
@pytest.mark.parametrize("path", [p for p in STREAMS if load(p).config["rope"] == "relative"], ids=case_id)
def test_relative_stream_does_not_depend_on_where_it_begins(path: Path, execution: Execution, tmp_path: Path) -> None:
    """At latent frame 3,000,000 the reference's latents come out as at 0."""
    case = load(path)
    far = play(case, case_rollout(case, tmp_path / "model", execution, first_position=3_000_000))
    assert relative_error(far, case.tensors["latents"]) <= 1e-4


def tensors() -> tuple[int, int]:
    """How many tensors are alive and how many bytes they hold."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(alive), sum(tensor.nbytes for tensor in alive)


@both
def test_endless_stream_stays_finite_and_memory_flat(execution: Execution) -> None:
    """2,000 latent frames: the picture keeps its strength, no tensor is kept, the process does not grow."""
    stream = StreamConfig(rope="relative")
    rollout = new_rollout(tiny_transformer(), stream, SMALL, execution=execution)
    rollout.switch(embeds(0))
    noise = DrawnNoise(0, rollout.shape)
    for _ in range(100):
        latents = rollout.denoise_block(noise)
    before, bytes_before = tensors(), psutil.Process().memory_info().rss
    for _ in range(100, 667):
        latents = rollout.denoise_block(noise)
    assert rollout.block * stream.frames_per_block >= 2000
    assert 0.01 < float(latents.std()) < 100
    assert all(now <= then for now, then in zip(tensors(), before, strict=True))
    assert psutil.Process().memory_info().rss - bytes_before < 8 * 2**20


def test_endless_stream_does_not_depend_on_where_it_begins() -> None:
    """The same 2,000 latent frames, begun at 3,000,000, with switches on the way: nothing adds up."""
    model = tiny_transformer()
    near, far = (
        new_rollout(model, StreamConfig(rope="relative", first_position=position), SMALL, execution="static")
        for position in (0, 3_000_000)
    )
    noise = DrawnNoise(0, near.shape)
    for block in range(667):
        if block % 111 == 0:
            near.switch(embeds(block))
            far.switch(embeds(block))
        assert relative_error(far.denoise_block(noise), near.denoise_block(noise)) <= 1e-4, f"block {block}"


def test_latents_that_are_no_numbers_are_refused() -> None:
    """They would be decoded to black, and stay in the cache."""
    model = tiny_transformer()
    with torch.no_grad():
        model.head.head.bias[0] = float("nan")
    rollout = Rollout(model, StreamConfig(), SMALL)
    rollout.switch(embeds(0))
    with pytest.raises(NonFiniteLatents, match="block 0"):
        rollout.denoise_block(DrawnNoise(0, rollout.shape))
    assert bool(torch.isfinite(rollout.history.buffer).all())


GEOMETRIES = {
    "defaults": {},
    "absolute": {"rope": "absolute"},
    "no sink": {"sink": 0},
    "wide sink": {"sink": 6, "window": 15},
    "short window": {"window": 6},
    "window of sink and block": {"window": 9, "sink": 6},
    "blocks of two": {"frames_per_block": 2, "window": 8, "sink": 2},
    "blocks of one": {"frames_per_block": 1, "window": 5, "sink": 2},
    "two steps": {"steps": (1000, 500)},
    "one step": {"steps": (1000,)},
    "steps not warped": {"warp_steps": False, "steps": (999, 600)},
    "context noise": {"context_noise": 128},
    "sink re-anchored": {"global_sink": False},
    "sink re-anchored, absolute": {"global_sink": False, "rope": "absolute"},
    "far": {"first_position": 3_000_000},
}


def differs(stream: StreamConfig, switches: frozenset[int], blocks: int, execution: Execution) -> float:
    """How far a rollout is from the oracle."""
    model = tiny_transformer()
    rollout = new_rollout(model, stream, SMALL, execution=execution)
    noise = DrawnNoise(3, rollout.shape)
    prompts = {block: embeds(block) for block in {0, *switches}}
    made = []
    for block in range(blocks):
        if block in prompts:
            rollout.switch(prompts[block])
        made.append(rollout.denoise_block(noise))
    return relative_error(torch.cat(made, 1), oracle(model, stream, SMALL, noise, prompts, blocks))


@both
@pytest.mark.parametrize("switches", [(), (2,), (4, 5), (5, 9), (9,)], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_geometry_equals_the_oracle(name: str, switches: tuple[int, ...], execution: Execution) -> None:
    """Slots, rings and kept rotations give what a plain list of all keys gives."""
    stream = StreamConfig(**{"rope": "relative", **GEOMETRIES[name]})
    assert differs(stream, frozenset(switches), 12, execution) <= 1e-4


@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize("block", range(1, 10))
@both
def test_a_switch_at_any_block_equals_the_oracle(
    block: int, rope: str, global_sink: bool, execution: Execution
) -> None:
    """Before, while and after the window begins to slide."""
    stream = StreamConfig(rope=rope, global_sink=global_sink)
    assert differs(stream, frozenset({block}), block + 5, execution) <= 1e-4


@st.composite
def geometries(draw: st.DrawFn) -> StreamConfig:
    """Any stream that the configuration allows, small."""
    frames = draw(st.integers(1, 3))
    window = draw(st.integers(1, 5))
    return StreamConfig(
        frames_per_block=frames,
        window=frames * window,
        sink=frames * draw(st.integers(0, window - 1)),
        steps=draw(st.sampled_from([(1000,), (1000, 500), (800, 300)])),
        warp_steps=draw(st.booleans()),
        rope=draw(st.sampled_from(["absolute", "relative"])),
        global_sink=draw(st.booleans()),
        context_noise=draw(st.sampled_from([0, 128])),
        first_position=draw(st.sampled_from([0, 500])),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(stream=geometries(), switches=st.frozensets(st.integers(1, 10), max_size=4))
def test_drawn_geometries_equal_the_oracle(stream: StreamConfig, switches: frozenset[int]) -> None:
    assert differs(stream, switches, 12, "plain") <= 1e-4
    assert differs(stream, switches, 12, "static") <= 1e-4


@both
@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize("block", [1, 2, 4, 5, 7])
def test_resume_equals_a_switch_that_anchors_the_sink_anew(block: int, global_sink: bool, execution: Execution) -> None:
    """A restarted denoiser has lost the sink: whatever `global_sink` says it goes the path of `false`."""
    model = tiny_transformer()
    living = Rollout(model, StreamConfig(rope="relative", global_sink=False), SMALL)
    noise = DrawnNoise(5, living.shape)
    living.switch(embeds(0))
    for _ in range(block):
        living.denoise_block(noise)
    retained = LatentHistory(living.history.buffer.clone())
    stream = StreamConfig(rope="relative", global_sink=global_sink)
    restarted = new_rollout(model, stream, SMALL, history=retained, execution=execution)
    restarted.resume(block, embeds(0))
    living.switch(embeds(0))
    for _ in range(6):
        assert relative_error(restarted.denoise_block(noise), living.denoise_block(noise)) <= 1e-5


def values(rollout: Rollout) -> torch.Tensor:
    """The cache's values, [layers, slots, tokens, heads, head_dim]."""
    if isinstance(rollout.passes, StaticPasses):
        return rollout.passes.static.store.v
    assert isinstance(rollout.passes, PlainPasses)
    return rollout.passes.cache.v[:, 0].unflatten(1, (rollout.stream.window_blocks, -1))


@both
@pytest.mark.parametrize("block", [3, 7])
@pytest.mark.parametrize(
    ("recache", "kept"), [("none", 4), ("blend(3)", 4), ("recent(3)", 3), ("recent(6)", 2), ("full", None)]
)
def test_recache_recomputes_what_it_says(recache: str, kept: int | None, block: int, execution: Execution) -> None:
    """A switch leaves the keys and values of older blocks as they were; under the new prompt the next block differs."""
    rollout = new_rollout(tiny_transformer(), StreamConfig(recache=recache), SMALL, execution=execution)
    noise = DrawnNoise(5, rollout.shape)
    rollout.switch(embeds(0))
    for _ in range(block):
        rollout.denoise_block(noise)
    before = values(rollout).clone()
    rollout.switch(embeds(1))
    same = [torch.equal(values(rollout)[:, slot], before[:, slot]) for slot in range(min(block, 4))]
    changed = {slot for slot, held in enumerate(same) if not held}
    newest = {rollout.layout.slot(b) for b in range(block - (4 - kept), block)} if kept is not None else None
    whole = set(range(block)) if block <= 4 else {1, 2, 3}
    assert changed == (whole if newest is None else newest)
    assert torch.isfinite(rollout.denoise_block(noise)).all()
