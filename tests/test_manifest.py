"""Full-size LongLive-1.3B, built without memory, has the published files' tensors by name and shape."""

import json
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from workers.models.checkpoint import shapes_of, text_encoder_shapes, vae_shapes
from workers.models.lora import lora_shapes
from workers.models.transformer import CausalWanTransformer
from workers.models.umt5 import TextEncoder

MODEL = load_config("longlive-1.3b").model
MANIFEST = json.loads((Path(__file__).parent / "checkpoint_manifest.json").read_text(encoding="utf-8"))
TRANSFORMER = "Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors"


def expected(tensors: dict[str, str], layers: int) -> dict[str, tuple[int, ...]]:
    """The manifest's `name: 1536x1536 float32`, with {i} written out for every layer."""
    shapes = {}
    for name, text in tensors.items():
        shape = tuple(int(side) for side in text.split()[0].split("x"))
        for layer in range(layers) if "{i}" in name else (0,):
            shapes[name.replace("{i}", str(layer))] = shape
    return shapes


@pytest.fixture(scope="module")
def transformer() -> CausalWanTransformer:
    with torch.device("meta"):
        return CausalWanTransformer(MODEL.transformer)


def test_transformer(transformer: CausalWanTransformer) -> None:
    assert shapes_of(transformer) == expected(MANIFEST[TRANSFORMER], MODEL.transformer.num_layers)


def test_longlive_base(transformer: CausalWanTransformer) -> None:
    """The same tensors, each below `model.` in one of the two top-level keys that the configuration can name."""
    base = MANIFEST["longlive_base.pt"]
    assert base["prefix"] == "model."
    assert MODEL.generator in base["top_level_keys"]
    assert type(MODEL).model_validate(MODEL.model_dump() | {"generator": base["top_level_keys"][1]})


def test_lora(transformer: CausalWanTransformer) -> None:
    lora = MANIFEST["lora.pt"]
    assert MODEL.lora is not None
    assert (MODEL.lora.rank, MODEL.lora.alpha) == (lora["rank"], lora["alpha"])
    shapes = lora_shapes(transformer, MODEL.lora.rank)
    assert len(shapes) == lora["count"]
    assert shapes == expected(lora["tensors"], MODEL.transformer.num_layers)


def test_vae() -> None:
    assert vae_shapes(MODEL.vae) == expected(MANIFEST["Wan2.1_VAE.pth"], 0)


def test_text_encoder() -> None:
    with torch.device("meta"):
        encoder = TextEncoder(MODEL.text_encoder)
    file = MANIFEST["models_t5_umt5-xxl-enc-bf16.pth"]
    assert text_encoder_shapes(encoder) == expected(file, MODEL.text_encoder.num_layers)
