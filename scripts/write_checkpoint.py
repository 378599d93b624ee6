"""Writes a set of model files under the published names, at a configuration's widths, with random weights.

    .venv/bin/python scripts/write_checkpoint.py --config pocket --out DIR
    .venv/bin/orchestrator start --config pocket --set model.path=DIR
    .venv/bin/orchestrator start --config DIR/config.yaml

For trying the loaders without the published weights, and as an example of what they expect.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.load import as_yaml, load_config
from configs.schema import LoraConfig, ModelConfig, RuntimeConfig
from workers.models.checkpoint import shapes_of, text_encoder_shapes, tiny_vae_shapes, vae_shapes
from workers.models.lora import lora_shapes
from workers.models.prompt_text import POCKET_TOKENIZER
from workers.models.random_weights import draw
from workers.models.transformer import CausalWanTransformer
from workers.models.umt5 import TextEncoder

Shapes = Mapping[str, tuple[int, ...]]


def drawn(shapes: Shapes, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors of the given names and shapes."""
    return {name: draw(name, torch.Size(shape), seed).to(dtype) for name, shape in shapes.items()}


def write(
    model: ModelConfig,
    out: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    bare: bool = False,
    tiny: bool = False,
) -> None:
    """Writes transformer (three ways), LoRA, VAE, text encoder and tokenizer below `out`.

    Args:
        seed: the files hold what `model.random_weights_seed` of the same number draws.
        sharded: the safetensors file in two, with an index.
        bare: transformer and LoRA as dicts of tensors, without the keys LongLive wraps them in.
        tiny: the tiny VAE as well.
    """
    wan, longlive = out / "Wan2.1-T2V-1.3B", out / "longlive_models" / "models"
    for folder in (wan / "google", longlive):
        folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        transformer, encoder = CausalWanTransformer(model.transformer), TextEncoder(model.text_encoder)
    base = drawn(shapes_of(transformer), seed, dtype)
    lora = drawn(lora_shapes(transformer, rank), seed, dtype)
    torch.save(base if bare else wrapped(base), longlive / "longlive_base.pt")
    torch.save(lora if bare else {"generator_lora": lora}, longlive / "lora.pt")
    torch.save(drawn(vae_shapes(model.vae), seed, dtype), wan / "Wan2.1_VAE.pth")
    if tiny:
        torch.save(drawn(tiny_vae_shapes(), seed, dtype), out / "taew2_1.pth")
    torch.save(drawn(text_encoder_shapes(encoder), seed, dtype), wan / "models_t5_umt5-xxl-enc-bf16.pth")
    if sharded:
        write_shards(base, wan)
    else:
        save_file(base, wan / "diffusion_pytorch_model.safetensors")
    shutil.copytree(POCKET_TOKENIZER, wan / "google" / "umt5-xxl", dirs_exist_ok=True)


def wrapped(base: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As in longlive_base.pt: the trained weights, and their average with the names that sharded training gives."""
    return {
        "generator": {f"model.{name}": tensor for name, tensor in base.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in base.items()},
    }


def write_shards(tensors: Mapping[str, Tensor], folder: Path, shards: int = 2) -> None:
    """Writes safetensors shards and their index."""
    names = sorted(tensors)
    size = -(-len(names) // shards)
    where: dict[str, str] = {}
    for number in range(shards):
        part = names[number * size : (number + 1) * size]
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_config(config: RuntimeConfig, out: Path, rank: int, *, tiny: bool = False) -> None:
    """The same configuration, with the folder's files, its LoRA and its decoder."""
    files: dict[str, object] = {
        "path": out.absolute(),
        "random_weights": False,
        "lora": LoraConfig(rank=rank, alpha=rank),
    }
    files |= {"decoder": "tiny"} if tiny else {}
    model = config.model.model_copy(update=files)
    (out / "config.yaml").write_text(as_yaml(config.model_copy(update={"model": model})), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Writes random model files under the published names.")
    parser.add_argument("--config", default="pocket", help="shipped name or YAML file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help="of the LoRA; else the configuration's, or 4")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sharded", action="store_true", help="the base transformer as two safetensors shards")
    parser.add_argument("--bare", action="store_true", help="no generator and generator_lora around the tensors")
    parser.add_argument("--tiny", action="store_true", help="the tiny VAE as well, and a configuration that uses it")
    given = parser.parse_args()
    config = load_config(given.config)
    rank = given.rank or (config.model.lora.rank if config.model.lora else 4)
    write(
        config.model,
        given.out,
        seed=given.seed,
        rank=rank,
        dtype=getattr(torch, given.dtype),
        sharded=given.sharded,
        bare=given.bare,
        tiny=given.tiny,
    )
    write_config(config, given.out, rank, tiny=given.tiny)


if __name__ == "__main__":
    main()
