"""A stream of blocks: four steps with noise mixed back in, a clean pass for the cache, and recache on a switch.

The generator knows nothing of sockets, frames per second or users.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from configs.schema import LATENT_CHANNELS, StreamConfig, VideoConfig
from ipc.errors import NonFiniteLatents
from workers.models.kv_cache import CacheLayout, CachePlan, KVCache
from workers.models.noise import NoiseSource
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer, PromptKV


class LatentHistory:
    """The clean latents of the last window of blocks, in a ring of whole blocks.

    Args:
        buffer: [window blocks, F, 16, h, w] float32 on the CPU; it may lie in memory that outlives the process.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def put(self, block: int, latents: Tensor) -> None:
        """Keeps a block's latents [1, F, 16, h, w]."""
        self.buffer[block % len(self.buffer)] = latents[0]

    def get(self, blocks: range) -> Tensor:
        """The latents of consecutive blocks, [1, len(blocks) * F, 16, h, w]."""
        return torch.cat([self.buffer[block % len(self.buffer)] for block in blocks])[None]


class Rollout:
    """One endless stream: its cache, its prompt and the block it stands at.

    Args:
        model: the transformer.
        stream: window, sink, steps, rope.
        video: gives the latents' height and width.
        history: where clean latents are kept for recaching; its own memory if not given.
        on_pass: called after every transformer pass, so that a watcher sees progress.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        history: LatentHistory | None = None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.schedule = Schedule.from_config(stream)
        self.layout = CacheLayout(stream)
        self.shape = (stream.frames_per_block, LATENT_CHANNELS, video.latent_height, video.latent_width)
        self.rows, self.columns = video.latent_height // 2, video.latent_width // 2
        self.cache = KVCache(
            stream,
            layers=model.config.num_layers,
            heads=model.config.num_heads,
            head_dim=model.config.head_dim,
            frame_tokens=video.frame_tokens,
            device=model.device,
            dtype=model.dtype,
        )
        self.history = history or LatentHistory(torch.zeros(stream.window_blocks, *self.shape))
        self.on_pass = on_pass
        self.prompt: PromptKV | None = None
        self.block = 0
        self.anchor = 0

    @torch.inference_mode()
    def switch(self, embeds: Tensor) -> None:
        """Puts a prompt in force from the next block on and recomputes the cache under it, as far as `recache` says.

        Args:
            embeds: [1, n, text_dim] of the prompt's n tokens.
        """
        self.prompt = self.model.prompt_kv(embeds)
        recache = self.layout.recache(self.block, self.anchor) if self.block > 0 else None
        if recache is not None:
            self._recompute(*recache)

    @torch.inference_mode()
    def resume(self, block: int, embeds: Tensor) -> None:
        """Continues a stream whose cache is lost at `block`, from the latents in the history; re-anchors the sink."""
        self.prompt = self.model.prompt_kv(embeds)
        self.block = block
        if block > 0:
            self._recompute(*self.layout.reanchor(block))

    @torch.inference_mode()
    def denoise_block(self, noise: NoiseSource) -> Tensor:
        """Generates the next block.

        Returns:
            Its clean latents [1, F, 16, h, w] float32, on the model's device.

        Raises:
            NonFiniteLatents: they hold NaN or infinity.
        """
        plan = self.layout.denoise(self.block, self.anchor)
        timesteps = self.schedule.steps
        x = noise.start(self.block).to(self.model.device)
        for step, timestep in enumerate(timesteps):
            clean = self.schedule.clean(x, self._pass(x, timestep, plan), timestep)
            if step + 1 < len(timesteps):
                renoise = noise.between(self.block, step).to(self.model.device)
                x = self.schedule.add_noise(clean, renoise, timesteps[step + 1])
        self._pass(clean, self.stream.context_noise, plan)
        if not bool(torch.isfinite(clean).all()):
            raise NonFiniteLatents(f"block {self.block}: the latents hold NaN or infinity")
        self.history.put(self.block, clean)
        self.block += 1
        return clean

    def _recompute(self, plan: CachePlan, blocks: range, anchor: int) -> None:
        latents = self.history.get(blocks).to(self.model.device)
        self._pass(latents, self.stream.context_noise, plan)
        self.anchor = anchor

    def _pass(self, latents: Tensor, timestep: float, plan: CachePlan) -> Tensor:
        assert self.prompt is not None, "a prompt is put in force before the first pass"
        self.model.place_sink(self.cache, plan, self.rows, self.columns, self.stream.sink)
        flow = self.model(latents, timestep, self.prompt, self.cache, plan)
        self.on_pass()
        return flow
