"""Keys and values of self-attention in slots whose memory and shapes never change; which slot is data on the device.

The same slots as `kv_cache.CacheLayout` plans. Knows nothing of prompts, steps or noise.
"""

import torch
from torch import Tensor

from configs.schema import StreamConfig
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
        return self.k.nbytes + self.v.nbytes + self.sink_k.nbytes

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
