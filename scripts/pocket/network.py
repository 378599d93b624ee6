"""The transformer as it is trained: many clips, many blocks and many noise levels in one pass, with gradients.

Weights and layers are the runtime's `CausalWanTransformer`; this file only arranges what attends to what, as
`workers.models.kv_cache` does it for one stream (compared in tests). Knows no loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import StreamConfig, VideoConfig
from workers.models.rope import Rotation, rotate, rotation
from workers.models.transformer import CausalWanTransformer, Layer, unpatchify

Blocks = tuple[Tensor, ...]


@dataclass(frozen=True)
class Text:
    """Cross-attention keys and values by layer, [B, n + 1, heads, head_dim], and what is added to their scores.

    The last key stands for all empty positions up to `text_len`: they are alike, so their number is a bias.
    """

    k: list[Tensor]
    v: list[Tensor]
    bias: Tensor


@dataclass(frozen=True)
class Kept:
    """What a block leaves for later ones in every layer, [B, tokens, heads, head_dim]: keys, turned keys, values."""

    raw: list[Tensor]
    turned: list[Tensor]
    v: list[Tensor]

    def detached(self) -> "Kept":
        return Kept(*([t.detach() for t in part] for part in (self.raw, self.turned, self.v)))


def timestep_embeddings(timesteps: Tensor, channels: int) -> Tensor:
    """As `workers.models.transformer.timestep_embedding`, for [...] timesteps -> [..., channels] float32."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float64, device=timesteps.device)
    angles = timesteps.double()[..., None] * torch.pow(10000.0, -steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, L, heads, head_dim] -> [B, L, heads * head_dim]; `bias` [keys] is added to the scores."""
    q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype).expand(len(q), 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def to_self_attention(layer: Layer, x: Tensor, modulation: Tensor, turn: Rotation) -> tuple[Tensor, ...]:
    """x [B, F, P, dim], modulation [B, F, 6, dim] -> turned queries, raw keys, turned keys, values."""
    shift, scale = (layer.modulation[0, i] + modulation[:, :, None, i] for i in (0, 1))
    y = (layer.norm1(x) * (1 + scale) + shift).flatten(1, 2)
    raw, v = layer.self_attn.key_value(y)
    return rotate(layer.self_attn.query(y), turn), raw, rotate(raw, turn), v


def from_self_attention(
    layer: Layer, x: Tensor, seen: Tensor, modulation: Tensor, k: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    """What attention saw [B, F * P, dim] joins x; then cross-attention and feed-forward."""
    gate1, shift, scale, gate2 = (layer.modulation[0, i] + modulation[:, :, None, i] for i in (2, 3, 4, 5))
    x = x + layer.self_attn.o(seen).view_as(x) * gate1
    q = layer.cross_attn.query(layer.norm3(x)).flatten(1, 2)
    x = x + layer.cross_attn.o(attend(q, k, v, bias)).view_as(x)
    return x + layer.ffn(layer.norm2(x) * (1 + scale) + shift) * gate2


class TrainedTransformer:
    """Passes of a transformer over blocks of many streams.

    Args:
        model: whose weights are used, and trained.
        layer_compiler: applied to the two halves of a layer, such as `torch.compile`.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        layer_compiler: Callable[[Callable[..., object]], Callable[..., object]] = lambda f: f,
    ) -> None:
        self.model, self.stream = model, stream
        self.rows, self.columns = video.latent_height // 2, video.latent_width // 2
        self.patches = video.frame_tokens
        self.per_block = stream.frames_per_block
        self._before = layer_compiler(to_self_attention)
        self._after = layer_compiler(from_self_attention)
        self._turns: dict[tuple[int, ...], Rotation] = {}

    def text(self, embeds: Tensor) -> Text:
        """embeds [B, n, text_dim], zero after a caption's end."""
        model, known = self.model, embeds.shape[1]
        context = model.text_embedding(F.pad(embeds.to(model.dtype), (0, 0, 0, 1)))
        pairs = [layer.cross_attn.key_value(context) for layer in model.blocks]
        bias = torch.zeros(known + 1, device=embeds.device)
        bias[-1] = math.log(model.config.text_len - known)
        return Text([k for k, _ in pairs], [v for _, v in pairs], bias)

    def turn(self, frames: Sequence[int]) -> Rotation:
        """The rotation of all tokens of latent frames at some positions."""
        key = tuple(frames)
        if key not in self._turns:
            self._turns[key] = rotation(key, self.rows, self.columns, self.model.config.head_dim, self.model.device)
        return self._turns[key]

    def sink_frame(self, block: int) -> int:
        """Position of the sink's first latent frame while a block is denoised."""
        ring = self.stream.window_blocks - self.stream.sink_blocks
        return max(0, (block - ring + 1) * self.per_block - self.stream.sink)

    def view(self, block: int) -> tuple[list[int], list[int]]:
        """The blocks in the sink and in the ring that a block sees beside itself."""
        sink, window = self.stream.sink_blocks, self.stream.window_blocks
        if block < window:
            return [], list(range(block))
        return list(range(sink)), list(range(block - (window - sink) + 1, block))

    def teacher_forced(self, clean: Tensor, noisy: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The flow of every noisy block given the clean blocks before it.

        Args:
            clean, noisy: [B, T, 16, h, w], T whole blocks.
            timesteps: [B, blocks] of the noisy blocks.

        Returns:
            [B, T, 16, h, w] float32.
        """
        frames = clean.shape[1]
        blocks, size = frames // self.per_block, self.per_block * self.patches
        times = timesteps.repeat_interleave(self.per_block, dim=1)
        time = self._time(torch.cat([torch.full_like(times, self.stream.context_noise), times], dim=1))
        modulation = self.model.time_projection(time).unflatten(-1, (6, -1))
        x = self._patches(torch.cat([clean, noisy], dim=1))
        turn = self.turn([*range(frames), *range(frames)])
        for index, layer in enumerate(self.model.blocks):
            q, raw, k, v = self._before(layer, x, modulation, turn)
            # Unbound at once: the gradient of an index would be a tensor of zeros as large as all blocks, for each.
            q, raw, k, v = (t.unflatten(1, (2 * blocks, size)).unbind(1) for t in (q, raw, k, v))
            seen = [self._seen(q, raw, k, v, b, own) for own in range(2 * blocks) for b in (own % blocks,)]
            x = self._after(layer, x, torch.cat(seen, dim=1), modulation, text.k[index], text.v[index], text.bias)
        return self._flow(x[:, frames:], time[:, frames:])

    def _seen(self, q: Blocks, raw: Blocks, k: Blocks, v: Blocks, block: int, own: int) -> Tensor:
        """What the queries at place `own` see as block `block`: its past among the clean blocks, and itself."""
        sink, ring = self.view(block)
        blocks = [*sink, *ring, own]
        keys = [k[b] for b in blocks]
        if sink:
            first = self.sink_frame(block)
            turn = self.turn(range(first, first + self.stream.sink))
            keys[: len(sink)] = [rotate(torch.cat(raw[: len(sink)], dim=1), turn)]
        return attend(q[own], torch.cat(keys, dim=1), torch.cat([v[b] for b in blocks], dim=1))

    def pass_over(
        self, latents: Tensor, timestep: float, first: int, text: Text, context: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Kept]:
        """One pass over whole blocks of all streams, which see each other and a context.

        Args:
            latents: [B, F, 16, h, w].
            first: position of the first latent frame.
            context: by layer, keys as they are to be seen and values; empty for none.

        Returns:
            The flow [B, F, 16, h, w] float32, and what these blocks leave.
        """
        frames = latents.shape[1]
        time = self._time(torch.full(latents.shape[:2], float(timestep), device=latents.device))
        modulation = self.model.time_projection(time).unflatten(-1, (6, -1))
        x = self._patches(latents)
        turn = self.turn(range(first, first + frames))
        kept = Kept([], [], [])
        for index, layer in enumerate(self.model.blocks):
            q, raw, k, v = self._before(layer, x, modulation, turn)
            for part, tensor in zip((kept.raw, kept.turned, kept.v), (raw, k, v), strict=True):
                part.append(tensor)
            if context:
                k, v = torch.cat([context[index][0].to(k.dtype), k], dim=1), torch.cat([context[index][1], v], dim=1)
            seen = attend(q, k, v)
            x = self._after(layer, x, seen, modulation, text.k[index], text.v[index], text.bias)
        return self._flow(x, time), kept

    def context(self, kept: dict[int, Kept], block: int) -> list[tuple[Tensor, Tensor]]:
        """What a block sees of the past, by layer, from what blocks left."""
        sink, ring = self.view(block)
        out = []
        for layer in range(len(self.model.blocks)):
            keys = [kept[b].turned[layer] for b in ring]
            if sink:
                first = self.sink_frame(block)
                raw = torch.cat([kept[b].raw[layer] for b in sink], dim=1)
                keys.insert(0, rotate(raw, self.turn(range(first, first + self.stream.sink))))
            if keys:
                out.append((torch.cat(keys, dim=1), torch.cat([kept[b].v[layer] for b in (*sink, *ring)], dim=1)))
        return out

    def _patches(self, latents: Tensor) -> Tensor:
        x = self.model.patch_embedding(latents.to(self.model.dtype).transpose(1, 2))
        return x.flatten(3).permute(0, 2, 3, 1)

    def _time(self, timesteps: Tensor) -> Tensor:
        return self.model.time_embedding(
            timestep_embeddings(timesteps, self.model.config.freq_dim).to(self.model.dtype)
        )

    def _flow(self, x: Tensor, time: Tensor) -> Tensor:
        head = self.model.head
        shift, scale = (head.modulation[0, i] + time[:, :, None] for i in (0, 1))
        out = head.head(head.norm(x) * (1 + scale) + shift).flatten(1, 2)
        return unpatchify(out, x.shape[1], self.rows, self.columns).float()
