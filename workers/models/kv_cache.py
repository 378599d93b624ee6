"""The self-attention cache of a stream: as many block slots as the window holds blocks, first the sink's, then a ring.

With the defaults four slots, [sink | r0 | r1 | r2]. Softmax does not care about the order of keys, so nothing is ever
rolled or copied: block b is written over the oldest block that has left the window. Keys lie rotated to their absolute
positions. With `rope: relative` the sink alone is re-rotated, from its un-rotated copy, so that it stands right before
the oldest block of the window; every distance is then the distance inside the window, for ever.

The cache knows blocks and slots; it knows nothing of prompts, steps or noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import StreamConfig
from workers.models.rope import Rotation, rotate


@dataclass(frozen=True)
class CachePlan:
    """Where one forward pass writes, what it sees, and at which positions it stands.

    Attributes:
        slots: slot of each input block, in the order of the input.
        visible: how many slots, from the first, are attended to.
        frames: position of each input latent frame.
        sink: position of the sink's first latent frame during this pass, or None where the sink stays as it lies.
    """

    slots: tuple[int, ...]
    visible: int
    frames: tuple[int, ...]
    sink: int | None


class CacheLayout:
    """Which block lies in which slot at which position. Pure numbers."""

    def __init__(self, stream: StreamConfig) -> None:
        self.stream = stream
        self.sink_blocks = stream.sink_blocks
        self.ring_blocks = stream.window_blocks - stream.sink_blocks

    def slot(self, block: int) -> int:
        """The slot a block is written to when it is denoised."""
        if block < self.sink_blocks:
            return block
        return self.sink_blocks + (block - self.sink_blocks) % self.ring_blocks

    def position(self, block: int) -> int:
        """Position of a block's first latent frame."""
        return self.stream.first_position + block * self.stream.frames_per_block

    def denoise(self, block: int, anchor: int) -> CachePlan:
        """The plan for denoising a block while the sink's blocks begin with block `anchor`."""
        return self._plan([block], min(block + 1, self.stream.window_blocks), block - self.ring_blocks + 1, anchor)

    def recache(self, block: int, anchor: int) -> tuple[CachePlan, range, int] | None:
        """The plan for recomputing the cache before a block: plan, blocks whose latents it takes, the new anchor.

        While every past block is still in the window all of them are recomputed, the sink included. Later the sink's
        keys and values are kept (`global_sink`), or the oldest recomputed blocks become the sink. With
        `recache: recent(N)` only the newest of these are recomputed, and see the others as they were; None where
        nothing is, for `none` and `blend(SECONDS)`.
        """
        whole, blocks, new_anchor = self._whole_recache(block, anchor)
        frames = self.stream.recache_frames
        if frames is None or frames >= len(blocks) * self.stream.frames_per_block:
            return whole, blocks, new_anchor
        if frames == 0:
            return None
        recent = range(block - frames // self.stream.frames_per_block, block)
        slots = tuple(self.slot(b) for b in recent)
        return CachePlan(slots, whole.visible, self._frames(recent), whole.sink), recent, anchor

    def _whole_recache(self, block: int, anchor: int) -> tuple[CachePlan, range, int]:
        window = self.stream.window_blocks
        if block <= window:
            return self._plan(range(block), block, None, 0), range(block), 0
        if self.stream.global_sink:
            blocks = range(block - self.ring_blocks, block)
            return self._plan(blocks, window, blocks.start, anchor), blocks, anchor
        return self.reanchor(block)

    def reanchor(self, block: int) -> tuple[CachePlan, range, int]:
        """The plan for building the whole cache anew from the last blocks; their oldest become the sink."""
        blocks = range(max(0, block - self.stream.window_blocks), block)
        slots = [self.slot(b) for b in blocks]
        if blocks.start > 0:
            slots = [*range(self.sink_blocks), *slots[self.sink_blocks :]]
        return CachePlan(tuple(slots), len(slots), self._frames(blocks), None), blocks, blocks.start

    def _plan(self, blocks: Sequence[int], visible: int, oldest: int | None, anchor: int) -> CachePlan:
        slots = tuple(self.slot(block) for block in blocks)
        return CachePlan(slots, visible, self._frames(blocks), self._sink_position(oldest, anchor))

    def _frames(self, blocks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.position(b) + i for b in blocks for i in range(self.stream.frames_per_block))

    def _sink_position(self, oldest: int | None, anchor: int) -> int | None:
        """The sink stands right before the oldest block of the window's ring, and never before where it was made."""
        if oldest is None or self.stream.rope == "absolute" or not self.sink_blocks:
            return None
        return max(self.position(anchor), self.position(oldest) - self.stream.sink)


class KVCache:
    """Keys and values of every layer, preallocated.

    Attributes:
        k, v: [layers, B, slots * block_tokens, heads, head_dim]; keys rotated to the positions where they stand.
        sink_k: [layers, B, sink tokens, heads, head_dim], the sink's keys before rotation.
    """

    def __init__(
        self,
        stream: StreamConfig,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        frame_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        batch: int = 1,
    ) -> None:
        self.block_tokens = stream.frames_per_block * frame_tokens
        self.sink_blocks = stream.sink_blocks
        shape = (layers, batch, stream.window_blocks * self.block_tokens, heads, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.sink_k = torch.zeros_like(self.k[:, :, : self.sink_blocks * self.block_tokens])
        self.sink_at: int | None = None

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.sink_k.nbytes

    def write(self, layer: int, plan: CachePlan, raw_k: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores one layer's keys and values [B, tokens, heads, head_dim] of the plan's input blocks in their slots."""
        for i, slot in enumerate(plan.slots):
            source = slice(i * self.block_tokens, (i + 1) * self.block_tokens)
            target = slice(slot * self.block_tokens, (slot + 1) * self.block_tokens)
            self.k[layer, :, target] = k[:, source]
            self.v[layer, :, target] = v[:, source]
            if slot < self.sink_blocks:
                self.sink_k[layer, :, target] = raw_k[:, source]

    def visible(self, layer: int, plan: CachePlan) -> tuple[Tensor, Tensor]:
        """The keys and values a plan's pass attends to, each [B, tokens, heads, head_dim]; views, not copies."""
        tokens = plan.visible * self.block_tokens
        return self.k[layer, :, :tokens], self.v[layer, :, :tokens]

    def touched_by(self, slot: int) -> list[Tensor]:
        """What denoising a block in a slot may change: the slot's keys and values, and the sink's keys; views."""
        tokens = slice(slot * self.block_tokens, (slot + 1) * self.block_tokens)
        return [self.k[:, :, tokens], self.v[:, :, tokens], self.k[:, :, : self.sink_k.shape[2]]]

    def place_sink(self, position: int, by: Rotation) -> None:
        """Rotates the sink's keys of all layers to stand at a position; `by` holds the sink tokens' rotations there."""
        self.k[:, :, : self.sink_k.shape[2]] = rotate(self.sink_k, by)
        self.sink_at = position
