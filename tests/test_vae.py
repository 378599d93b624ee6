"""The VAE: golden both ways, streaming without seams, pixels as bytes."""

from pathlib import Path

import pytest
import torch
from golden_cases import Case, case_id, cases, load, relative_error

from configs.schema import VaeConfig
from workers.models.causal_conv import ChannelNorm, ConvKind
from workers.models.random_weights import draw
from workers.models.vae import VaeDecoder, to_rgb8
from workers.models.vae_encoder import VaeEncoder

CASES = [(path, kind) for path in cases("vae") for kind in ("plain", "stacked")]
IDS = [f"{case_id(path)}-{kind}" for path, kind in CASES]
FIELDS = ("base_dim", "dim_mult", "num_res_blocks", "temporal_downsample", "latents_mean", "latents_std")


def config_of(case: Case) -> VaeConfig:
    return VaeConfig.model_validate({field: case.config[field] for field in FIELDS})


def with_golden_weights(module: torch.nn.Module, case: Case) -> torch.nn.Module:
    own = {name: case.tensors[f"weights/{name}"] for name in module.state_dict()}
    module.load_state_dict(own)
    return module.eval().requires_grad_(False)


def with_random_weights(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(draw(name, parameter.shape, 0))
    return module.eval().requires_grad_(False)


def decode_all(decoder: VaeDecoder, latents: torch.Tensor) -> torch.Tensor:
    cache = decoder.new_cache()
    return torch.cat([decoder.decode(latents[:, i], cache) for i in range(latents.shape[1])], 1)


def small_config(**changes: object) -> VaeConfig:
    zeros, ones = (0.0,) * 16, (1.0,) * 16
    return VaeConfig(**{"base_dim": 4, "latents_mean": zeros, "latents_std": ones, **changes})


@pytest.mark.parametrize(("path", "kind"), CASES, ids=IDS)
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "unprepared"])
def test_decoder_equals_the_reference(path: Path, kind: str, prepared: bool) -> None:
    case = load(path)
    decoder = with_golden_weights(VaeDecoder(config_of(case), kind), case)
    if prepared:
        decoder.prepare()
    assert relative_error(decode_all(decoder, case.tensors["latents"]), case.tensors["pixels_unclamped"]) <= 1e-4


@pytest.mark.parametrize(("path", "kind"), CASES, ids=IDS)
def test_encoder_equals_the_reference(path: Path, kind: str) -> None:
    case = load(path)
    encoder = with_golden_weights(VaeEncoder(config_of(case), kind), case)
    assert relative_error(encoder.encode(case.tensors["encode/pixels"]), case.tensors["encode/latents"]) <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_dim": 6},
        {"dim_mult": (1, 1, 2, 2)},
        {"num_res_blocks": 1},
        {"temporal_downsample": (True, True, False)},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_stacked_equals_plain(changes: dict, batch: int) -> None:
    """For any width, depth and number of videos."""
    config = small_config(**changes)
    latents = torch.randn(batch, 4, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    plain = decode_all(with_random_weights(VaeDecoder(config, "plain")), latents)
    stacked = decode_all(with_random_weights(VaeDecoder(config, "stacked")).prepare(), latents)
    assert relative_error(stacked, plain) <= 1e-4
    video = torch.rand(batch, 9, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = [with_random_weights(VaeEncoder(config, way)).encode(video) for way in ("stacked", "plain")]
    assert relative_error(*codes) <= 1e-4


def test_first_latent_frame_is_one_frame_then_four() -> None:
    decoder = with_random_weights(VaeDecoder(small_config()))
    cache = decoder.new_cache()
    counts = [decoder.decode(torch.zeros(1, 16, 2, 2), cache).shape[1] for _ in range(4)]
    assert counts == [1, 4, 4, 4]


def test_a_cleared_cache_leaves_a_seam() -> None:
    """What earlier frames left behind matters: without it the picture is another."""
    decoder = with_random_weights(VaeDecoder(small_config()))
    latents = torch.randn(1, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = decode_all(decoder, latents)
    assert relative_error(decode_all(decoder, latents[:, 3:])[:, -4:], whole[:, -4:]) > 1e-2


@pytest.mark.parametrize("kind", ["plain", "stacked"])
def test_videos_of_a_batch_do_not_mix(kind: ConvKind) -> None:
    """Frames and videos share the first dimension inside; each video must come out as it does alone."""
    decoder = with_random_weights(VaeDecoder(small_config(), kind))
    latents = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([decode_all(decoder, video[None]) for video in latents])
    assert relative_error(decode_all(decoder, latents), alone) <= 1e-5
    encoder = with_random_weights(VaeEncoder(small_config(), kind))
    video = torch.rand(2, 9, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone = torch.cat([encoder.encode(one[None]) for one in video])
    assert relative_error(encoder.encode(video), alone) <= 1e-5


@pytest.mark.parametrize("kind", ["plain", "stacked"])
def test_cache_holds_no_more_than_it_needs(kind: ConvKind) -> None:
    """A cached view would keep a layer's whole input alive, gigabytes at full size."""
    decoder = with_random_weights(VaeDecoder(small_config(), kind))
    cache = decoder.new_cache()
    for _ in range(3):
        decoder.decode(torch.zeros(1, 16, 4, 4), cache)
    assert all(frames.untyped_storage().nbytes() == frames.numel() * frames.element_size() for frames in cache.values())


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_norm_does_not_depend_on_scale(scale: float) -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    norm = ChannelNorm(8, 3).requires_grad_(False)
    assert relative_error(norm(x * scale), x / x.square().mean(-1, keepdim=True).sqrt()) <= 1e-5


@pytest.mark.parametrize("kind", ["plain", "stacked"])
def test_bfloat16_is_near_float32(kind: ConvKind) -> None:
    """Rounding is about 3 %; a norm or a layout done wrong in a narrow type is far off."""
    latents = torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    exact, narrow = (
        decode_all(with_random_weights(VaeDecoder(small_config(base_dim=8), kind)).to(dtype).prepare(), latents)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow.float(), exact) <= 0.1


def test_streams_do_not_share_their_past() -> None:
    """Two streams decoded in turns give what each gives alone."""
    decoder = with_random_weights(VaeDecoder(small_config()))
    one, other = torch.randn(2, 1, 4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    caches = [decoder.new_cache(), decoder.new_cache()]
    turns = [
        [decoder.decode(video[:, i], cache) for video, cache in zip((one, other), caches, strict=True)]
        for i in range(4)
    ]
    assert torch.equal(torch.cat([turn[0] for turn in turns], 1), decode_all(decoder, one))
    assert torch.equal(torch.cat([turn[1] for turn in turns], 1), decode_all(decoder, other))


def test_encoder_refuses_other_numbers_of_frames() -> None:
    with pytest.raises(ValueError, match="1 \\+ 4k"):
        VaeEncoder(small_config()).encode(torch.zeros(1, 4, 3, 16, 16))


def test_to_rgb8_clamps_and_rounds() -> None:
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 7.0]).view(6, 1, 1, 1).expand(6, 3, 1, 1)
    assert to_rgb8(pixels)[:, 0, 0, 0].tolist() == [0, 0, 128, 191, 255, 255]
    assert to_rgb8(torch.zeros(2, 5, 3, 4, 6)).shape == (2, 5, 4, 6, 3)
