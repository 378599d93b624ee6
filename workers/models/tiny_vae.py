"""TAEHV, a tiny decoder for latents of the Wan 2.1 VAE: fewer and smaller layers, a slightly softer picture.

Layout, tensor names and the file taew2_1.pth are those of github.com/madebyollin/taehv (Ollin Boer Bohan, MIT); this
code is written anew. It takes latents as the transformer makes them, without the full VAE's statistics. Every memory
layer sees its own input of one frame before. Two layers double the number of frames; what a stream's first latent
frame becomes is cut to the last of its four frames. Knows no blocks, prompts or sinks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import LATENT_CHANNELS

Shapes = dict[str, tuple[int, ...]]

WIDTHS = (256, 128, 64, 64)
"""Channels of the decoder at each size of the picture, the last those of its output layer."""
GROWTHS = (1, 2, 2)
"""Frames that each size makes of one."""
MEMORIES = 3
"""Memory layers at each size."""
FIRST, SIZE = 3, 6
"""Place of the first memory layer in the published list of layers, and layers of that list for each size."""
ENCODER_WIDTH = 64
POOLS = (2, 2, 1)
"""Frames that each size of the encoder makes one of."""
BOUND = 3.0
"""Latents are bent softly to less than this."""


class MemoryLayer(nn.Module):
    """Three convolutions of a frame beside the one before it, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, seen: Tensor) -> Tensor:
        """[1 + T, C, H, W], the frame before and T more -> [T, C, H, W]."""
        x = seen[1:]
        return F.relu(self.conv(torch.cat((x, seen[:-1]), dim=1)) + x)


class Growth(nn.Module):
    """Several frames of one."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] -> [T * frames, C, H, W]."""
        return self.conv(x).unflatten(1, (self.frames, -1)).flatten(0, 1)


class TinyVae(nn.Module):
    """The decoder's weights, at the published places."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {"1": _conv(LATENT_CHANNELS, WIDTHS[0])}
        for size, growth in enumerate(GROWTHS):
            place, width = FIRST + SIZE * size, WIDTHS[size]
            layers |= {str(place + number): MemoryLayer(width) for number in range(MEMORIES)}
            layers[str(place + 4)] = Growth(width, growth)
            layers[str(place + 5)] = _conv(width, WIDTHS[size + 1], bias=False)
        layers["22"] = _conv(WIDTHS[-1], 3)
        self.decoder = nn.ModuleDict(layers)

    def prepare(self) -> "TinyVae":
        """Lays weights out for speed; once, after they are loaded and where they stay."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return self


class TinySize:
    """The layers between two doublings of the picture, and what their memories hold.

    Args:
        frames: that come in at once, of height x width.
    """

    def __init__(self, vae: TinyVae, size: int, frames: int, height: int, width: int) -> None:
        place = FIRST + SIZE * size
        layers = [vae.decoder[str(place + number)] for number in range(SIZE) if number != MEMORIES]
        *self._memories, self._growth, self._conv = layers
        like = vae.decoder["1"].weight
        shape = (MEMORIES, 1 + frames, height, width, WIDTHS[size])
        self.seen = [seen.permute(0, 3, 1, 2) for seen in torch.zeros(shape, device=like.device, dtype=like.dtype)]

    def __call__(self, x: Tensor, *, only_last: bool) -> Tensor:
        """[T, C, H, W] -> [T * growth, C', 2H, 2W]; of these the last alone if nothing later needs the others."""
        for memory, seen in zip(self._memories, self.seen, strict=True):
            seen[1:].copy_(x)
            x = memory(seen)
            seen[0].copy_(seen[-1])
        x = self._growth(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self._conv(x[-1:] if only_last else x)


class StaticTinyVae:
    """Decodes one stream, in memory that never moves.

    Args:
        vae: the weights, where they stay.
        height, width: of a latent frame.
    """

    def __init__(self, vae: TinyVae, height: int, width: int) -> None:
        self._dtype = vae.decoder["1"].weight.dtype
        self._begin, self._end = vae.decoder["1"], vae.decoder["22"]
        self._sizes: list[TinySize] = []
        frames = 1
        for size, growth in enumerate(GROWTHS):
            self._sizes.append(TinySize(vae, size, frames, height << size, width << size))
            frames *= growth

    def buffers(self) -> list[Tensor]:
        """All memory that carries a stream from one latent frame to the next."""
        return [seen for size in self._sizes for seen in size.seen]

    def frames(self, latent: Tensor, *, first: bool) -> Tensor:
        """The frames of a stream's next latent frame.

        Args:
            latent: [16, h, w], as the transformer makes them, on the decoder's device.
            first: begins a stream; what was before is forgotten.

        Returns:
            [F, 3, 8h, 8w] float32 in -1 to 1; F is 1 for the first latent frame, else 4.
        """
        if first:
            for seen in self.buffers():
                seen[0].zero_()
        bent = torch.tanh(latent.float() / BOUND) * BOUND
        x = F.relu(self._begin(bent[None].to(self._dtype, memory_format=torch.channels_last)))
        for size in self._sizes:
            x = size(x, only_last=first and size is self._sizes[-1])
        return self._end(F.relu(x)).float().clamp(0, 1).mul(2).sub(1)


def tiny_encoder_shapes() -> Shapes:
    """Names and shapes of the file's other half, which the runtime has no use for."""
    width, square = ENCODER_WIDTH, (ENCODER_WIDTH, ENCODER_WIDTH, 3, 3)
    shapes: Shapes = {"encoder.0.weight": (width, 3, 3, 3), "encoder.0.bias": (width,)}
    for size, pool in enumerate(POOLS):
        place = 2 + (MEMORIES + 2) * size
        shapes[f"encoder.{place}.conv.weight"] = (width, pool * width, 1, 1)
        shapes[f"encoder.{place + 1}.weight"] = square
        for layer in range(place + 2, place + 2 + MEMORIES):
            shapes[f"encoder.{layer}.conv.0.weight"] = (width, 2 * width, 3, 3)
            shapes |= {f"encoder.{layer}.conv.{number}.weight": square for number in (2, 4)}
            shapes |= {f"encoder.{layer}.conv.{number}.bias": (width,) for number in (0, 2, 4)}
    return shapes | {"encoder.17.weight": (LATENT_CHANNELS, width, 3, 3), "encoder.17.bias": (LATENT_CHANNELS,)}


def _conv(width_in: int, width_out: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)
