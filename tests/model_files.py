"""Folders of model files and configurations for tests: a golden case's transformer, and small networks around it."""

import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from configs.schema import RuntimeConfig
from workers.models.checkpoint import text_encoder_shapes, vae_shapes
from workers.models.prompt_text import ASSETS
from workers.models.random_weights import draw
from workers.models.umt5 import TextEncoder


def case_config(case: dict, folder: Path) -> dict:
    """The runtime configuration, as plain data, that a golden stream case's config.json describes."""
    height, width = (8 * side for side in case["latent_hw"])
    transformer = {key: case[key] for key in ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len")}
    transformer |= {"num_heads": case["num_heads"], "num_layers": case["num_layers"]}
    text = {"vocab_size": 1000, "dim": case["text_dim"], "dim_attn": case["text_dim"], "dim_ffn": 32}
    model = {
        "path": str(folder),
        "transformer": transformer,
        "text_encoder": text | {"num_heads": 2, "num_layers": 1},
        "vae": {"base_dim": 8, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
        "lora": case["lora"],
    }
    stream = {
        "frames_per_block": case["num_frame_per_block"],
        "window": case["local_attn_size"],
        "sink": case["sink_size"],
        "steps": case["denoising_step_list"],
        "warp_steps": case["warp_denoising_step"],
        "timestep_shift": case["timestep_shift"],
        "rope": case["rope"],
        "global_sink": case["global_sink"],
        "context_noise": case["context_noise"],
    }
    return {
        "name": "golden",
        "prompt": "unused",
        "video": {"height": height, "width": width},
        "model": model,
        "stream": stream,
    }


def write_case(case: dict, tensors: Path, folder: Path) -> Path:
    """Writes the files of a golden case under the published names; returns the configuration's YAML."""
    config = case_config(case, folder)
    golden = load_file(tensors)
    base = {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}
    lora = {name.removeprefix("lora/"): t for name, t in golden.items() if name.startswith("lora/")}
    write_files(RuntimeConfig.model_validate(config), folder, base, lora)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_files(config: RuntimeConfig, folder: Path, base: dict, lora: dict) -> None:
    """The published set of files: given transformer and LoRA, random VAE and text encoder, the pocket tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"generator": base}, folder / "longlive_base.pt")
    if lora:
        torch.save({"generator_lora": lora}, folder / "lora.pt")
    shapes = vae_shapes(config.model.vae)
    torch.save({name: draw(name, torch.Size(shape), 0) for name, shape in shapes.items()}, folder / "Wan2.1_VAE.pth")
    with torch.device("meta"):
        encoder = TextEncoder(config.model.text_encoder)
    shapes = text_encoder_shapes(encoder)
    text = {name: draw(name, torch.Size(shape), 0) for name, shape in shapes.items()}
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(ASSETS / "pocket" / "tokenizer", folder / "google" / "umt5-xxl")
