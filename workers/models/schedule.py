"""Flow-matching schedule: which noise level belongs to which timestep, and how a prediction becomes a clean latent.

Knows numbers only; no network, no cache. Sigmas run from 1 (noise) to 0 (clean); timestep = 1000 * sigma. Sources:
Wan 2.1 (shifted flow matching, shift 5) and LongLive v1.0 (warped few-step list, noise mixed back in between steps).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import StreamConfig

TRAIN_STEPS = 1000


def shifted_sigmas(shift: float) -> Tensor:
    """The noise levels of the 1000 training timesteps, falling: s*x / (1 + (s-1)*x) over x = 1, 0.999, ..., 0.001.

    Returns:
        [1000] float32 on the CPU.
    """
    x = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
    return shift * x / (1 + (shift - 1) * x)


@dataclass(frozen=True)
class Schedule:
    """The denoising steps of every block.

    Attributes:
        sigmas: [1000] float32, falling.
        timesteps: [1000] float32, 1000 * sigmas.
        steps: warped timesteps of the denoising steps, falling, such as (1000, 937.5, 833.33, 625).
    """

    sigmas: Tensor
    timesteps: Tensor
    steps: tuple[float, ...]

    @classmethod
    def from_config(cls, stream: StreamConfig) -> "Schedule":
        """The schedule of a stream; with `warp_steps` the listed steps index the shifted timesteps."""
        sigmas = shifted_sigmas(stream.timestep_shift)
        timesteps = sigmas * TRAIN_STEPS
        steps = stream.steps
        if stream.warp_steps:
            steps = tuple(float(timesteps[TRAIN_STEPS - step]) for step in stream.steps)
        return cls(sigmas, timesteps, tuple(float(step) for step in steps))

    def sigma_at(self, timestep: float) -> float:
        """The tabled noise level nearest to a timestep."""
        nearest = torch.argmin((self.timesteps.double() - timestep).abs())
        return float(self.sigmas[nearest])

    def clean(self, noisy: Tensor, flow: Tensor, timestep: float) -> Tensor:
        """x0 = x_t - sigma * flow, in float64 because sigma near 1 cancels digits; returns the dtype of `noisy`."""
        return (noisy.double() - self.sigma_at(timestep) * flow.double()).to(noisy.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: float) -> Tensor:
        """x_t = (1 - sigma) * x0 + sigma * noise, any shape; returns the dtype of `noise`."""
        sigma = self.sigma_at(timestep)
        return ((1 - sigma) * clean + sigma * noise).to(noise.dtype)
