"""The straightforward VAE decoder that the fast one is measured against: whole videos in `[B, C, T, H, W]`, `conv3d`.

The weights are the runtime's own modules'; only the way to compute differs. Past frames are concatenated, padded and
cloned at every convolution, and upsampling goes through float32, as Wan 2.1's own code does (wan/modules/vae.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models.causal_conv import CausalConv3d, ChannelNorm, FrameAttention, ResidualBlock
from workers.models.vae import Upsample, VaeDecoder

CACHE_FRAMES = 2


class BaselineVae:
    """Decodes one latent frame after the other, as `VaeDecoder.decode` does."""

    def __init__(self, decoder: VaeDecoder) -> None:
        self._decoder = decoder
        self._past: dict[int, Tensor] = {}
        self._begun = False

    def decode(self, latent: Tensor) -> Tensor:
        """[B, 16, h, w] -> [B, F, 3, 8h, 8w] in the weights' dtype, not clamped; F is 1 for the first, else 4."""
        mine = self._decoder
        mean, std = (torch.tensor(v)[:, None, None] for v in (mine.config.latents_mean, mine.config.latents_std))
        x = (latent.float() * std.to(latent.device) + mean.to(latent.device)).to(mine.conv2.weight.dtype)[:, :, None]
        decoder = mine.decoder
        x = self._conv(mine.conv2, x)
        x = self._conv(decoder.conv1, x)
        for part in (*decoder.middle, *decoder.upsamples):
            x = self._part(part, x)
        norm, _, conv = decoder.head
        x = self._conv(conv, F.silu(_norm(norm, x)))
        self._begun = True
        return x.transpose(1, 2)

    def _part(self, part: nn.Module, x: Tensor) -> Tensor:
        match part:
            case ResidualBlock():
                norm1, _, conv1, norm2, _, _, conv2 = part.residual
                out = x if part.shortcut is None else self._conv(part.shortcut, x)
                y = self._conv(conv1, F.silu(_norm(norm1, x)))
                return out + self._conv(conv2, F.silu(_norm(norm2, y)))
            case FrameAttention():
                return _attend(part, x)
            case Upsample():
                return self._upsample(part, x)
        raise TypeError(f"{type(part).__name__}: no part of the VAE's decoder")

    def _upsample(self, part: Upsample, x: Tensor) -> Tensor:
        if part.time_conv is not None:
            if self._begun:
                pairs = self._conv(part.time_conv, x).unflatten(1, (2, -1))
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            else:
                frames = torch.zeros_like(x).expand(-1, -1, CACHE_FRAMES, -1, -1)
                self._past[part.time_conv.number] = frames.clone()
        frames = x.transpose(1, 2)
        larger = F.interpolate(frames.flatten(0, 1).float(), scale_factor=2.0, mode="nearest-exact").to(x.dtype)
        conv = part.resample[1]
        out = F.conv2d(larger, conv.weight, conv.bias, padding=1)
        return out.unflatten(0, frames.shape[:2]).transpose(1, 2)

    def _conv(self, conv: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(conv, CausalConv3d)
        taps, height, width = conv.kernel
        if taps > 1:
            past = self._past.get(conv.number)
            whole = x if past is None else torch.cat([past, x], dim=2)
            self._past[conv.number] = whole[:, :, -CACHE_FRAMES:].clone()
            x = F.pad(whole, (0, 0, 0, 0, max(0, taps - 1 - (whole.shape[2] - x.shape[2])), 0))
        return F.conv3d(F.pad(x, (width // 2, width // 2, height // 2, height // 2)), conv.weight, conv.bias)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, ChannelNorm)
    gamma = norm.gamma.flatten()[:, None, None, None]
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma


def _attend(part: FrameAttention, x: Tensor) -> Tensor:
    frames = _norm(part.norm, x).transpose(1, 2)
    flat = frames.flatten(0, 1)
    qkv = F.conv2d(flat, part.to_qkv.weight, part.to_qkv.bias).flatten(2).transpose(1, 2)[:, None]
    seen = F.scaled_dot_product_attention(*(t.contiguous() for t in qkv.chunk(3, dim=-1)))
    seen = seen[:, 0].transpose(1, 2).unflatten(2, flat.shape[2:])
    return x + F.conv2d(seen, part.proj.weight, part.proj.bias).unflatten(0, frames.shape[:2]).transpose(1, 2)
