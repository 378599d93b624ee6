"""Keys and values of self-attention in slots whose memory and shapes never change; which slot is data on the device.

The same slots as `kv_cache.CacheLayout` plans. Knows nothing of prompts, steps or noise.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from configs.schema import KVKind, StreamConfig
from workers.models.kernels import E4M3, TORCH, Codes, Kernels, quantised, rounded, turned
from workers.models.rope import Rotation

StoreKind = KVKind | Literal["attended"]
"""`execution.kv`, or `attended`: as attention in e4m3 takes them, for `execution.attend: fp8`."""


class LayerKV:
    """One layer's keys and values, as they are: part of a `KVStore`'s memory.

    Attributes:
        k, v: [slots, block tokens, heads, head_dim]; keys rotated to where they stand.
        sink_k: [sink slots, block tokens, heads, head_dim], the sink's keys before rotation.
        query_dtype: what attention over `visible` takes its queries in; None for the model's dtype.
    """

    query_dtype: torch.dtype | None = None

    def __init__(self, k: Tensor, v: Tensor, sink_k: Tensor) -> None:
        self.k, self.v, self.sink_k = k, v, sink_k
        self.block_tokens = k.shape[1]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores keys and values of n blocks, each [n * block tokens, heads, head_dim] float32 or the store's dtype.

        Args:
            slots: [n] int64 on the device.
        """
        for mine, new in ((self.k, k), (self.v, v)):
            made = rounded(new, mine.dtype).unflatten(0, (-1, self.block_tokens))
            _bytes(mine).index_copy_(0, slots, _bytes(made))

    def keep_sink(self, slots: Tensor, k: Tensor) -> None:
        """Stores un-rotated keys of n sink blocks; arguments as of `write`."""
        self.sink_k.index_copy_(0, slots, k.to(self.sink_k.dtype).unflatten(0, (-1, self.block_tokens)))

    def visible(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots, each [slots * block tokens, heads, head_dim]."""
        return self.k[:slots].flatten(0, 1), self.v[:slots].flatten(0, 1)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it as numbers: `k`, `v`, `sink_k`."""
        return self.k, self.v, self.sink_k

    def fill(self, k: Tensor, v: Tensor, sink_k: Tensor) -> None:
        """Takes over what another layer's `read` gave, whatever it is kept in."""
        for mine, new in ((self.k, k), (self.v, v), (self.sink_k, sink_k)):
            mine.copy_(rounded(new, mine.dtype))


class StoreSize(NamedTuple):
    """What a store is for: the stream's slots, the transformer's layers and heads, tokens of a latent frame, where."""

    stream: StreamConfig
    layers: int
    heads: int
    head_dim: int
    frame_tokens: int
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        """[layers, slots, block tokens, heads, head_dim]."""
        stream = self.stream
        tokens = stream.frames_per_block * self.frame_tokens
        return (self.layers, stream.window_blocks, tokens, self.heads, self.head_dim)


class KVStore:
    """Keys and values of all layers, as they are.

    Attributes:
        k, v, sink_k: as of `LayerKV`, [layers, ...].
        layers: each layer's part.

    Args:
        sink_dtype: of `sink_k`; `dtype` if not given.
    """

    def __init__(self, size: StoreSize, dtype: torch.dtype, sink_dtype: torch.dtype | None = None) -> None:
        shape, device = size.shape, size.device
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        sinks = (size.layers, size.stream.sink_blocks, *shape[2:])
        self.sink_k = torch.zeros(sinks, device=device, dtype=sink_dtype or dtype)
        self.layers = [LayerKV(*parts) for parts in zip(self.k, self.v, self.sink_k, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    def buffers(self) -> list[Tensor]:
        """All its memory."""
        return [self.k, self.v, self.sink_k]

    def at_work(self, blocks: int, visible: int) -> Sequence[LayerKV]:
        """Each layer's part as a pass of so many blocks, of so many that it sees, reads and writes it."""
        return self.layers

    def touched_by(self, slot: int) -> list[Tensor]:
        """What denoising a block in a slot may change: the slot's keys and values, and the sink's keys; views."""
        return [self.k[:, slot], self.v[:, slot], self.k[:, : self.sink_k.shape[1]]]

    def move_sink(self, by: Rotation, kernels: Kernels = TORCH) -> None:
        """Rotates the sink's keys of all layers to where `by` [sink tokens, head_dim / 2] says."""
        kernels.turn_sink(self.sink_k, by, self.k[:, : self.sink_k.shape[1]])


class RoundedLayerKV(LayerKV):
    """One layer's part of a `RoundedKVStore`."""

    query_dtype = E4M3

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k.to(self.sink_k.dtype), self.v.to(self.sink_k.dtype), self.sink_k


class AloneLayerKV(RoundedLayerKV):
    """The same part for a block that sees itself alone: it is remembered in e4m3 and seen as it is.

    Args:
        seen: keys and values of the block at work, [block tokens, heads, head_dim] each, all layers' in turn.
    """

    query_dtype = None

    def __init__(self, k: Tensor, v: Tensor, sink_k: Tensor, seen: tuple[Tensor, Tensor]) -> None:
        super().__init__(k, v, sink_k)
        self.seen = seen

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """As of `LayerKV`; what is written is seen until this or another layer is written to next."""
        super().write(slots, k, v)
        for seen, new in zip(self.seen, (k, v), strict=True):
            seen.copy_(new)

    def visible(self, slots: int) -> tuple[Tensor, Tensor]:
        return self.seen


class RoundedKVStore(KVStore):
    """Keys and values in e4m3 without scales, as FP8 attention takes them; the sink's keys before rotation in `dtype`.

    A float format needs no scale where values lie within its normal range, 2^-6 to 448, as normed keys do. A block that
    sees itself alone, a stream's first, is attended as it is: where objects start is read off its noise, too finely for
    e4m3.

    Attributes:
        alone: each layer's part in passes of such a block.
    """

    def __init__(self, size: StoreSize, dtype: torch.dtype) -> None:
        super().__init__(size, E4M3, sink_dtype=dtype)
        seen = torch.zeros((2, *self.k.shape[2:]), device=size.device, dtype=dtype)
        self.seen = seen[0], seen[1]
        self.alone = [AloneLayerKV(part.k, part.v, part.sink_k, self.seen) for part in self.layers]
        self.layers = [RoundedLayerKV(part.k, part.v, part.sink_k) for part in self.layers]

    def buffers(self) -> list[Tensor]:
        return [*super().buffers(), *self.seen]

    def at_work(self, blocks: int, visible: int) -> Sequence[LayerKV]:
        return self.alone if blocks == visible == 1 else self.layers


class QuantisedLayerKV(LayerKV):
    """One layer's part of a `QuantisedKVStore`.

    Args:
        scales: [slots, block tokens, heads, 1] float32 of keys and of values, [sink slots, ...] of the sink's keys.
        seen: keys and values as attention sees them, [slots, block tokens, heads, head_dim] each, all layers' in turn.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        sink_k: Tensor,
        scales: tuple[Tensor, Tensor, Tensor],
        seen: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__(k, v, sink_k)
        self.k_scale, self.v_scale, self.sink_scale = scales
        self.seen_k, self.seen_v = seen

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """As of `LayerKV`; what is written is seen as it was given until this or another layer is written to next."""
        parts = (self.k, self.k_scale, self.seen_k, k), (self.v, self.v_scale, self.seen_v, v)
        for mine, scales, seen, new in parts:
            self._put(mine, scales, slots, new)
            seen.copy_(mine.float() * scales)
            seen.index_copy_(0, slots, new.to(seen.dtype).unflatten(0, (-1, self.block_tokens)))

    def keep_sink(self, slots: Tensor, k: Tensor) -> None:
        self._put(self.sink_k, self.sink_scale, slots, k)

    def visible(self, slots: int) -> tuple[Tensor, Tensor]:
        return self.seen_k[:slots].flatten(0, 1), self.seen_v[:slots].flatten(0, 1)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        k, v, sink_k = (codes.float() * scale for codes, scale in self._parts())
        return k, v, sink_k

    def fill(self, k: Tensor, v: Tensor, sink_k: Tensor) -> None:
        for (mine, scales), new in zip(self._parts(), (k, v, sink_k), strict=True):
            codes, scale = quantised(new, mine.dtype)
            mine.copy_(codes)
            scales.copy_(scale)

    def _parts(self) -> tuple[Codes, ...]:
        return Codes(self.k, self.k_scale), Codes(self.v, self.v_scale), Codes(self.sink_k, self.sink_scale)

    def _put(self, mine: Tensor, scales: Tensor, slots: Tensor, new: Tensor) -> None:
        codes, scale = quantised(new.unflatten(0, (-1, self.block_tokens)), mine.dtype)
        _bytes(mine).index_copy_(0, slots, _bytes(codes))
        scales.index_copy_(0, slots, scale)


class QuantisedKVStore(KVStore):
    """Keys and values in 8 bits, with one scale for each token and head.

    Attention sees what is remembered through the codes, made into `dtype` anew for each layer of each pass, and the
    blocks at work as they are: where objects start is read off a first block's own noise, too finely for e4m3. (KIVI,
    Liu et al. 2024, also leaves the newest tokens as they are.) Attributes of `KVStore` are codes here, their scales
    beside them.
    """

    def __init__(self, size: StoreSize, dtype: torch.dtype, code: torch.dtype) -> None:
        super().__init__(size, code)
        device = size.device
        self.k_scale, self.v_scale, self.sink_scale = (
            torch.zeros((*codes.shape[:-1], 1), device=device) for codes in (self.k, self.v, self.sink_k)
        )
        seen = torch.zeros((2, *self.k.shape[1:]), device=device, dtype=dtype)
        self.seen = seen[0], seen[1]
        scales = zip(self.k_scale, self.v_scale, self.sink_scale, strict=True)
        self.layers = [
            QuantisedLayerKV(part.k, part.v, part.sink_k, own, self.seen)
            for part, own in zip(self.layers, scales, strict=True)
        ]

    def buffers(self) -> list[Tensor]:
        return [*super().buffers(), self.k_scale, self.v_scale, self.sink_scale, *self.seen]

    def touched_by(self, slot: int) -> list[Tensor]:
        scales = [self.k_scale[:, slot], self.v_scale[:, slot], self.k_scale[:, : self.sink_k.shape[1]]]
        return [*super().touched_by(slot), *scales]

    def move_sink(self, by: Rotation, kernels: Kernels = TORCH) -> None:
        layers, slots = self.sink_k.shape[:2]
        keys = (self.sink_k.float() * self.sink_scale).flatten(1, 2).transpose(0, 1)
        there = turned(keys.flatten(1, 2), by).unflatten(1, (layers, -1)).transpose(0, 1)
        codes, scale = quantised(there.unflatten(1, (slots, -1)), self.k.dtype)
        _bytes(self.k)[:, :slots].copy_(_bytes(codes))
        self.k_scale[:, :slots].copy_(scale)


def _bytes(values: Tensor) -> Tensor:
    """The same memory, of 8-bit values as int8: torch copies 8-bit floats by index on few devices."""
    return values.view(torch.int8) if values.element_size() == 1 else values


def new_store(kind: StoreKind, stream: StreamConfig, dtype: torch.dtype, **sizes: int | torch.device) -> KVStore:
    """The store of a kind; sizes as of `StoreSize`."""
    size = StoreSize(stream, **sizes)  # type: ignore[arg-type]
    if kind == "attended":
        return RoundedKVStore(size, dtype)
    if kind == "model":
        return KVStore(size, dtype)
    return QuantisedKVStore(size, dtype, {"int8": torch.int8, "fp8": E4M3}[kind])
