"""What speed is measured against computes the same streams and pictures."""

from pathlib import Path

import pytest
import torch
from baseline import BaselinePasses, load_baseline
from baseline_vae import BaselineVae
from golden_cases import cases, load, relative_error
from model_files import case_config, write_case
from peft.tuners.lora import LoraLayer
from stream_case import CPU, SMALL, embeds, oracle, play, tiny_transformer
from test_vae import config_of, with_golden_weights

from configs.load import load_config
from configs.schema import RuntimeConfig, StreamConfig
from workers.models.denoise import Rollout
from workers.models.noise import DrawnNoise
from workers.models.vae import VaeDecoder

STREAMS = cases("stream")


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: f"golden-{path.name}-baseline")
def test_stream_equals_the_reference(path: Path, tmp_path: Path) -> None:
    case = load(path)
    write_case(case.config, path / "tensors.safetensors", tmp_path)
    config = RuntimeConfig.model_validate(case_config(case.config, tmp_path))
    model = load_baseline(config.model, CPU)
    beside = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(beside) == (10 * len(model.blocks) if config.model.lora else 0)
    rollout = Rollout(model, config.stream, config.video, passes=BaselinePasses(model, config.stream, config.video))
    assert relative_error(play(case, rollout), case.tensors["latents"]) <= 1e-4


def test_random_weights_have_their_lora_beside_them() -> None:
    """So that the cost is that of published files; too small to show in a stream."""
    config = load_config("pocket", ["model.path=null", "model.random_weights=true"])
    with_lora, without = (
        load_baseline(config.model.model_copy(update={"lora": lora}), CPU) for lora in (config.model.lora, None)
    )
    assert sum(isinstance(module, LoraLayer) for module in with_lora.modules()) == 10 * len(with_lora.blocks)
    made = []
    for model in (with_lora, without):
        passes = BaselinePasses(model, config.stream, config.video)
        rollout = Rollout(model, config.stream, config.video, passes=passes)
        rollout.switch(torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0)))
        made.append(rollout.denoise_block(DrawnNoise(0, rollout.shape)))
    assert not torch.equal(*made)
    assert relative_error(*made) <= 1e-2


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize("change", [{}, {"sink": 0}, {"sink": 6, "window": 15}, {"global_sink": False}], ids=str)
def test_any_geometry_equals_the_oracle(change: dict[str, int], rope: str) -> None:
    stream, model = StreamConfig(rope=rope, **change), tiny_transformer()
    rollout = Rollout(model, stream, SMALL, passes=BaselinePasses(model, stream, SMALL))
    noise, prompts, made = DrawnNoise(3, rollout.shape), {block: embeds(block) for block in (0, 2, 7)}, []
    for block in range(11):
        if block in prompts:
            rollout.switch(prompts[block])
        made.append(rollout.denoise_block(noise))
    assert relative_error(torch.cat(made, 1), oracle(model, stream, SMALL, noise, prompts, 11)) <= 1e-4


@pytest.mark.parametrize("path", cases("vae"), ids=lambda path: f"golden-{path.name}-baseline")
@torch.inference_mode()
def test_decoder_equals_the_reference(path: Path) -> None:
    case = load(path)
    decoder = BaselineVae(with_golden_weights(VaeDecoder(config_of(case), "plain"), case))
    latents = case.tensors["latents"]
    pixels = torch.cat([decoder.decode(latents[:, i]) for i in range(latents.shape[1])], 1)
    assert relative_error(pixels, case.tensors["pixels_unclamped"]) <= 1e-4
