"""The decoder of the Wan 2.1 VAE, one latent frame at a time: 16 latent channels in, RGB out, stride 4x8x8.

Tensor names are those of Wan2.1_VAE.pth (wan/modules/vae.py). The first latent frame of a stream becomes one frame,
every later one four. What earlier frames left behind lies in a cache that the caller keeps; clearing it between blocks
would leave seams. Knows no blocks, prompts or sinks.
"""

import torch
from torch import Tensor, nn

from configs.schema import LATENT_CHANNELS, VaeConfig
from workers.models.causal_conv import (
    Cache,
    CausalConv3d,
    ChannelNorm,
    ConvKind,
    FrameAttention,
    Numbers,
    ResidualBlock,
    prepare,
)


class Upsample(nn.Module):
    """Doubles height and width, halves channels; with `time` also doubles the number of frames, but not the first's."""

    def __init__(self, channels: int, *, time: bool, kind: ConvKind, numbers: Numbers) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv: CausalConv3d | None = None
        if time:
            self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1), kind=kind, number=numbers.next())

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        if self.time_conv is not None:
            x = self._more_frames(x, cache, batch, self.time_conv)
        return self.resample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _more_frames(self, x: Tensor, cache: Cache, batch: int, conv: CausalConv3d) -> Tensor:
        """Two frames for each, but one for the first of a stream, which later frames do not see either."""
        if conv.number not in cache:
            cache[conv.number] = torch.zeros_like(x).repeat(conv.kernel[0] - 1, 1, 1, 1)
            return x
        pairs = conv(x, cache, batch).unflatten(-1, (2, -1)).unflatten(0, (-1, batch))
        return pairs.permute(0, 4, 1, 2, 3, 5).flatten(0, 2)


class Decoder(nn.Module):
    """From features of latents to pixels."""

    def __init__(self, config: VaeConfig, kind: ConvKind, numbers: Numbers) -> None:
        super().__init__()
        mult = (config.dim_mult[-1], *reversed(config.dim_mult))
        widths = [config.base_dim * factor for factor in mult]
        times = tuple(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(LATENT_CHANNELS, widths[0], (3, 3, 3), kind=kind, number=numbers.next())
        self.middle = nn.ModuleList(
            [
                ResidualBlock(widths[0], widths[0], kind=kind, numbers=numbers),
                FrameAttention(widths[0]),
                ResidualBlock(widths[0], widths[0], kind=kind, numbers=numbers),
            ]
        )
        self.upsamples = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths[1:]):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(width, out, kind=kind, numbers=numbers))
                width = out
            if level < len(times):
                self.upsamples.append(Upsample(width, time=times[level], kind=kind, numbers=numbers))
                width //= 2
        self.head = nn.ModuleList(
            [
                ChannelNorm(width, 3),
                nn.SiLU(),
                CausalConv3d(width, 3, (3, 3, 3), kind=kind, number=numbers.next()),
            ]
        )

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        x = self.conv1(x, cache, batch)
        for part in (*self.middle, *self.upsamples):
            x = part(x, cache, batch)
        norm, silu, conv = self.head
        return conv(silu(norm(x)), cache, batch)


class VaeDecoder(nn.Module):
    """Decodes a stream of latents.

    Args:
        conv: `plain` is the definition, `stacked` a faster way.
    """

    def __init__(self, config: VaeConfig, conv: ConvKind = "stacked") -> None:
        super().__init__()
        self.config = config
        numbers = Numbers()
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1), kind=conv, number=numbers.next())
        self.decoder = Decoder(config, conv, numbers)
        self._mean_std: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> "VaeDecoder":
        """Lays weights and constants out for speed; once, after the weights are loaded and where they stay."""
        prepare(self)
        self._mean_std = self.statistics()
        return self

    def new_cache(self) -> Cache:
        """What a stream begins with."""
        return {}

    def decode(self, latent: Tensor, cache: Cache) -> Tensor:
        """Decodes the next latent frame of a stream.

        Args:
            latent: [B, 16, h, w], any floating dtype, as the transformer makes them.
            cache: of this stream; changed.

        Returns:
            [B, F, 3, 8h, 8w] in the weights' dtype, not clamped; F is 1 for the first latent frame, else 4.
        """
        batch = len(latent)
        x = self._denormalised(latent).permute(0, 2, 3, 1)
        pixels = self.decoder(self.conv2(x, cache, batch), cache, batch)
        return pixels.unflatten(0, (-1, batch)).permute(1, 0, 4, 2, 3)

    def _denormalised(self, latent: Tensor) -> Tensor:
        weight = self.conv2.weight
        mean, std = self._mean_std if self._mean_std is not None else self.statistics()
        return (latent.to(weight.device, torch.float32) * std + mean).to(weight.dtype)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation, [16, 1, 1] float32; made once, for a copy to a GPU waits for the GPU."""
        values = torch.tensor((self.config.latents_mean, self.config.latents_std), device=self.conv2.weight.device)
        mean, std = values[:, :, None, None]
        return mean, std


def to_rgb8(frames: Tensor) -> Tensor:
    """Pixels [..., 3, H, W] in -1 to 1 -> uint8 [..., H, W, 3]; what lies outside is clamped."""
    scaled = frames.movedim(-3, -1).float().add(1.0).mul(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8)
