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
from workers.models.static_vae import phases
from workers.models.vae_kernels import TORCH, VaeKernels

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


class Growth(nn.Module):
    """Several frames of one."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)


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


class TinyMemory:
    """A memory layer over memory that stays.

    Args:
        frames: that come in at once, of height x width.

    Attributes:
        past: [1, H, W, C], the frame before.
    """

    def __init__(self, layer: MemoryLayer, frames: int, height: int, width: int, kernels: VaeKernels) -> None:
        first, _, self._second, _, self._third = layer.conv
        channels, like = len(first.weight), first.weight
        self._kernels, self._bias = kernels, first.bias
        # The frame before lies first here, in the published weights last.
        weight = torch.cat(first.weight.chunk(2, dim=1)[::-1], dim=1)
        self._weight = weight.contiguous(memory_format=torch.channels_last)
        self.past, self._beside = (
            torch.zeros(count, height, width, wide, device=like.device, dtype=like.dtype)
            for count, wide in ((1, channels), (frames, 2 * channels))
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[T, C, H, W] -> [T, C, H, W]."""
        self._kernels.lay_beside(x.permute(0, 2, 3, 1), None, None, self.past, self._beside)
        y = _conv_relu(self._beside.permute(0, 3, 1, 2), self._weight, self._bias)
        y = _conv_relu(y, self._second.weight, self._second.bias)
        return _conv_relu(y, self._third.weight, self._third.bias, beside=x)


class TinySize:
    """The layers between two doublings of the picture, and what their memories hold.

    Frames grow in number before the picture doubles, not after: a convolution of single pixels does not see the
    difference. The next convolves before the doubling too, once for each parity of row and column.

    Args:
        frames: that come in at once, of height x width.
    """

    def __init__(self, vae: TinyVae, size: int, frames: int, height: int, width: int, kernels: VaeKernels) -> None:
        place = FIRST + SIZE * size
        *memories, growth, conv = (vae.decoder[str(place + number)] for number in range(SIZE) if number != MEMORIES)
        self._kernels, self._doubles = kernels, GROWTHS[size] == 2
        self._memories = [TinyMemory(memory, frames, height, width, kernels) for memory in memories]
        self._growth, like = growth.conv.weight, conv.weight
        self._weight = phases(like).to(like.dtype).contiguous(memory_format=torch.channels_last)
        shape = (frames * GROWTHS[size], 2 * height, 2 * width, len(like))
        self._out = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.past = [memory.past for memory in self._memories]

    def __call__(self, x: Tensor, *, only_last: bool) -> Tensor:
        """[T, C, H, W] -> [T * growth, C', 2H, 2W]; of these the last alone if nothing later needs the others."""
        for memory in self._memories:
            x = memory(x)
        x = F.conv2d(x, self._growth).permute(0, 2, 3, 1)
        if self._doubles:
            x = self._kernels.split(x, None)
        if only_last:
            x = x[-1:]
        made = F.conv2d(x.permute(0, 3, 1, 2), self._weight, padding=1).permute(0, 2, 3, 1)
        return self._kernels.spread(made, None, self._out[: len(x)]).permute(0, 3, 1, 2)


class StaticTinyVae:
    """Decodes one stream, in memory that never moves.

    Args:
        vae: the weights, where they stay.
        height, width: of a latent frame.
        kernels: what computes the operations between convolutions.
    """

    def __init__(self, vae: TinyVae, height: int, width: int, kernels: VaeKernels = TORCH) -> None:
        self._dtype = vae.decoder["1"].weight.dtype
        self._begin, self._end = vae.decoder["1"], vae.decoder["22"]
        self._sizes: list[TinySize] = []
        frames = 1
        for size, growth in enumerate(GROWTHS):
            self._sizes.append(TinySize(vae, size, frames, height << size, width << size, kernels))
            frames *= growth

    def buffers(self) -> list[Tensor]:
        """All memory that carries a stream from one latent frame to the next."""
        return [past for size in self._sizes for past in size.past]

    def frames(self, latent: Tensor, *, first: bool) -> Tensor:
        """The frames of a stream's next latent frame.

        Args:
            latent: [16, h, w], as the transformer makes them, on the decoder's device.
            first: begins a stream; what was before is forgotten.

        Returns:
            [F, 3, 8h, 8w] float32 in -1 to 1; F is 1 for the first latent frame, else 4.
        """
        if first:
            for past in self.buffers():
                past.zero_()
        bent = torch.tanh(latent.float() / BOUND) * BOUND
        begin = self._begin
        x = _conv_relu(bent[None].to(self._dtype, memory_format=torch.channels_last), begin.weight, begin.bias)
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


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor, beside: Tensor | None = None) -> Tensor:
    """ReLU of a 3x3 convolution of x [T, C, H, W], of its sum with `beside` if given; on a GPU one kernel of cuDNN."""
    if x.is_cuda:
        shape = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
        if beside is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *shape)
        return torch.cudnn_convolution_add_relu(x, weight, beside, 1.0, bias, *shape)
    y = F.conv2d(x, weight, bias, padding=1)
    return F.relu(y if beside is None else y + beside)


def _conv(width_in: int, width_out: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)
