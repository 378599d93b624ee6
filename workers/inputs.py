"""Tensors given instead of drawn: the noise and the prompt embeddings of a stream, read from one safetensors file.

For comparisons with a reference. Knows no stage; tensors under other names are left alone.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.schema import RuntimeConfig
from ipc.errors import InputError
from workers.models.noise import DrawnNoise, GivenNoise, NoiseSource


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            return {name: file.get_tensor(name).float() for name in names if name in present}
    except FileNotFoundError as error:
        raise InputError(f"{path}: inputs file not found") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error


def noise_source(
    config: RuntimeConfig, shape: tuple[int, int, int, int], path: Path | None, blocks: int | None
) -> NoiseSource:
    """The noise of a stream: drawn from the seed, or `noise` and `renoise` of the inputs file if it has them.

    Args:
        shape: (F, 16, h, w) of a block.
        blocks: how many blocks the run makes, None if that is open.

    Raises:
        InputError: the file lacks one of the two, or holds fewer blocks than the run makes.
    """
    given = _read(path, ("noise", "renoise")) if path else {}
    if not given:
        return DrawnNoise(config.seed, shape, pinned=config.stage("denoiser").device != "cpu")
    if len(given) < 2:
        raise InputError(f"{path}: found {next(iter(given))} alone, expected both noise and renoise or neither")
    noise = GivenNoise(given["noise"], given["renoise"], shape, len(config.stream.steps))
    if blocks is None or blocks > noise.blocks:
        asked = "no length" if blocks is None else f"{blocks} blocks"
        raise InputError(f"{path}: noise holds {noise.blocks} blocks, asked for {asked}; pass --blocks {noise.blocks}")
    return noise


def given_embeds(config: RuntimeConfig, path: Path | None) -> Tensor | None:
    """`prompt_embeds` [prompts, n, text_dim] float32 of the inputs file, None if it has none."""
    embeds = _read(path, ("prompt_embeds",)).get("prompt_embeds") if path else None
    if embeds is None:
        return None
    text = config.model.transformer
    if embeds.ndim != 3 or embeds.shape[2] != text.text_dim or not 0 < embeds.shape[1] <= text.text_len:
        raise InputError(
            f"{path}: prompt_embeds: found {list(embeds.shape)}, expected [prompts, n <= {text.text_len},"
            f" {text.text_dim}]"
        )
    if not bool(torch.isfinite(embeds).all()):
        raise InputError(f"{path}: prompt_embeds hold NaN or infinity")
    return embeds
