"""The causal Wan 2.1 transformer, as a definition: one forward pass over some blocks of a stream.

Tensor names are those of Wan2.1-T2V-1.3B's `diffusion_pytorch_model.safetensors`. A pass sees the past through the
cache it is given, writes its own keys and values there, and returns the flow. It knows nothing of steps, noise levels
other than its timestep, prompts other than their keys and values, or of when it is called.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import LATENT_CHANNELS, PATCH, TransformerConfig
from workers.models.attention import Attention, attend_sdpa
from workers.models.kv_cache import CachePlan, KVCache
from workers.models.rope import Rotation, rotate, rotation


@dataclass(frozen=True)
class PromptKV:
    """Cross-attention keys and values of one prompt, per layer, each [B, text_len, heads, head_dim]."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


def timestep_embedding(timestep: float, channels: int, device: torch.device) -> Tensor:
    """Sinusoidal embedding [channels] of a timestep: cosines, then sines; float64 (Wan 2.1)."""
    half = channels // 2
    frequencies = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = timestep * frequencies
    return torch.cat([angles.cos(), angles.sin()])


class RMSNorm(nn.Module):
    """Root-mean-square norm over all channels, before they are split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, whatever the dtype of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Projections(nn.Module):
    """Query, key, value and output linears of an attention, with RMS norms on query and key."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), self.v(x).unflatten(-1, (self.heads, -1))


class Layer(nn.Module):
    """Self-attention over the cache, cross-attention over the prompt, feed-forward; each behind its norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1 = LayerNorm(dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = Projections(config)
        self.norm3 = LayerNorm(dim, eps=config.eps)
        self.cross_attn = Projections(config)
        self.norm2 = LayerNorm(dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        turn: Rotation,
        index: int,
        cache: KVCache,
        plan: CachePlan,
        prompt: PromptKV,
        attention: Attention,
    ) -> Tensor:
        """x [B, tokens, dim], timestep [6, dim] -> [B, tokens, dim]; writes layer `index` of the cache."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[0] + timestep).unbind(0)

        attn = self.self_attn
        y = self.norm1(x) * (1 + scale1) + shift1
        q = rotate(attn.query(y), turn)
        raw_k, v = attn.key_value(y)
        cache.write(index, plan, raw_k, rotate(raw_k, turn), v)
        y = attention.attend(q, *cache.visible(index, plan))
        x = x + attn.o(y.flatten(-2)) * gate1

        attn = self.cross_attn
        y = attention.attend(attn.query(self.norm3(x)), prompt.k[index], prompt.v[index])
        x = x + attn.o(y.flatten(-2))

        y = self.ffn(self.norm2(x) * (1 + scale2) + shift2)
        return x + y * gate2


class Head(nn.Module):
    """Modulated norm and linear from channels to the latents of a patch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, LATENT_CHANNELS * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        shift, scale = (self.modulation[0] + timestep).unbind(0)
        return self.head(self.norm(x) * (1 + scale) + shift)


class CausalWanTransformer(nn.Module):
    """The transformer; `blocks` holds its layers, named as in the published files."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(LATENT_CHANNELS, dim, (1, PATCH, PATCH), stride=(1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.attention = Attention("sdpa", attend_sdpa)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.head.weight.device

    def prompt_kv(self, embeds: Tensor) -> PromptKV:
        """Cross-attention keys and values of a prompt.

        Args:
            embeds: [B, n, text_dim], n <= text_len; padded with zeros to text_len, which all layers attend to, as the
                published model does.
        """
        padded = F.pad(embeds.to(self.device, self.dtype), (0, 0, 0, self.config.text_len - embeds.shape[1]))
        context = self.text_embedding(padded)
        pairs = [layer.cross_attn.key_value(context) for layer in self.blocks]
        return PromptKV(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def place_sink(self, cache: KVCache, plan: CachePlan, rows: int, columns: int, frames: int) -> None:
        """Moves the sink's keys to where the plan wants them, if they are not there yet."""
        if plan.sink is None or plan.sink == cache.sink_at:
            return
        positions = range(plan.sink, plan.sink + frames)
        cache.place_sink(plan.sink, rotation(positions, rows, columns, self.config.head_dim, self.device))

    def forward(self, latents: Tensor, timestep: float, prompt: PromptKV, cache: KVCache, plan: CachePlan) -> Tensor:
        """One pass.

        Args:
            latents: [B, F, 16, h, w] of the plan's blocks, in the order of time.
            timestep: noise level of all of them, 0 to 1000.

        Returns:
            The flow, [B, F, 16, h, w] float32.
        """
        _, frames, _, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        turn = rotation(plan.frames, rows, columns, self.config.head_dim, self.device)

        embedded = timestep_embedding(timestep, self.config.freq_dim, self.device).to(self.dtype)
        time = self.time_embedding(embedded)
        modulation = self.time_projection(time).unflatten(-1, (6, -1))

        x = self.patch_embedding(latents.to(self.dtype).transpose(1, 2)).flatten(2).transpose(1, 2)
        for index, layer in enumerate(self.blocks):
            x = layer(x, modulation, turn, index, cache, plan, prompt, self.attention)
        if plan.slots[0] == 0:
            cache.sink_at = plan.frames[0]
        return unpatchify(self.head(x, time), frames, rows, columns).float()


def unpatchify(x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """[B, frames * rows * columns, 2 * 2 * 16] -> [B, frames, 16, 2 * rows, 2 * columns]."""
    batch = x.shape[0]
    x = x.view(batch, frames, rows, columns, PATCH, PATCH, LATENT_CHANNELS)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, LATENT_CHANNELS, rows * PATCH, columns * PATCH)
