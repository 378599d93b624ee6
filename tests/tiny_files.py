"""The published set of files at a width of 24, as scripts/write_checkpoint.py writes them, and ways to change it."""

import runpy
from collections.abc import Callable
from pathlib import Path

import torch

from configs.load import load_config
from configs.schema import ModelConfig
from workers.models.checkpoint import load_transformer

CPU = torch.device("cpu")
SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "write_checkpoint.py"))
BASE = "longlive_models/models/longlive_base.pt"
LORA = "longlive_models/models/lora.pt"
WAN = "Wan2.1-T2V-1.3B"
SINGLE = f"{WAN}/diffusion_pytorch_model.safetensors"
INDEX = f"{WAN}/diffusion_pytorch_model.safetensors.index.json"
VAE = f"{WAN}/Wan2.1_VAE.pth"
TEXT = f"{WAN}/models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = f"{WAN}/google/umt5-xxl"
QUERY = "blocks.0.self_attn.q.weight"

RANDOM = ("model.path=null", "model.random_weights=true", "model.lora=null")
TINY = (
    "model.transformer={dim: 24, ffn_dim: 32, freq_dim: 16, text_dim: 16, num_heads: 2, num_layers: 2}",
    "model.text_encoder={vocab_size: 1000, dim: 16, dim_attn: 16, dim_ffn: 16, num_heads: 2, num_layers: 1}",
    "model.vae_dtype=float32",
    *RANDOM,
)


def tiny_model(**changes: object) -> ModelConfig:
    """Pocket's architecture, narrower, so that files are small."""
    return load_config("pocket", TINY).model.model_copy(update=changes)


def write(folder: Path, **options: object) -> Path:
    """The whole set of good files."""
    SCRIPT["write"](tiny_model(), folder, **options)
    return folder


def weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    return load_transformer(model, CPU).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def only(folder: Path, kept: str) -> Path:
    """Leaves one of the transformer's files."""
    for name in (BASE, SINGLE, INDEX):
        if name != kept:
            (folder / name).unlink(missing_ok=True)
    return folder


def changed(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrites the tensors of a torch file."""
    held = torch.load(path, weights_only=True)
    tensors = next((held[key] for key in ("generator", "generator_lora") if key in held), held)
    change(tensors)
    torch.save(held, path)
