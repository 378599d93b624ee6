"""Streams for tests: a golden case as a rollout, and an oracle that keeps every key and value in a plain list.

The oracle knows no slots, no ring and no kept rotations: for every pass it gathers the blocks that are to be seen, in
the order of time, and rotates their raw keys to where they stand.
"""

from pathlib import Path

import torch
from golden_cases import Case
from model_files import case_config, write_case
from torch import Tensor

from configs.schema import Execution, RuntimeConfig, StreamConfig, TransformerConfig, VideoConfig
from workers.models.checkpoint import load_transformer
from workers.models.denoise import LatentHistory, Rollout
from workers.models.kv_cache import CachePlan
from workers.models.noise import GivenNoise, NoiseSource
from workers.models.passes import PlainPasses
from workers.models.random_weights import draw
from workers.models.rope import rotate, rotation
from workers.models.schedule import Schedule
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer

TINY = TransformerConfig(dim=24, ffn_dim=48, freq_dim=16, text_dim=12, text_len=6, num_heads=2, num_layers=2)
SMALL = VideoConfig(height=32, width=32)
CPU = torch.device("cpu")


def tiny_transformer(config: TransformerConfig = TINY) -> CausalWanTransformer:
    """A transformer with fixed random weights, small enough for thousands of blocks."""
    model = CausalWanTransformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, 1))
    return model.eval().requires_grad_(False)


def embeds(number: int) -> Tensor:
    """A prompt's embeddings, [1, 4, text_dim]."""
    return torch.randn(1, 4, TINY.text_dim, generator=torch.Generator().manual_seed(number))


def case_rollout(case: Case, folder: Path, execution: Execution = "plain", first_position: int = 0) -> Rollout:
    """A golden case as the denoiser process would set it up: files written, read back, LoRA merged."""
    write_case(case.config, case.path / "tensors.safetensors", folder)
    config = RuntimeConfig.model_validate(case_config(case.config, folder))
    stream = config.stream.model_copy(update={"first_position": first_position})
    return new_rollout(load_transformer(config.model, CPU), stream, config.video, execution=execution)


def new_rollout(
    model: CausalWanTransformer,
    stream: StreamConfig,
    video: VideoConfig,
    history: LatentHistory | None = None,
    execution: Execution = "plain",
) -> Rollout:
    """A stream computed the plain or the static way."""
    passes = {"plain": PlainPasses, "static": StaticPasses}[execution](model, stream, video)
    return Rollout(model, stream, video, history, passes)


def play(case: Case, rollout: Rollout) -> Tensor:
    """The clean latents of a whole golden stream, [1, T, 16, h, w]."""
    noise = GivenNoise(case.tensors["noise"], case.tensors["renoise"], rollout.shape, len(rollout.schedule.steps))
    switches = case.config["switch_frame_indices"]
    prompts = case.tensors["prompt_embeds"]
    made, version = [], 0
    rollout.switch(prompts[:1])
    for block in range(case.config["num_blocks"]):
        due = sum(index <= block * rollout.shape[0] for index in switches)
        if due > version:
            version = due
            rollout.switch(prompts[version : version + 1])
        made.append(rollout.denoise_block(noise))
    return torch.cat(made, dim=1)


class ListCache:
    """Raw keys and values of every block ever made, and which of them the present pass sees."""

    def __init__(self, stream: StreamConfig, model: CausalWanTransformer, video: VideoConfig) -> None:
        self._stream, self._head_dim = stream, model.config.head_dim
        self._rows, self._columns = video.latent_height // 2, video.latent_width // 2
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.inputs: list[int] = []
        self.seen: list[int] = []

    def frames(self, block: int) -> range:
        """Positions of a block."""
        size = self._stream.frames_per_block
        start = self._stream.first_position + block * size
        return range(start, start + size)

    def write(self, layer: int, plan: CachePlan, raw_k: Tensor, k: Tensor, v: Tensor) -> None:
        count = len(self.inputs)
        for block, ks, vs in zip(self.inputs, raw_k.chunk(count, 1), v.chunk(count, 1), strict=True):
            self._kept[block, layer] = (ks.clone(), vs.clone())

    def visible(self, layer: int, plan: CachePlan) -> tuple[Tensor, Tensor]:
        keys = [rotate(self._kept[block, layer][0], self._turn(i)) for i, block in enumerate(self.seen)]
        return torch.cat(keys, 1), torch.cat([self._kept[block, layer][1] for block in self.seen], 1)

    def _turn(self, index: int):
        """Absolute: where the block was made. Relative: in one row that ends with the newest block."""
        if self._stream.rope == "absolute":
            positions = self.frames(self.seen[index])
        else:
            behind = (len(self.seen) - 1 - index) * self._stream.frames_per_block
            newest = self.frames(self.seen[-1])
            positions = range(newest.start - behind, newest.stop - behind)
        return rotation(positions, self._rows, self._columns, self._head_dim, CPU)


@torch.inference_mode()
def oracle(
    model: CausalWanTransformer,
    stream: StreamConfig,
    video: VideoConfig,
    noise: NoiseSource,
    prompts: dict[int, Tensor],
    blocks: int,
) -> Tensor:
    """A stream by the list: prompts by the block they begin at, the first at 0; [1, T, 16, h, w]."""
    cache = ListCache(stream, model, video)
    schedule = Schedule.from_config(stream)
    window, sink = stream.window_blocks, stream.sink_blocks
    sinks = list(range(sink))
    made: list[Tensor] = []

    def run(latents: Tensor, timestep: float, inputs: list[int], seen: list[int]) -> Tensor:
        cache.inputs, cache.seen = inputs, seen
        frames = tuple(position for block in inputs for position in cache.frames(block))
        return model(latents, timestep, prompt, cache, CachePlan((1,) * len(inputs), 0, frames, None))

    for block in range(blocks):
        if block in prompts:
            prompt = model.prompt_kv(prompts[block])
            if block > 0:
                if block <= window:
                    inputs, sinks = list(range(block)), list(range(sink))
                    seen = inputs
                elif stream.global_sink:
                    inputs = list(range(block - (window - sink), block))
                    seen = [*sinks, *inputs]
                else:
                    inputs = list(range(block - window, block))
                    seen, sinks = inputs, inputs[:sink]
                run(torch.cat([made[b] for b in inputs], 1), stream.context_noise, inputs, seen)
        seen = list(range(block + 1)) if block < window else [*sinks, *range(block - (window - sink) + 1, block + 1)]
        x = noise.start(block)
        for step, timestep in enumerate(schedule.steps):
            clean = schedule.clean(x, run(x, timestep, [block], seen), timestep)
            if step + 1 < len(schedule.steps):
                x = schedule.add_noise(clean, noise.between(block, step), schedule.steps[step + 1])
        run(clean, stream.context_noise, [block], seen)
        made.append(clean)
    return torch.cat(made, 1)
