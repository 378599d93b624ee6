"""The encoder of the Wan 2.1 VAE: RGB in, 16 latent channels out, stride 4x8x8.

Tensor names are those of Wan2.1_VAE.pth. The first frame of a video becomes one latent frame, every later four become
one. The runtime never encodes; training and quality evaluation do.
"""

import torch
from torch import Tensor, nn

from configs.schema import LATENT_CHANNELS, TEMPORAL_STRIDE, VaeConfig
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


class Downsample(nn.Module):
    """Halves height and width; with `time` also the number of frames, but for the first of a video."""

    def __init__(self, channels: int, *, time: bool, kind: ConvKind, numbers: Numbers) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv: CausalConv3d | None = None
        if time:
            self.time_conv = CausalConv3d(
                channels, channels, (3, 1, 1), kind=kind, number=numbers.next(), time_stride=2
            )

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        x = self.resample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.time_conv is None:
            return x
        before = cache.get(self.time_conv.number)
        cache[self.time_conv.number] = x[-batch:]
        return x if before is None else self.time_conv.taps(torch.cat([before, x]), batch)


class Encoder(nn.Module):
    """From pixels to the features of latents."""

    def __init__(self, config: VaeConfig, kind: ConvKind, numbers: Numbers) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], (3, 3, 3), kind=kind, number=numbers.next())
        self.downsamples = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths[1:]):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(width, out, kind=kind, numbers=numbers))
                width = out
            if level < len(config.temporal_downsample):
                time = config.temporal_downsample[level]
                self.downsamples.append(Downsample(width, time=time, kind=kind, numbers=numbers))
        self.middle = nn.ModuleList(
            [
                ResidualBlock(width, width, kind=kind, numbers=numbers),
                FrameAttention(width),
                ResidualBlock(width, width, kind=kind, numbers=numbers),
            ]
        )
        self.head = nn.ModuleList(
            [
                ChannelNorm(width, 3),
                nn.SiLU(),
                CausalConv3d(width, 2 * LATENT_CHANNELS, (3, 3, 3), kind=kind, number=numbers.next()),
            ]
        )

    def forward(self, x: Tensor, cache: Cache, batch: int) -> Tensor:
        x = self.conv1(x, cache, batch)
        for part in (*self.downsamples, *self.middle):
            x = part(x, cache, batch)
        norm, silu, conv = self.head
        return conv(silu(norm(x)), cache, batch)


class VaeEncoder(nn.Module):
    """Encodes a video.

    Args:
        conv: `plain` is the definition, `stacked` the fast way on a CPU.
    """

    def __init__(self, config: VaeConfig, conv: ConvKind = "stacked") -> None:
        super().__init__()
        self.config = config
        numbers = Numbers()
        self.encoder = Encoder(config, conv, numbers)
        width = 2 * LATENT_CHANNELS
        self.conv1 = CausalConv3d(width, width, (1, 1, 1), kind=conv, number=numbers.next())

    def prepare(self) -> "VaeEncoder":
        """Lays weights out for speed; once, after they are loaded."""
        prepare(self)
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """The mean of the latents of a whole video.

        Args:
            frames: [B, 1 + 4k, 3, H, W] in -1 to 1, H and W divisible by 8.

        Returns:
            [B, 1 + k, 16, H/8, W/8] float32, normalised as the transformer makes them.
        """
        batch, count = frames.shape[:2]
        if (count - 1) % TEMPORAL_STRIDE:
            raise ValueError(f"a video has 1 + 4k frames, found {count}")
        dtype = self.conv1.weight.dtype
        x = frames.to(dtype).permute(1, 0, 3, 4, 2)
        cache: Cache = {}
        pieces = [x[:1], *x[1:].split(TEMPORAL_STRIDE)]
        features = torch.cat([self.encoder(piece.flatten(0, 1), cache, batch) for piece in pieces])
        mean = self.conv1(features, cache, batch)[..., :LATENT_CHANNELS].float()
        return self._normalised(mean).unflatten(0, (-1, batch)).permute(1, 0, 4, 2, 3)

    def _normalised(self, mean: Tensor) -> Tensor:
        offset = torch.tensor(self.config.latents_mean, device=mean.device)
        return (mean - offset) / torch.tensor(self.config.latents_std, device=mean.device)
