"""The VAE's decoder: its convolutions one by one, and whole decoders on a latent frame."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import LATENT_CHANNELS
from gpu.micro.bench import Bench, off_by
from workers.models.checkpoint import load_tiny_vae, load_vae_decoder, vae_dtype
from workers.models.execution import choose_recorder, choose_vae_kernels
from workers.models.frame_stream import FrameDecoder, FrameStream
from workers.models.graphs import run_directly
from workers.models.static_vae import StaticVae
from workers.models.tiny_vae import StaticTinyVae
from workers.models.vae import VaeDecoder, to_rgb8
from workers.models.vae_kernels import TORCH, VaeKernels

Decode = Callable[[Tensor], Tensor]
"""[16, h, w] -> [F, H, W, 3] uint8, a stream's next latent frame."""
Laid = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""

COMPARED = 3
"""Latent frames, of which the last one's bytes are compared."""
ROUNDS = 15


@dataclass(frozen=True)
class Convolution:
    """A convolution as it was called.

    Attributes:
        x, weight: how they are laid out.
        bias: its length; None where there is none.
        rest: strides, padding and so on, as `aten.convolution` takes them.
        made: numbers in the result.
    """

    x: Laid
    weight: Laid
    bias: int | None
    rest: tuple[Any, ...]
    made: int

    @property
    def flops(self) -> float:
        shape = self.weight[0]
        return 2.0 * self.made * torch.Size(shape[1:]).numel()

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.x[0][2:]))
        kernel = "x".join(map(str, self.weight[0][2:]))
        return f"{self.weight[0][1]} to {self.weight[0][0]} channels by {kernel}, {self.x[0][0]} of {sizes}"


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.convolution:
            x, weight, bias, *rest = args
            rest = tuple(tuple(value) if isinstance(value, list) else value for value in rest)
            length = None if bias is None else len(bias)
            self.seen[Convolution(_laid(x), _laid(weight), length, rest, out.numel())] += 1
        return out


def run(bench: Bench) -> None:
    """Convolutions first, of a later latent frame; then decoders in turn."""
    video, dtype = bench.config.video, vae_dtype(bench.config.model, bench.device)
    size = (video.latent_height, video.latent_width)
    latents = bench.draw(COMPARED, LATENT_CHANNELS, *size, dtype=torch.float32)
    plain = load_vae_decoder(bench.config.model, bench.device, "plain")
    kernels = choose_vae_kernels(bench.config, bench.device)
    build = partial(StaticVae, plain, *size)
    _convolutions(bench, build(kernels=kernels), latents[0], dtype)
    bench.give_back()

    exact = _decoder(bench, "plain class, conv3d", _plain(plain), latents, None)
    stacked = load_vae_decoder(bench.config.model, bench.device, "stacked")
    _decoder(bench, "plain class, conv2d of three frames", _plain(stacked), latents, exact)
    del stacked
    bench.give_back()
    recorded = choose_recorder(bench.config, bench.device)
    ways: list[tuple[str, VaeKernels, Any]] = [("static, torch", TORCH, run_directly)]
    if kernels is not TORCH:
        ways.append((f"static, {kernels.name}", kernels, run_directly))
    if recorded is not run_directly:
        ways += [(f"{name}, graphs", by, recorded) for name, by, _ in ways]
    else:
        bench.add("static, graphs", note="not measured: needs a CUDA device")
    for name, by, record in ways:
        _static(bench, name, build(kernels=by), record, latents, exact)
    tiny = StaticTinyVae(load_tiny_vae(bench.config.model, bench.device), *size)
    _static(bench, f"tiny decoder{'' if recorded is run_directly else ', graphs'}", tiny, recorded, latents, None)


def _convolutions(bench: Bench, decoder: StaticVae, latent: Tensor, dtype: torch.dtype) -> None:
    """Each distinct one, on random inputs laid out as the decoder's, and what all of them take together."""
    with torch.no_grad(), Convolutions() as convolutions:
        decoder.frames(latent, first=True)
        convolutions.seen.clear()
        decoder.frames(latent, first=False)
    together, flops, complete = 0.0, 0.0, True
    for convolution, times in convolutions.seen.items():
        x, weight = (_like(bench, laid, dtype) for laid in (convolution.x, convolution.weight))
        bias = None if convolution.bias is None else bench.draw(convolution.bias, dtype=dtype)
        call = partial(torch.ops.aten.convolution.default, x, weight, bias, *map(_listed, convolution.rest))
        bench.measure(f"{convolution}", [call], flops=convolution.flops, note=f"{times} a latent frame")
        ms = bench.rows[-1].ms
        complete = complete and ms is not None
        together += times * (ms or 0.0)
        flops += times * convolution.flops
        del x, weight, call
        bench.give_back()
    if complete and together:
        count = sum(convolutions.seen.values())
        bench.add("all convolutions", ms=together, tflops=flops / together / 1e9, note=f"sum of {count}")


def _plain(decoder: VaeDecoder) -> Decode:
    """A stream of the class that defines the decoder."""
    cache = decoder.new_cache()

    @torch.inference_mode()
    def decode(latent: Tensor) -> Tensor:
        return to_rgb8(decoder.decode(latent[None], cache)[0])

    return decode


def _static(bench: Bench, name: str, decoder: FrameDecoder, record: Any, latents: Tensor, exact: Tensor | None) -> None:
    stream = FrameStream(decoder, bench.config.video, bench.device, record)
    stream.record_all()
    _decoder(bench, name, stream.decode, latents, exact)
    bench.give_back()


def _decoder(bench: Bench, name: str, decode: Decode, latents: Tensor, exact: Tensor | None) -> Tensor:
    """A row of a decoder at the begin of its stream; returns bytes of the last of the latent frames."""
    for latent in latents:
        frames = decode(latent)
    frames = frames.float()
    error = None if exact is None else off_by(frames, exact)
    if not bench.left_out(name):
        bench.clocked(name, partial(decode, latents[0]), rounds=ROUNDS if bench.on_gpu else 2, error=error)
    return frames


def _laid(tensor: Tensor) -> Laid:
    return tuple(tensor.shape), tuple(tensor.stride())


def _like(bench: Bench, laid: Laid, dtype: torch.dtype) -> Tensor:
    shape, strides = laid
    tensor = torch.empty_strided(shape, strides, device=bench.device, dtype=dtype)
    return tensor.copy_(bench.draw(*shape, dtype=dtype))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
