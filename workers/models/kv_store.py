"""Keys and values of self-attention in slots whose memory and shapes never change; which slot is data on the device.

The same slots as `kv_cache.CacheLayout` plans. Knows nothing of prompts, steps or noise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import KVKind, StreamConfig
from workers.models.kernels import turned
from workers.models.rope import Rotation


class KVStore:
    """Keys and values as they are.

    Attributes:
        k, v: [layers, slots, block tokens, heads, head_dim]; keys rotated to where they stand.
        sink_k: [layers, sink slots, block tokens, heads, head_dim], the sink's keys before rotation.
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
    ) -> None:
        self.block_tokens = stream.frames_per_block * frame_tokens
        shape = (layers, stream.window_blocks, self.block_tokens, heads, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.sink_k = torch.zeros((layers, stream.sink_blocks, *shape[2:]), device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    def buffers(self) -> list[Tensor]:
        """All its memory."""
        return [self.k, self.v, self.sink_k]

    def touched_by(self, slot: int) -> list[Tensor]:
        """What denoising a block in a slot may change: the slot's keys and values, and the sink's keys; views."""
        return [self.k[:, slot], self.v[:, slot], self.k[:, : self.sink_k.shape[1]]]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores keys and values of n blocks, each [n * block tokens, heads, head_dim] float32 or the store's dtype.

        Args:
            slots: [n] int64 on the device.
        """
        for mine, new in ((self.k[layer], k), (self.v[layer], v)):
            mine.index_copy_(0, slots, new.to(mine.dtype).unflatten(0, (-1, self.block_tokens)))

    def keep_sink(self, layer: int, slots: Tensor, k: Tensor) -> None:
        """Stores un-rotated keys of n sink blocks; arguments as of `write`."""
        mine = self.sink_k[layer]
        mine.index_copy_(0, slots, k.to(mine.dtype).unflatten(0, (-1, self.block_tokens)))

    def move_sink(self, by: Rotation) -> None:
        """Rotates the sink's keys of all layers to where `by` [sink tokens, head_dim / 2] says."""
        layers, slots = self.sink_k.shape[:2]
        keys = self.sink_k.flatten(1, 2).transpose(0, 1).float()
        there = turned(keys.flatten(1, 2), by).unflatten(1, (layers, -1)).transpose(0, 1)
        self.k[:, :slots].copy_(there.unflatten(1, (slots, -1)))

    def visible(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots, each [slots * block tokens, heads, head_dim]."""
        return self.k[layer, :slots].flatten(0, 1), self.v[layer, :slots].flatten(0, 1)


class Codes(NamedTuple):
    """8-bit values and what each token's head was divided by: [..., heads, head_dim] and [..., heads, 1] float32."""

    codes: Tensor
    scale: Tensor


LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest value that a code holds."""


def quantised(x: Tensor, dtype: torch.dtype) -> Codes:
    """x [..., heads, head_dim] as codes of a dtype; each token's head uses its whole range. Zeros stay zeros."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    units = wide / scale
    return Codes((units.round() if dtype == torch.int8 else units).to(dtype), scale)


class QuantisedKVStore(KVStore):
    """Keys and values in 8 bits, with one scale for each token and head.

    What attention sees is made of the codes anew in every pass, in `dtype`; nothing else of the cache is kept.
    Attributes of `KVStore` are codes here, their scales beside them.
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
        code: torch.dtype,
    ) -> None:
        super().__init__(
            stream,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            frame_tokens=frame_tokens,
            device=device,
            dtype=code,
        )
        self.dtype = dtype
        self.k_scale, self.v_scale, self.sink_scale = (
            torch.zeros((*codes.shape[:-1], 1), device=device) for codes in (self.k, self.v, self.sink_k)
        )

    def buffers(self) -> list[Tensor]:
        return [*super().buffers(), self.k_scale, self.v_scale, self.sink_scale]

    def touched_by(self, slot: int) -> list[Tensor]:
        scales = [self.k_scale[:, slot], self.v_scale[:, slot], self.k_scale[:, : self.sink_k.shape[1]]]
        return [*super().touched_by(slot), *scales]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self._put(self.k[layer], self.k_scale[layer], slots, k)
        self._put(self.v[layer], self.v_scale[layer], slots, v)

    def keep_sink(self, layer: int, slots: Tensor, k: Tensor) -> None:
        self._put(self.sink_k[layer], self.sink_scale[layer], slots, k)

    def move_sink(self, by: Rotation) -> None:
        layers, slots = self.sink_k.shape[:2]
        keys = (self.sink_k.float() * self.sink_scale).flatten(1, 2).transpose(0, 1)
        there = turned(keys.flatten(1, 2), by).unflatten(1, (layers, -1)).transpose(0, 1)
        codes, scale = quantised(there.unflatten(1, (slots, -1)), self.k.dtype)
        _bytes(self.k)[:, :slots].copy_(_bytes(codes))
        self.k_scale[:, :slots].copy_(scale)

    def visible(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        parts = ((self.k, self.k_scale), (self.v, self.v_scale))
        k, v = ((codes[layer, :slots].float() * scale[layer, :slots]).to(self.dtype) for codes, scale in parts)
        return k.flatten(0, 1), v.flatten(0, 1)

    def _put(self, mine: Tensor, scales: Tensor, slots: Tensor, new: Tensor) -> None:
        codes, scale = quantised(new.unflatten(0, (-1, self.block_tokens)), mine.dtype)
        _bytes(mine).index_copy_(0, slots, _bytes(codes))
        scales.index_copy_(0, slots, scale)


def _bytes(codes: Tensor) -> Tensor:
    """The same memory as int8: torch copies 8-bit floats by index on few devices."""
    return codes.view(torch.int8)


def new_store(kind: KVKind, stream: StreamConfig, dtype: torch.dtype, **sizes: int | torch.device) -> KVStore:
    """The store of a configuration's kind; sizes as of `KVStore`."""
    if kind == "model":
        return KVStore(stream, dtype=dtype, **sizes)  # type: ignore[arg-type]
    code = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    return QuantisedKVStore(stream, dtype=dtype, code=code, **sizes)  # type: ignore[arg-type]
