"""The settings under `execution` choose how blocks are computed."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from stream_case import CPU, tiny_transformer

from configs.load import load_config
from configs.schema import KernelsKind
from ipc.errors import ConfigError
from workers.models.checkpoint import load_vae_decoder
from workers.models.execution import (
    choose_frame_stream,
    choose_kernels,
    choose_passes,
    choose_recorder,
    choose_vae_kernels,
)
from workers.models.graphs import run_directly
from workers.models.kernels import TORCH
from workers.models.kv_store import QuantisedKVStore
from workers.models.passes import PlainPasses
from workers.models.static_passes import StaticPasses
from workers.models.vae import to_rgb8

TRIED = "_sum"
"""What is compiled first, to see whether there is a compiler."""


def test_the_default_is_the_fast_path() -> None:
    passes = choose_passes(load_config("pocket"), tiny_transformer())
    assert isinstance(passes, StaticPasses)
    assert not isinstance(passes.static.store, QuantisedKVStore)
    assert passes.record is run_directly


def test_the_plain_way_can_be_had() -> None:
    config = load_config("pocket", ["execution.denoiser=plain"])
    assert isinstance(choose_passes(config, tiny_transformer()), PlainPasses)


@pytest.mark.parametrize(("kind", "code"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_keys_and_values_can_be_kept_in_eight_bits(kind: str, code: torch.dtype) -> None:
    passes = choose_passes(load_config("pocket", [f"execution.kv={kind}"]), tiny_transformer())
    assert isinstance(passes, StaticPasses)
    assert passes.static.store.k.dtype == passes.static.store.v.dtype == code


@pytest.mark.parametrize(
    ("kind", "device", "name"),
    [
        ("auto", "cpu", "torch"),
        ("auto", "cuda:1", "triton"),
        ("triton", "cuda", "triton"),
        ("torch", "cuda", "torch"),
        ("triton", "cpu", "torch"),
    ],
)
def test_kernels_are_what_the_device_runs(kind: KernelsKind, device: str, name: str) -> None:
    notes: list[str] = []
    assert choose_kernels(kind, torch.device(device), notes.append).name == name
    assert notes == [f"kernels by {name}"]
    assert choose_vae_kernels(load_config("pocket", [f"execution.kernels={kind}"]), torch.device(device)).name == name


def test_the_decoder_has_no_part_in_a_change_of_presets() -> None:
    """A run with a target begins at a preset whose denoiser is computed by torch."""
    config = load_config("pocket", ["adaptive.target_rtf=1"])
    assert config.execution.kernels == "torch"
    assert choose_vae_kernels(config, torch.device("cuda")).name == "triton"


@pytest.mark.parametrize("kind", ["auto", "triton"])
def test_without_triton_torch_is_used(kind: KernelsKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    warnings: list[str] = []
    assert choose_kernels(kind, torch.device("cuda"), warn=warnings.append) is TORCH
    said = "execution.kernels: triton needs the package triton, found none; used instead: torch"
    assert warnings == [said] * (kind == "triton")


def test_kernels_reach_every_layer() -> None:
    config = load_config("pocket", ["execution.kernels=triton"])
    passes = choose_passes(config, tiny_transformer())
    assert isinstance(passes, StaticPasses)
    assert {layer.kernels for layer in passes.static.layers} == {passes.static.kernels} == {TORCH}


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_are_compiled_where_it_is_asked_for(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compile_(body: Callable[..., object], *, fullgraph: bool, dynamic: bool) -> Callable[..., object]:
        assert fullgraph and not dynamic
        asked.append(body.__name__)
        return body

    monkeypatch.setattr(torch, "compile", compile_)
    model = tiny_transformer()
    choose_passes(load_config("pocket", [f"execution.compile={str(compiled).lower()}"]), model)
    assert asked == [TRIED, *["ask_past", "ask_prompt", "finish"] * len(model.blocks)] * compiled


@pytest.mark.parametrize("wanted", ["kv: int8", "kernels: triton", "compile: true"])
def test_what_cannot_be_is_refused(wanted: str) -> None:
    setting = f"execution.{wanted.replace(': ', '=')}"
    with pytest.raises(ConfigError, match=f"{wanted} needs denoiser: static, found denoiser: plain"):
        load_config("pocket", ["execution.denoiser=plain", setting])


def test_nothing_is_recorded_but_on_a_gpu_that_may() -> None:
    assert choose_recorder(load_config("pocket"), torch.device("cpu")) is run_directly
    assert choose_recorder(load_config("pocket", ["execution.graphs=false"]), torch.device("cuda:0")) is run_directly


def test_the_decoder_stage_has_the_fast_path() -> None:
    """With the embedded weights it makes the frames of the plain way, but for rounding in bfloat16."""
    config = load_config("pocket")
    stream, plain = choose_frame_stream(config, CPU), load_vae_decoder(config.model, CPU, "plain")
    latents = torch.randn(3, 1, 16, 12, 20, generator=torch.Generator().manual_seed(0))
    cache = plain.new_cache()
    with torch.inference_mode():
        for latent in latents:
            off = stream.decode(latent[0]).float() - to_rgb8(plain.decode(latent, cache))[0].float()
            assert off.abs().mean() < 0.5
