"""Where a block's noise comes from, and whole blocks by preset."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs.adaptive import at_preset
from configs.load import load_preset
from configs.schema import LATENT_CHANNELS, RuntimeConfig, TransformerConfig
from gpu.micro.bench import FAILURES, Bench, first_line, off_by
from workers.models.denoise import Rollout
from workers.models.execution import choose_kernels, choose_passes, choose_recorder
from workers.models.graphs import WARM_UPS, Recorder, Replay, run_directly
from workers.models.kv_cache import CacheLayout
from workers.models.noise import DrawnNoise
from workers.models.passes import Passes
from workers.models.random_weights import draw
from workers.models.static import TextKV
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer

PRESETS = ("reference", "quality", "balanced", "speed")
ALL_RECORDED = "balanced"
"""The preset whose passes are all recorded; of others those for one length of prompt, which takes less time."""
PROMPT_TOKENS = 24
FEW_LAYERS = 2
"""Of the model that shows where noise comes from: bits are equal or not, however many layers there are."""
ROUNDS, SLOW_ROUNDS, SLOW_MS = 9, 3, 1000.0
"""Blocks measured, how many of slow ones, and what such a one takes."""


def drawn_transformer(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> CausalWanTransformer:
    """A transformer of random weights in a dtype, where they stay."""
    with torch.device("meta"):
        model = CausalWanTransformer(config)
    drawn = {name: draw(name, tensor.shape, 0, device, dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(drawn, assign=True)
    return model.eval().requires_grad_(False)


def noise(bench: Bench) -> None:
    """What drawing and copying cost; then that a recorded block draws nothing and gives an eager one's bits."""
    config, stream = bench.config, bench.config.stream
    steps = len(stream.steps)
    shape = (stream.frames_per_block, LATENT_CHANNELS, config.video.latent_height, config.video.latent_width)
    source = DrawnNoise(config.seed, shape, pinned=bench.on_gpu)
    blocks = iter(range(10**6))
    source.expect(next(blocks), steps)  # makes both places
    source.expect(next(blocks), steps)
    drawing = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        source.expect(next(blocks), steps)
        drawing.append(1000 * (time.perf_counter() - began))
    bench.add("a block's noise drawn on the host", ms=sorted(drawing)[ROUNDS // 2], note="by the clock, one thread")

    few = config.model.transformer.model_copy(update={"num_layers": FEW_LAYERS})
    model = drawn_transformer(few, bench.device, bench.dtype)
    kernels = choose_kernels("auto", bench.device)
    build = partial(StaticPasses, model, stream, config.video, kernels=kernels)
    eager = build(record=run_directly)
    recorded = build(record=choose_recorder(config, bench.device), beside=eager.static)
    block = stream.window_blocks + 1
    source.expect(block, steps)
    plan = CacheLayout(stream).denoise(block, 0)

    @torch.inference_mode()
    def copied() -> None:
        eager.static.latents.copy_(source.start(block)[0], non_blocking=True)
        for step in range(steps - 1):
            eager.static.noise[step].copy_(source.between(block, step)[0], non_blocking=True)

    filled = torch.inference_mode()(partial(eager.fill, plan, block, source))
    for name, run in (("a block's noise copied to the device", copied), ("all that a block differs in", filled)):
        for _ in range(2):
            run()
        bench.clocked(name, run, rounds=ROUNDS)
    _equal_bits(bench, eager, recorded, source, block)


def _equal_bits(bench: Bench, eager: StaticPasses, recorded: StaticPasses, source: DrawnNoise, block: int) -> None:
    """A block by launching its operations, by replaying them, and by replaying them again."""
    plan = CacheLayout(eager.stream).denoise(block, 0)
    static = eager.static
    with torch.inference_mode():
        for store in (static.store.k, static.store.v, static.store.sink_k):
            store.copy_(bench.draw(*store.shape))
        prompt = bench.draw(1, PROMPT_TOKENS, eager.model.config.text_dim)
        for passes in (eager, recorded):
            passes.take_prompt(prompt)
            passes.sink_at = None
        # What is recorded is run to warm up, which leaves the buffers at what they should not be: once before.
        recorded.denoise(plan, block, source)
        made = [eager.denoise(plan, block, source)]
        made.append(recorded.denoise(plan, block, source))
        torch.manual_seed(1)
        before = _generator_state(bench)
        made.append(recorded.denoise(plan, block, source))
        drew = not torch.equal(before, _generator_state(bench))
    first, again, third = (latents for latents in made if latents is not None)
    what = f"{len(static.sigmas)} steps, {FEW_LAYERS} layers"
    for name, one, other in (("replay against eager", again, first), ("replay against replay", third, again)):
        note = f"{what}: {'equal' if torch.equal(one, other) else 'not equal'} to the bit"
        bench.add(name, error=off_by(one, other), note=note)
    bench.add("the device's generator after a replay", note="moved: something drew" if drew else "where it was")


def _generator_state(bench: Bench) -> Tensor:
    return torch.cuda.get_rng_state(bench.device) if bench.on_gpu else torch.get_rng_state()


@dataclass
class Counted:
    """A recorder that counts what it is given."""

    record: Recorder
    passes: int = 0

    def __call__(self, function: Callable[[], None]) -> Replay:
        self.passes += 1
        return self.record(function)


def block(bench: Bench) -> None:
    """Each preset over the same weights."""
    began = time.perf_counter()
    model = drawn_transformer(bench.config.model.transformer, bench.device, bench.dtype)
    bench.wait()
    bench.add("weights", ms=1000 * (time.perf_counter() - began), note="drawn, by the clock")
    prompt = bench.draw(1, PROMPT_TOKENS, bench.config.model.transformer.text_dim)
    first: Tensor | None = None
    for preset in PRESETS:
        if bench.left_out(preset):
            continue
        config = at_preset(bench.config, load_preset(preset))
        try:
            made = _preset(bench, config, preset, model, prompt, first)
        except FAILURES as error:
            bench.add(preset, note=f"failed: {first_line(error)}")
        else:
            first = made if first is None and preset == PRESETS[0] else first
        bench.give_back()


def _preset(
    bench: Bench,
    config: RuntimeConfig,
    preset: str,
    model: CausalWanTransformer,
    prompt: Tensor,
    first: Tensor | None,
) -> Tensor:
    """Rows of one preset; returns the latents of its first block."""
    notes: list[str] = []
    recorder = Counted(choose_recorder(config, bench.device))
    passes = choose_passes(config, model, say=notes.append, warn=notes.append, record=recorder)
    bench.add(f"{preset}, chosen", note="; ".join(notes))
    _record(bench, preset, passes, recorder)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    rollout = Rollout(model, config.stream, config.video, passes=passes)
    rollout.switch(prompt)
    source = DrawnNoise(config.seed, rollout.shape, pinned=bench.on_gpu)
    made = rollout.denoise_block(source).clone()
    for _ in range(config.stream.window_blocks):
        rollout.denoise_block(source)
    bench.wait()
    began = time.perf_counter()
    rollout.denoise_block(source)
    bench.wait()
    slow = not bench.on_gpu or 1000 * (time.perf_counter() - began) > SLOW_MS
    rounds = SLOW_ROUNDS if slow else ROUNDS
    _blocks(bench, preset, rollout, source, rounds, None if first is None else off_by(made, first))
    _launching(bench, preset, rollout, source, 1 if slow else SLOW_ROUNDS)
    if bench.on_gpu:
        peak, held = torch.cuda.max_memory_allocated(bench.device), torch.cuda.memory_reserved(bench.device)
        said = (
            f"{peak / 2**30:.2f} GiB at most, {held / 2**30:.2f} reserved, of it the cache {passes.nbytes / 2**30:.2f}"
        )
        bench.add(f"{preset}, memory", note=said)
    return made


def _record(bench: Bench, preset: str, passes: Passes, recorder: Counted) -> None:
    if isinstance(passes, StaticPasses) and preset != ALL_RECORDED:
        passes.static.text.LENGTHS = TextKV.LENGTHS[:1]
    before = torch.cuda.memory_reserved(bench.device) if bench.on_gpu else 0
    began = time.perf_counter()
    passes.record_all()
    bench.wait()
    took = 1000 * (time.perf_counter() - began)
    notes = [f"{recorder.passes} passes, by the clock"]
    if preset != ALL_RECORDED:
        notes.append("for two lengths of prompt alone")
    if bench.on_gpu:
        more = torch.cuda.memory_reserved(bench.device) - before
        notes += [f"each run {WARM_UPS} times before", f"{more / 2**30:.2f} GiB more reserved"]
    if recorder.passes:
        bench.add(f"{preset}, recording", ms=took, note=", ".join(notes))


def _blocks(bench: Bench, preset: str, rollout: Rollout, source: DrawnNoise, rounds: int, error: float | None) -> None:
    """Whole blocks, as a stream makes them."""
    run, flops = partial(rollout.denoise_block, source), flops_of_a_block(bench.config)
    bench.clocked(f"{preset}, a block", run, rounds=rounds, flops=flops, error=error)


def _launching(bench: Bench, preset: str, rollout: Rollout, source: DrawnNoise, rounds: int) -> None:
    """The same without the look at the latents, for which the host waits: it comes back when all is launched."""
    plan = rollout.layout.denoise(rollout.block, rollout.anchor)
    steps = len(rollout.stream.steps)
    source.expect(rollout.block, steps)

    @torch.inference_mode()
    def launch() -> None:
        clean = rollout.passes.denoise(plan, rollout.block, source)
        assert clean is not None
        rollout.passes.remember(plan, clean)

    passes = steps + 1
    bench.clocked(f"{preset}, {passes} passes launched and not waited for", launch, rounds=rounds)


def flops_of_a_block(config: RuntimeConfig) -> float:
    """Of the definition with a full window: linears, self- and cross-attention of every pass, nothing else."""
    model, stream = config.model.transformer, config.stream
    rows = stream.frames_per_block * config.video.frame_tokens
    keys = stream.window * config.video.frame_tokens + model.text_len
    layer = 2.0 * rows * model.dim * (6 * model.dim + 2 * model.ffn_dim) + 4.0 * rows * keys * model.dim
    return (len(stream.steps) + 1) * model.num_layers * layer
