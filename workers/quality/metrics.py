"""How far apart two pictures or two latents are: PSNR, SSIM, relative error. Knows no model, block or prompt.

Frames are [F, H, W, 3] uint8.
"""

import importlib.util
import math

import numpy as np
import torch
from torch import Tensor

PEAK = 255


def psnr_db(one: np.ndarray, other: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio over all frames together, 10 log10(255^2 / mean squared error); None if equal."""
    squares = np.square(one.astype(np.int32) - other.astype(np.int32))
    return 10 * math.log10(PEAK**2 / squares.mean()) if squares.any() else None


def ssim_lack() -> str:
    """Why SSIM cannot be measured here; empty if it can."""
    if importlib.util.find_spec("skimage") is None:
        return "scikit-image is not installed; pip install 'longlive-runtime[quality]'"
    return ""


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity, the mean over frames.

    As in Wang et al. 2004: Gaussian windows of deviation 1.5, by channel.
    """
    from skimage.metrics import structural_similarity

    frames = zip(one, other, strict=True)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": PEAK}
    return float(np.mean([structural_similarity(a, b, channel_axis=2, **settings) for a, b in frames]))


def latent_error(made: Tensor, reference: Tensor) -> float:
    """||made - reference|| / ||reference||, in float64."""
    reference = reference.double()
    return float(torch.linalg.norm(made.double() - reference) / torch.linalg.norm(reference))
