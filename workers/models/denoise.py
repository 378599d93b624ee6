"""A stream of blocks: four steps with noise mixed back in, a clean pass for the cache, and recache on a switch.

Which block is made when and under which plan is decided here; how a pass is computed is the `Passes`' matter. Knows
nothing of sockets, frames per second or users.
"""

import torch
from torch import Tensor

from configs.schema import LATENT_CHANNELS, StreamConfig, VideoConfig
from ipc.errors import NonFiniteLatents
from workers.models.blend import Blend
from workers.models.kv_cache import CacheLayout, CachePlan
from workers.models.noise import NoiseSource
from workers.models.passes import Passes, PlainPasses, hand_over
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer


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
        passes: how passes are computed; the plain way if not given.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        history: LatentHistory | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.schedule = Schedule.from_config(stream)
        self.layout = CacheLayout(stream)
        self.shape = (stream.frames_per_block, LATENT_CHANNELS, video.latent_height, video.latent_width)
        self.passes = passes or PlainPasses(model, stream, video)
        self._fps = video.fps
        self.begin(history or LatentHistory(torch.zeros(stream.window_blocks, *self.shape)))

    def begin(self, history: LatentHistory) -> None:
        """Forgets the stream so far: the next block is the first of another."""
        self.history = history
        self.block = 0
        self.anchor = 0
        self._blend: Blend | None = None
        self._made: tuple[CachePlan, Tensor] | None = None

    @torch.inference_mode()
    def switch(self, embeds: Tensor) -> None:
        """Puts a prompt in force from the next block on and recomputes the cache under it, as far as `recache` says.

        With `recache: blend(SECONDS)` the next block is the first on the way from what was in force at the block before
        to this prompt; a stream's first prompt has nothing to come from.

        Args:
            embeds: [1, n, text_dim] of the prompt's n tokens.
        """
        before = None if self._blend is None else self._blend.at(self.block - 1)
        self._take_prompt(Blend(before, embeds, self.block, self.stream.blend_blocks(self._fps)))
        recache = self.layout.recache(self.block, self.anchor) if self.block > 0 else None
        if recache is not None:
            self._recompute(*recache)

    @torch.inference_mode()
    def resume(self, block: int, embeds: Tensor) -> None:
        """Continues a stream whose cache is lost at `block`, from the latents in the history; re-anchors the sink."""
        self.block = block
        self._take_prompt(Blend(None, embeds, block, 1))
        if block > 0:
            self._recompute(*self.layout.reanchor(block))

    @torch.inference_mode()
    def change(self, passes: Passes, stream: StreamConfig) -> None:
        """Goes on with other passes from the next block on, over the same keys and values under the same prompt.

        Args:
            stream: as before, but for `recache`.
        """
        hand_over(self.passes, passes)
        self.passes, self.stream, self.layout = passes, stream, CacheLayout(stream)
        if self._blend is not None:
            self._take_prompt(self._blend)

    def denoise_block(self, noise: NoiseSource) -> Tensor:
        """Generates the next block: `denoise`, then `remember`."""
        latents = self.denoise(noise)
        assert latents is not None, "nobody ended it"
        self.remember()
        self.expect_noise(noise)
        return latents

    def expect_noise(self, noise: NoiseSource) -> None:
        """Has the next block's noise drawn, after `remember`, while a GPU is at the clean pass."""
        noise.expect(self.block, len(self.schedule.steps))

    @torch.inference_mode()
    def denoise(self, noise: NoiseSource) -> Tensor | None:
        """All steps of the next block, which is over with `remember` only.

        Returns:
            Its clean latents [1, F, 16, h, w] float32, on the model's device; None if the passes were told to end it
            before its last step. Then it is still the next block, and a `switch` gives what it would have given before.

        Raises:
            NonFiniteLatents: they hold NaN or infinity.
        """
        if self._blend is not None and self._blend.goes_on_at(self.block):
            self._take_prompt(self._blend)
        plan = self.layout.denoise(self.block, self.anchor)
        clean = self.passes.denoise(plan, self.block, noise)
        if clean is None:
            return None
        if not bool(torch.isfinite(clean).all()):
            raise NonFiniteLatents(f"block {self.block}: the latents hold NaN or infinity")
        self.history.put(self.block, clean)
        self._made = plan, clean
        return clean

    @torch.inference_mode()
    def remember(self, given: Tensor | None = None) -> None:
        """Leaves the keys and values of the block just made in the cache, and goes on to the next.

        Args:
            given: clean latents [1, F, 16, h, w] that stand for those just made, where another stream says what the
                past was; later recaches take them too.
        """
        assert self._made is not None, "a block is denoised before it is remembered"
        plan, clean = self._made
        if given is not None:
            clean = given.to(self.model.device)
            self.history.put(self.block, clean)
        self.passes.remember(plan, clean)
        self._made = None
        self.block += 1

    def _take_prompt(self, blend: Blend) -> None:
        embeds = blend.at(self.block)
        assert embeds is not None, "it has begun"
        self._blend = blend
        self.passes.take_prompt(embeds)

    def _recompute(self, plan: CachePlan, blocks: range, anchor: int) -> None:
        self.passes.remember(plan, self.history.get(blocks).to(self.model.device))
        self.anchor = anchor
