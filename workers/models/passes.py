"""How the passes of a stream are computed: what every way offers, and the plain way, which is the definition."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from configs.schema import PATCH, StreamConfig, VideoConfig
from workers.models.kv_cache import CachePlan, KVCache
from workers.models.noise import NoiseSource
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer, PromptKV


class Passes(Protocol):
    """All transformer passes of a stream, over a cache of their own."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""

    def record_all(self) -> None:
        """Does once whatever is done once, before a stream begins."""

    def take_prompt(self, embeds: Tensor) -> None:
        """Puts a prompt in force: embeds [1, n, text_dim] of its n tokens."""

    def denoise(self, plan: CachePlan, block: int, noise: NoiseSource) -> Tensor:
        """All steps of a block. Returns its clean latents [1, F, 16, h, w] float32, not to be changed by others."""

    def remember(self, plan: CachePlan, clean: Tensor) -> None:
        """Keys and values of clean latents [1, k * F, 16, h, w] of the plan's blocks."""


class PlainPasses:
    """One operation after the other, as the model is written down."""

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.schedule = Schedule.from_config(stream)
        self.cache = KVCache(
            stream,
            layers=model.config.num_layers,
            heads=model.config.num_heads,
            head_dim=model.config.head_dim,
            frame_tokens=video.frame_tokens,
            device=model.device,
            dtype=model.dtype,
        )
        self.prompt: PromptKV | None = None
        self._rows, self._columns = video.latent_height // PATCH, video.latent_width // PATCH
        self._on_pass = on_pass

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def record_all(self) -> None:
        """Nothing: every pass is launched anew."""

    def take_prompt(self, embeds: Tensor) -> None:
        self.prompt = self.model.prompt_kv(embeds)

    def denoise(self, plan: CachePlan, block: int, noise: NoiseSource) -> Tensor:
        timesteps = self.schedule.steps
        x = noise.start(block).to(self.model.device)
        for step, timestep in enumerate(timesteps):
            clean = self.schedule.clean(x, self._pass(x, timestep, plan), timestep)
            if step + 1 < len(timesteps):
                renoise = noise.between(block, step).to(self.model.device)
                x = self.schedule.add_noise(clean, renoise, timesteps[step + 1])
        return clean

    def remember(self, plan: CachePlan, clean: Tensor) -> None:
        self._pass(clean, self.stream.context_noise, plan)

    def _pass(self, latents: Tensor, timestep: float, plan: CachePlan) -> Tensor:
        assert self.prompt is not None, "a prompt is put in force before the first pass"
        self.model.place_sink(self.cache, plan, self._rows, self._columns, self.stream.sink)
        flow = self.model(latents, timestep, self.prompt, self.cache, plan)
        self._on_pass()
        return flow
