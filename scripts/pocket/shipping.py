"""From what training left to what is shipped: bfloat16 safetensors under the published files' names.

The folder this writes is a `model.path`; beside it, config.yaml runs it where it lies.
"""

import json
import shutil
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.load import as_yaml
from configs.schema import LoraConfig, ModelConfig
from pocket.training import Training
from pocket.transformer_stages import RANK
from workers.models.checkpoint import (
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae_decoder,
    load_vae_encoder,
)
from workers.models.lora import PREFIX
from workers.models.prompt_text import POCKET_TOKENIZER
from workers.models.umt5 import translation

MOST_BYTES = 24 * 2**20


def ship(run: Training, out: Path) -> None:
    """Writes all files of the model below a folder, and loads them once as the runtime does.

    Raises:
        FileNotFoundError: a stage of training has not been done.
        CheckpointError: what was written cannot be loaded.
        ValueError: it is larger than the repository wants it.
    """
    out.mkdir(parents=True, exist_ok=True)
    trained = load_file(run.file("self_forcing.safetensors"))
    layers = run.config.model.text_encoder.num_layers
    text = {ours: trained[f"text/{theirs}"] for ours, theirs in translation(layers).items()}
    transformer = {n.removeprefix("transformer/"): t for n, t in trained.items() if n.startswith("transformer/")}
    _save(transformer, out / "diffusion_pytorch_model.safetensors")
    _save(text, out / "models_t5_umt5-enc-bf16.safetensors")
    _save(load_file(run.file("decoder.safetensors")), out / "Wan2.1_VAE.safetensors")
    adapter = load_file(run.file("adapter.safetensors"))
    _save(adapter, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(_adapter_config(adapter), indent=2) + "\n", encoding="utf-8")
    shutil.copytree(POCKET_TOKENIZER, out / "tokenizer", dirs_exist_ok=True)
    measured = json.loads(run.file("statistics.json").read_text(encoding="utf-8"))
    statistics = {f"latents_{key}": tuple(round(v, 4) for v in values) for key, values in measured.items()}
    model = run.config.model
    model = model.model_copy(
        update={
            "path": Path(),
            "random_weights": False,
            "lora": LoraConfig(rank=RANK, alpha=RANK),
            "vae": model.vae.model_copy(update=statistics),
        }
    )
    (out / "config.yaml").write_text(as_yaml(run.config.model_copy(update={"model": model})), encoding="utf-8")
    there = model.model_copy(update={"path": out})
    for load in (load_transformer, load_vae_decoder, load_text_encoder):
        load(there, torch.device("cpu"))
    load_tokenizer(there)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"{out}: found {size / 2**20:.1f} MiB, expected at most {MOST_BYTES / 2**20:.0f}")
    run.say("\n".join(["ship: rows of the model card", *card_rows(out)]))
    run.say(f"ship: {size / 2**20:.1f} MiB in {out}")


def unship(model: ModelConfig, run: Training, stages: Collection[str]) -> None:
    """What stages would have left of which a shipped model came, its adapter merged; what is there is left alone.

    Args:
        model: whose `path` holds what was shipped.
        stages: of `vae`, `decoder` and `teacher`.

    Raises:
        CheckpointError: a file of it cannot be loaded.
    """
    cpu = torch.device("cpu")
    model = model.model_copy(update={"dtype": "float32", "vae_dtype": "float32", "text_dtype": "float32"})
    missing = [stage for stage in stages if not run.file(f"{stage}.safetensors").exists()]
    if {"vae", "decoder"} & set(missing):
        encoder, decoder = load_vae_encoder(model, cpu, "plain"), load_vae_decoder(model, cpu, "plain")
        parts = {n: t.contiguous() for n, t in {**encoder.state_dict(), **decoder.state_dict()}.items()}
        for stage in {"vae", "decoder"} & set(missing):
            save_file(parts, run.file(f"{stage}.safetensors"))
        statistics = {"mean": model.vae.latents_mean, "std": model.vae.latents_std}
        run.file("statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
    if "teacher" in missing:
        transformer = {f"transformer/{n}": t for n, t in load_transformer(model, cpu).state_dict().items()}
        text = {f"text/{n}": t for n, t in load_text_encoder(model, cpu).model.named_parameters()}
        tensors = {n: t.detach().contiguous() for n, t in (transformer | text).items()}
        save_file(tensors, run.file("teacher.safetensors"))


def card_rows(folder: Path) -> list[str]:
    """The model card's table of files: name, bytes, SHA-256."""
    files = sorted(folder.glob("*.safetensors"))
    return [f"| `{f.name}` | {f.stat().st_size:,} | `{sha256(f.read_bytes()).hexdigest()}` |" for f in files]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors keeps what it writes to its owner


def _adapter_config(adapter: dict[str, Tensor]) -> dict[str, object]:
    """What PEFT reads beside the tensors."""
    names = {name.removeprefix(f"{PREFIX}blocks.").partition(".")[2].partition(".lora_")[0] for name in adapter}
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names),
    }
