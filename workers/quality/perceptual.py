"""Figures by other people's networks, where their weights are on this machine: LPIPS and CLIP score.

Nothing is ever downloaded. What is lacking is said in one line. Knows no model of ours. Frames are [F, H, W, 3] uint8.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet, by the name under which torch.hub keeps it."""
LPIPS_PACKAGES = ("torchmetrics", "torchvision")
CLIP_NAME = "openai/clip-vit-base-patch16"
CLIP_FILES = (("config.json",), ("model.safetensors", "pytorch_model.bin"), ("tokenizer.json",))
"""Of each one is enough."""
CLIP_SIZE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of pixels in 0 to 1 (openai/CLIP, preprocessor_config.json)."""
EVERY = 4
"""One frame in so many is shown to CLIP."""


def lpips_lack() -> str:
    """Why LPIPS cannot be measured here; empty if it can."""
    missing = [name for name in LPIPS_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install 'longlive-runtime[quality]'"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # one that was built for another torch
        return f"torchvision cannot be imported: {error}"
    weights = _lpips_weights()
    return "" if weights.is_file() else f"{weights}: no such file; AlexNet's weights of torchvision belong there"


def _lpips_weights() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS


class Lpips:
    """Learned perceptual image patch similarity by AlexNet (Zhang et al. 2018), as torchmetrics computes it."""

    def __init__(self) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    @torch.inference_mode()
    def __call__(self, one: np.ndarray, other: np.ndarray) -> float:
        """The mean over frames, 0 for equal ones."""
        return float(self._metric(_unit(one), _unit(other)))


def clip_lack() -> str:
    """Why CLIP score cannot be measured here; empty if it can."""
    from huggingface_hub import constants, try_to_load_from_cache

    def is_here(name: str) -> bool:
        return isinstance(try_to_load_from_cache(CLIP_NAME, name), str)

    missing = [" or ".join(names) for names in CLIP_FILES if not any(map(is_here, names))]
    if not missing:
        return ""
    return f"{', '.join(missing)} of {CLIP_NAME} not in {constants.HF_HUB_CACHE}; hf download {CLIP_NAME}"


class Clip:
    """CLIP score (Hessel et al. 2021): 100 times the cosine between picture and text, at least 0.

    Computed here: torchmetrics 1.9 reads its features in a way that transformers 5 no longer offers.
    """

    def __init__(self) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self._model = CLIPModel.from_pretrained(CLIP_NAME, local_files_only=True).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(CLIP_NAME, local_files_only=True)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, texts: Sequence[str]) -> list[float]:
        """A score for one frame in `EVERY`; a text for each frame, cut where CLIP cannot read on."""
        shown, asked = frames[::EVERY], list(texts[::EVERY])
        limit = self._model.config.text_config.max_position_embeddings
        words = self._tokenizer(asked, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        out = self._model(pixel_values=clip_pixels(shown), **words)
        return (100 * (out.image_embeds * out.text_embeds).sum(-1)).clamp(min=0).tolist()


def clip_pixels(frames: np.ndarray) -> Tensor:
    """[n, 3, 224, 224]: the shorter side resized to 224 by bicubic filter, the middle cut out, normalised."""
    scale = CLIP_SIZE / min(frames.shape[1:3])
    size = [max(CLIP_SIZE, round(scale * side)) for side in frames.shape[1:3]]
    images = F.interpolate(_unit(frames), size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - CLIP_SIZE) // 2 for side in size)
    middle = images[:, :, top : top + CLIP_SIZE, left : left + CLIP_SIZE]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (middle - mean) / std


def _unit(frames: np.ndarray) -> Tensor:
    """[F, 3, H, W] float32 in 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
