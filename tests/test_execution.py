"""The settings under `execution` choose how blocks are computed."""

import pytest
import torch
from stream_case import tiny_transformer

from configs.load import load_config
from ipc.errors import ConfigError
from workers.models.execution import choose_passes
from workers.models.graphs import run_directly
from workers.models.kv_store import QuantisedKVStore
from workers.models.passes import PlainPasses
from workers.models.static_passes import StaticPasses


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


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv: int8 needs denoiser: static, found denoiser: plain"):
        load_config("pocket", ["execution.denoiser=plain", "execution.kv=int8"])
