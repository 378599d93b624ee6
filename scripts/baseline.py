"""The straightforward way to run the model, which every "times as fast" of this repository is measured against.

As models of this family are usually run: PEFT's LoRA beside the weights, a KV cache in the order of time that is rolled
with clones, with `rope: relative` all its keys rotated anew in every pass, the prompt's keys and values and all
modulations computed in every pass, the VAE by `conv3d`. It is held to the same reference tensors as the runtime.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from configs.schema import PATCH, ModelConfig, StreamConfig, VideoConfig
from workers.models.checkpoint import load_adapter, load_transformer
from workers.models.kv_cache import CachePlan
from workers.models.lora import PREFIX, add_lora, lora_shapes
from workers.models.noise import NoiseSource
from workers.models.random_weights import draw
from workers.models.rope import Rotation, rotate, rotation
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer


def load_baseline(model: ModelConfig, device: torch.device) -> CausalWanTransformer:
    """The transformer with its LoRA, where there is one, beside its weights. Raises CheckpointError."""
    transformer = load_transformer(model.model_copy(update={"lora": None}), device)
    if model.lora is not None:
        adapters = _drawn(model, transformer) if model.path is None else load_adapter(model, transformer)
        for layer, adapter in zip(transformer.blocks, adapters, strict=True):
            add_lora(layer, model.lora, {name: tensor.to(transformer.dtype) for name, tensor in adapter.items()})
    return transformer.eval().requires_grad_(False)


def _drawn(model: ModelConfig, transformer: CausalWanTransformer) -> Iterator[dict[str, Tensor]]:
    """An adapter for random weights, whose cost does not depend on its values; too small for them to show."""
    assert model.lora is not None
    shapes = lora_shapes(transformer, model.lora.rank)
    for index in range(len(transformer.blocks)):
        stem = f"{PREFIX}blocks.{index}."
        own = {name: shape for name, shape in shapes.items() if name.startswith(stem)}
        yield {
            name.removeprefix(stem): draw(name, torch.Size(shape), model.random_weights_seed).to(transformer.device)
            / 1e3
            for name, shape in own.items()
        }


class RolledCache:
    """Keys and values in the order of time, [layers, 1, window tokens, heads, head_dim].

    Args:
        turn: rotations of blocks where they stand in a pass, for keys that are kept before rotation; None for keys that
            are kept where they were made.
    """

    def __init__(
        self, shape: tuple[int, ...], model: CausalWanTransformer, turn: Callable[[list[int]], Rotation] | None
    ) -> None:
        self.k = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.v = torch.zeros_like(self.k)
        self.blocks: list[int] = []
        self.tokens = 0
        self.inputs = slice(0)
        self._turn = turn

    def roll(self, sink: int) -> None:
        """Drops the oldest block after the sink's."""
        keep, size = sink * self.tokens, self.tokens
        end = len(self.blocks) * size
        for tensor in (self.k, self.v):
            tensor[:, :, keep : end - size] = tensor[:, :, keep + size : end].clone()
        del self.blocks[sink]

    def write(self, layer: int, plan: CachePlan, raw_k: Tensor, k: Tensor, v: Tensor) -> None:
        """As `KVCache.write`, at the inputs' place in the row."""
        self.k[layer, :, self.inputs] = raw_k if self._turn else k
        self.v[layer, :, self.inputs] = v

    def visible(self, layer: int, plan: CachePlan) -> tuple[Tensor, Tensor]:
        """As `KVCache.visible`."""
        end = len(self.blocks) * self.tokens
        k = self.k[layer, :, :end]
        return rotate(k, self._turn(self.blocks)) if self._turn else k, self.v[layer, :, :end]


class BaselinePasses:
    """As `workers.models.passes.PlainPasses`, the straightforward way."""

    def __init__(self, model: CausalWanTransformer, stream: StreamConfig, video: VideoConfig) -> None:
        config = model.config
        self.model, self.stream = model, stream
        self.schedule = Schedule.from_config(stream)
        self._rows, self._columns = video.latent_height // PATCH, video.latent_width // PATCH
        tokens = stream.frames_per_block * video.frame_tokens
        shape = (config.num_layers, 1, stream.window_blocks * tokens, config.num_heads, config.head_dim)
        self.cache = RolledCache(shape, model, self._turn if stream.rope == "relative" else None)
        self.cache.tokens = tokens
        self._embeds: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.cache.k.nbytes + self.cache.v.nbytes

    def record_all(self) -> None:
        """Nothing."""

    def take_prompt(self, embeds: Tensor) -> None:
        self._embeds = embeds

    def denoise(self, plan: CachePlan, block: int, noise: NoiseSource) -> Tensor:
        if block == 0:
            self.cache.blocks.clear()
        if len(self.cache.blocks) == self.stream.window_blocks:
            self.cache.roll(self.stream.sink_blocks)
        self.cache.blocks.append(block)
        timesteps = self.schedule.steps
        x = noise.start(block).to(self.model.device)
        for step, timestep in enumerate(timesteps):
            clean = self.schedule.clean(x, self._pass(x, timestep, plan), timestep)
            if step + 1 < len(timesteps):
                renoise = noise.between(block, step).to(self.model.device)
                x = self.schedule.add_noise(clean, renoise, timesteps[step + 1])
        return clean

    def remember(self, plan: CachePlan, clean: Tensor) -> None:
        size = self.stream.frames_per_block
        given = [(frame - self.stream.first_position) // size for frame in plan.frames[::size]]
        if not set(given) <= set(self.cache.blocks) or len(given) == plan.visible:
            self.cache.blocks = given
        self._pass(clean, self.stream.context_noise, plan)

    def _pass(self, latents: Tensor, timestep: float, plan: CachePlan) -> Tensor:
        assert self._embeds is not None, "a prompt is put in force before the first pass"
        cache, size = self.cache, self.stream.frames_per_block
        first = (plan.frames[0] - self.stream.first_position) // size
        begin = cache.blocks.index(first) * cache.tokens
        cache.inputs = slice(begin, begin + latents.shape[1] // size * cache.tokens)
        prompt = self.model.prompt_kv(self._embeds)
        frames = tuple(f for block in cache.blocks for f in self._frames(block))
        at = begin // cache.tokens * size
        plan = CachePlan(plan.slots, plan.visible, frames[at : at + latents.shape[1]], None)
        return self.model(latents, timestep, prompt, cache, plan)  # type: ignore[arg-type]

    def _frames(self, block: int) -> range:
        """Positions of a block in this pass: in one row that ends with the newest block, or where it was made."""
        size = self.stream.frames_per_block
        start = self.stream.first_position + block * size
        if self.stream.rope == "relative":
            blocks = self.cache.blocks
            start = self.stream.first_position + (blocks[-1] - (len(blocks) - 1 - blocks.index(block))) * size
        return range(start, start + size)

    def _turn(self, blocks: list[int]) -> Rotation:
        frames = tuple(frame for block in blocks for frame in self._frames(block))
        return rotation(frames, self._rows, self._columns, self.model.config.head_dim, self.model.device)
