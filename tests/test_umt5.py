"""The text encoder equals the reference, under Wan's tensor names."""

from pathlib import Path

import pytest
import torch
from golden_cases import cases, load, relative_error

from configs.schema import TextEncoderConfig
from workers.models.umt5 import TextEncoder, translation

CASES = cases("umt5")


def case_id(path: Path) -> str:
    return f"golden-{path.name}-plain"


@pytest.mark.parametrize("path", CASES, ids=case_id)
def test_embeds_equal_the_reference(path: Path) -> None:
    """Batched with a mask, and prompt by prompt as the text encoder process does it."""
    case = load(path)
    config = TextEncoderConfig.model_validate({name: case.config[name] for name in TextEncoderConfig.model_fields})
    encoder = TextEncoder(config).eval().requires_grad_(False)
    names = translation(config.num_layers)
    own = {theirs: case.tensors[f"weights/{ours}"] for ours, theirs in names.items()}
    missing, unexpected = encoder.model.load_state_dict(own, strict=False)
    assert (set(missing), unexpected) == ({"encoder.embed_tokens.weight"}, [])
    ids, mask, expected = (case.tensors[name] for name in ("ids", "mask", "embeds"))
    embeds = encoder(ids, mask)
    assert relative_error(embeds, expected) <= 1e-4
    assert not embeds[mask == 0].any()
    for row, length in enumerate(mask.sum(1).tolist()):
        assert relative_error(encoder.encode(ids[row, :length]), expected[row, :length]) <= 1e-4


def test_every_tensor_has_a_name() -> None:
    config = TextEncoderConfig(vocab_size=10, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=3)
    with torch.device("meta"):
        encoder = TextEncoder(config)
    assert set(translation(3).values()) == {name for name, _ in encoder.model.named_parameters()}


def test_embeds_are_float32_and_do_not_depend_on_padding() -> None:
    """Whatever the weights' dtype: the ring to the denoiser holds float32, and a prompt is encoded without padding."""
    torch.manual_seed(0)
    config = TextEncoderConfig(vocab_size=10, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=2)
    encoder = TextEncoder(config).eval().requires_grad_(False)
    ids = torch.tensor([3, 4, 5])
    padded = encoder(torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(padded[0, :3], encoder.encode(ids))
    assert not padded[0, 3:].any()
    half = encoder.to(torch.bfloat16).encode(ids)
    assert half.dtype is torch.float32
    assert torch.equal(half, half.bfloat16().float())
