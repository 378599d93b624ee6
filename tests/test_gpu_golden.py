"""Every reference case on a GPU: presets with graphs and kernels, in bfloat16 as near as the plain way."""

from pathlib import Path

import pytest
import torch
from golden_cases import Case, case_id, cases, load, relative_error
from model_files import case_config, write_case
from stream_case import play
from test_static_vae import frames_of
from test_vae import config_of, decode_all, with_golden_weights
from torch import Tensor

from configs.load import load_config, load_preset
from configs.schema import RuntimeConfig, TextEncoderConfig
from workers.models.checkpoint import load_text_encoder, load_transformer
from workers.models.denoise import Rollout
from workers.models.execution import choose_passes, choose_vae_kernels
from workers.models.static_vae import StaticVae
from workers.models.umt5 import TextEncoder, translation
from workers.models.vae import VaeDecoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
FLOAT32, TIMES_PLAIN = 1e-3, 2.0
EXACT = ("reference", "quality", "balanced")


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32: cuDNN's convolutions round to 10 bits otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(case: Case, folder: Path, preset: str, dtype: str) -> RuntimeConfig:
    """The case's configuration under a preset, its files written."""
    write_case(case.config, case.path / "tensors.safetensors", folder)
    config = case_config(case.config, folder)
    changes = load_preset(preset).changes
    stream = {name: value for name, value in changes["stream"].items() if name != "global_sink"}
    return RuntimeConfig.model_validate(
        config
        | {
            "device": "cuda",
            "model": config["model"] | changes["model"] | {"dtype": dtype},
            "execution": changes["execution"],
            "stream": config["stream"] | stream,
        }
    )


@torch.inference_mode()
def made(case: Case, config: RuntimeConfig) -> Tensor:
    """A stream through everything that the preset records."""
    model = load_transformer(config.model, GPU)
    rollout = Rollout(model, config.stream, config.video, passes=choose_passes(config, model))
    rollout.passes.record_all()
    return play(case, rollout).cpu()


@pytest.mark.parametrize("preset", EXACT)
@pytest.mark.parametrize("path", cases("stream"), ids=case_id)
def test_a_stream_in_float32_equals_the_reference(path: Path, preset: str, tmp_path: Path) -> None:
    case = load(path)
    assert relative_error(made(case, on_gpu(case, tmp_path, preset, "float32")), case.tensors["latents"]) <= FLOAT32


@pytest.mark.parametrize("path", cases("stream"), ids=case_id)
def test_a_stream_in_bfloat16_is_as_near_as_the_plain_way(path: Path, tmp_path: Path) -> None:
    case, off = load(path), {}
    for preset in EXACT:
        config = on_gpu(case, tmp_path / preset, preset, "bfloat16")
        off[preset] = relative_error(made(case, config), case.tensors["latents"])
    assert max(off.values()) <= TIMES_PLAIN * off["reference"], off


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", cases("vae"), ids=case_id)
@torch.inference_mode()
def test_pixels_equal_the_reference(path: Path, dtype: torch.dtype, kernels: str, tmp_path: Path) -> None:
    case = load(path)
    latents, pixels = case.tensors["latents"].to(GPU), case.tensors["pixels_unclamped"]
    decoder = with_golden_weights(VaeDecoder(config_of(case), "plain"), case).to(GPU, dtype)
    plain = relative_error(decode_all(decoder, latents).float().cpu(), pixels)
    config = RuntimeConfig.model_validate(
        case_config(load(cases("stream")[0]).config, tmp_path) | {"execution": {"kernels": kernels}}
    )
    vae = StaticVae(decoder.prepare(), *latents.shape[-2:], kernels=choose_vae_kernels(config, GPU))
    off = max(
        relative_error(frames_of(vae, video).float().cpu(), whole)
        for video, whole in zip(latents.split(1), pixels.split(1), strict=True)
    )
    assert off <= (FLOAT32 if dtype == torch.float32 else TIMES_PLAIN * plain)


@pytest.mark.parametrize("path", cases("umt5"), ids=case_id)
@torch.inference_mode()
def test_embeds_equal_the_reference(path: Path) -> None:
    case = load(path)
    config = TextEncoderConfig.model_validate({name: case.config[name] for name in TextEncoderConfig.model_fields})
    encoder = TextEncoder(config).eval().requires_grad_(False)
    names = translation(config.num_layers)
    encoder.model.load_state_dict({t: case.tensors[f"weights/{o}"] for o, t in names.items()}, strict=False)
    ids, mask, expected = (case.tensors[name] for name in ("ids", "mask", "embeds"))
    off = {}
    for dtype in (torch.float32, torch.bfloat16):
        on_cpu = relative_error(encoder.to("cpu", dtype)(ids, mask).float(), expected)
        embeds = encoder.to(GPU, dtype)(ids.to(GPU), mask.to(GPU))
        off[dtype] = relative_error(embeds.float().cpu(), expected)
        assert off[dtype] <= (FLOAT32 if dtype == torch.float32 else TIMES_PLAIN * on_cpu)


def test_the_text_encoders_table_stays_in_host_memory() -> None:
    """Embeddings are those of a CPU."""
    model = load_config("pocket").model
    on_gpu, on_cpu = load_text_encoder(model, GPU), load_text_encoder(model, torch.device("cpu"))
    places = {name: tensor.device.type for name, tensor in on_gpu.model.state_dict().items()}
    assert {name for name, place in places.items() if place == "cpu"} == {
        "shared.weight",
        "encoder.embed_tokens.weight",
    }
    ids = torch.tensor([5, 9, 2, 77])
    assert relative_error(on_gpu.encode(ids.to(GPU)).cpu(), on_cpu.encode(ids)) <= FLOAT32
