"""How the passes of a stream are computed: what every way offers, and the plain way, which is the definition."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from configs.schema import PATCH, StreamConfig, VideoConfig
from workers.models.kv_cache import CachePlan, KVCache
from workers.models.kv_store import LayerKV
from workers.models.noise import NoiseSource
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer, PromptKV

AfterPass = Callable[[], bool]
"""Called after every transformer pass. True ends the block, if it is not its last step, where `switch` is `abort`."""


def go_on() -> bool:
    """Never ends a block."""
    return False


class Undo:
    """What a block that is ended early is about to change, to put it back: a recache may look at it once more.

    Args:
        touched_by: all that denoising a block in a slot may change in the cache, as views.

    Attributes:
        sink_at: where the sink stood.
    """

    def __init__(self, touched_by: Callable[[int], list[Tensor]]) -> None:
        self._touched_by = touched_by
        self._kept = [view.clone() for view in touched_by(0)]
        self._slot = 0
        self.sink_at: int | None = None

    def keep(self, slot: int, sink_at: int | None) -> None:
        self._slot, self.sink_at = slot, sink_at
        for kept, view in zip(self._kept, self._touched_by(slot), strict=True):
            kept.copy_(view)

    def put_back(self) -> None:
        for kept, view in zip(self._kept, self._touched_by(self._slot), strict=True):
            view.copy_(kept)


def undo_for(stream: StreamConfig, touched_by: Callable[[int], list[Tensor]]) -> Undo | None:
    """None where no block is ended early."""
    return Undo(touched_by) if stream.switch == "abort" else None


class Passes(Protocol):
    """All transformer passes of a stream, over a cache.

    Attributes:
        sink_at: position at which the sink's keys stand, None before there are any.
    """

    sink_at: int | None

    @property
    def layers(self) -> list[LayerKV]:
        """The cache of every layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""

    def record_all(self) -> None:
        """Does once whatever is done once, before a stream begins."""

    def take_prompt(self, embeds: Tensor) -> None:
        """Puts a prompt in force: embeds [1, n, text_dim] of its n tokens."""

    def denoise(self, plan: CachePlan, block: int, noise: NoiseSource) -> Tensor | None:
        """All steps of a block. Returns its clean latents [1, F, 16, h, w] float32, not to be changed by others.

        None if it was ended early: then the cache is as it was before.
        """

    def remember(self, plan: CachePlan, clean: Tensor) -> None:
        """Keys and values of clean latents [1, k * F, 16, h, w] of the plan's blocks."""


def hand_over(old: Passes, new: Passes) -> None:
    """Puts what one cache holds into another of the same slots; nothing is copied where they are the same memory."""
    for mine, theirs in zip(new.layers, old.layers, strict=True):
        if mine.k.data_ptr() != theirs.k.data_ptr():
            mine.fill(*theirs.read())
    new.sink_at = old.sink_at


class PlainPasses:
    """One operation after the other, as the model is written down."""

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        on_pass: AfterPass = go_on,
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
        self._undo = undo_for(stream, self.cache.touched_by)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    @property
    def sink_at(self) -> int | None:
        return self.cache.sink_at

    @sink_at.setter
    def sink_at(self, position: int | None) -> None:
        self.cache.sink_at = position

    @property
    def layers(self) -> list[LayerKV]:
        cache = self.cache
        parts = (part[:, 0].unflatten(1, (-1, cache.block_tokens)) for part in (cache.k, cache.v, cache.sink_k))
        return [LayerKV(*layer) for layer in zip(*parts, strict=True)]

    def record_all(self) -> None:
        """Nothing: every pass is launched anew."""

    def take_prompt(self, embeds: Tensor) -> None:
        self.prompt = self.model.prompt_kv(embeds)

    def denoise(self, plan: CachePlan, block: int, noise: NoiseSource) -> Tensor | None:
        timesteps = self.schedule.steps
        if self._undo is not None:
            self._undo.keep(plan.slots[0], self.sink_at)
        x = noise.start(block).to(self.model.device)
        for step, timestep in enumerate(timesteps):
            clean = self.schedule.clean(x, self._pass(x, timestep, plan), timestep)
            ended = self._on_pass()
            if step + 1 == len(timesteps):
                break
            if ended and self._undo is not None:
                self._undo.put_back()
                self.sink_at = self._undo.sink_at
                return None
            renoise = noise.between(block, step).to(self.model.device)
            x = self.schedule.add_noise(clean, renoise, timesteps[step + 1])
        return clean

    def remember(self, plan: CachePlan, clean: Tensor) -> None:
        self._pass(clean, self.stream.context_noise, plan)
        self._on_pass()

    def _pass(self, latents: Tensor, timestep: float, plan: CachePlan) -> Tensor:
        assert self.prompt is not None, "a prompt is put in force before the first pass"
        self.model.place_sink(self.cache, plan, self._rows, self._columns, self.stream.sink)
        return self.model(latents, timestep, self.prompt, self.cache, plan)
