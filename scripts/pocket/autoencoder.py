"""Learning the VAE: encoder and decoder together, on clips of the world.

The networks are the runtime's own; here whole clips pass through at once and gradients through both. The posterior
has a fixed small deviation, so that latents stay near unit size and the decoder forgives errors of the transformer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import LATENT_CHANNELS, VaeConfig
from pocket.clips import as_pixels
from workers.models.causal_conv import Cache
from workers.models.vae import VaeDecoder
from workers.models.vae_encoder import VaeEncoder

DEVIATION = 0.1
"""Of the latents that the decoder learns from."""
OBJECT_WEIGHT = 3.0
"""What an error near an object counts beyond one on the ground: shapes are small."""
PIXEL_MEAN = -0.55
"""Of clips of the world."""


class Autoencoder(nn.Module):
    """Encoder and decoder over whole clips; latents as the file's VAE has them, before their statistics."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.encoder = VaeEncoder(config)
        self.decoder = VaeDecoder(config)
        for name, parameter in self.named_parameters():
            _draw(name, parameter)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1 + 4k, 3, H, W] -> mean and log variance, each [B, 1 + k, 16, h, w]."""
        batch = len(pixels)
        x = pixels.permute(1, 0, 3, 4, 2)
        cache: Cache = {}
        pieces = [x[:1], x[1:]] if len(x) > 1 else [x]
        features = torch.cat([self.encoder.encoder(piece.flatten(0, 1), cache, batch) for piece in pieces])
        both = self.encoder.conv1(features, cache, batch).float()
        both = both.unflatten(0, (-1, batch)).permute(1, 0, 4, 2, 3)
        return both[:, :, :LATENT_CHANNELS], both[:, :, LATENT_CHANNELS:]

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 1 + k, 16, h, w] -> [B, 1 + 4k, 3, H, W]."""
        batch = len(latents)
        x = latents.permute(1, 0, 3, 4, 2)
        cache: Cache = {}
        pieces = [x[:1], x[1:]] if len(x) > 1 else [x]
        decoder = self.decoder
        pixels = [decoder.decoder(decoder.conv2(p.flatten(0, 1), cache, batch), cache, batch) for p in pieces]
        return torch.cat(pixels).unflatten(0, (-1, batch)).permute(1, 0, 4, 2, 3)

    def file_tensors(self) -> dict[str, Tensor]:
        """All tensors by the names of Wan2.1_VAE.pth."""
        return {**self.encoder.state_dict(), **self.decoder.state_dict()}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `file_tensors`."""
        for part in (self.encoder, self.decoder):
            part.load_state_dict({name: tensors[name] for name in part.state_dict()})


def _draw(name: str, parameter: Tensor) -> None:
    """Starting values: unit gain by fan-in, nothing from attention and little from residuals at first.

    SiLU leaves what all channels have in common; weights that sum to nothing over their inputs keep it from growing,
    and a head that begins at the mean of all pixels keeps Adam from drowning the picture in it. Without the two the
    latents said nothing for thousands of steps.
    """
    with torch.no_grad():
        if name.endswith("gamma"):
            parameter.fill_(1.0)
        elif name.endswith("decoder.head.2.bias"):
            parameter.fill_(PIXEL_MEAN)
        elif name.endswith("bias") or "proj.weight" in name:
            parameter.zero_()
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
            if parameter.shape[1] > 3:
                parameter.sub_(parameter.mean(1, keepdim=True))
            if "residual.6" in name:
                parameter.mul_(0.3)


def loss_of(model: Autoencoder, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of clips [B, 1 + 4k, 3, H, W], and its parts: error, error of edges, size of latents."""
    mean, log_variance = model.moments(pixels)
    latents = mean + DEVIATION * torch.randn_like(mean)
    made = model.decode(latents.to(pixels.dtype)).float()
    error, edges = error_of(made, pixels)
    size = mean.square().mean()
    variance = (log_variance - 2 * math.log(DEVIATION)).square().mean()
    loss = error + 0.5 * edges + 5e-4 * size + 1e-4 * variance
    return loss, {"error": error, "edges": edges, "size": size, "mse": (made - pixels).square().mean()}


def error_of(made: Tensor, pixels: Tensor, object_weight: float = OBJECT_WEIGHT) -> tuple[Tensor, Tensor]:
    """Absolute error and error of edges; near objects they count `1 + object_weight` times."""
    off = made - pixels
    weight = 1 + object_weight * near_objects(pixels)
    error = (weight * off.abs()).mean() + off.square().mean()
    edges = (weight[..., 1:] * off.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * off.diff(dim=-2).abs()).mean()
    return error, edges


def near_objects(pixels: Tensor) -> Tensor:
    """1 within three pixels of an object, else 0, [B, F, 1, H, W]; objects alone are bright."""
    bright = (pixels.amax(dim=2, keepdim=True) > 0.2).flatten(0, 1).to(pixels.dtype)
    return F.max_pool2d(bright, 7, stride=1, padding=3).unflatten(0, pixels.shape[:2])


def psnr(made: Tensor, pixels: Tensor) -> Tensor:
    """Per clip [B], of pixels in -1 to 1 clamped, in dB."""
    off = (made.clamp(-1, 1) - pixels).float().square().flatten(1).mean(1) / 4
    return -10 * off.log10()


@torch.no_grad()
def statistics(model: Autoencoder, batches: list[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every latent channel over clips of uint8 frames."""
    latents = torch.cat(
        [model.moments(as_pixels(batch).to(model.encoder.conv1.weight.dtype))[0].float() for batch in batches]
    )
    by_channel = latents.transpose(0, 2).flatten(1)
    return tuple(by_channel.mean(1).tolist()), tuple(by_channel.std(1).tolist())
