"""Presets: each is complete, says whether it is exact, and gives way to what is set beside it."""

from pathlib import Path

import pytest
import torch
from golden_cases import case_id, cases, load, relative_error
from stream_case import case_rollout, play

from configs.load import as_yaml, load_config, load_preset, preset_names
from configs.schema import VideoConfig
from ipc.errors import ConfigError
from workers.models.denoise import Rollout
from workers.models.execution import choose_passes

EXACT = [name for name in preset_names() if load_preset(name).exact]
STREAMS = cases("stream")


def test_the_five_are_shipped_and_two_say_that_they_are_not_exact() -> None:
    assert preset_names() == ["balanced", "low_memory", "quality", "reference", "speed"]
    assert EXACT == ["balanced", "quality", "reference"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_sets_the_same_keys(name: str) -> None:
    """Whoever changes from one to another keeps nothing of the first."""
    assert load_preset(name).changes["execution"].keys() == load_preset("reference").changes["execution"].keys()
    assert {"model", "execution", "stream"} <= load_preset(name).changes.keys()


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("config", ["pocket", "longlive-1.3b"])
def test_every_preset_fits_every_configuration(name: str, config: str, tmp_path: Path) -> None:
    chosen = load_config(config, [f"preset={name}"])
    assert chosen.preset == name
    (tmp_path / "copy.yaml").write_text(as_yaml(chosen), encoding="utf-8")
    assert load_config(str(tmp_path / "copy.yaml")) == chosen.model_copy(update={"preset": None})


def test_what_is_set_comes_on_top_whatever_the_order() -> None:
    for settings in (["preset=speed", "stream.recache=none"], ["stream.recache=none", "preset=speed"]):
        config = load_config("pocket", settings)
        assert (config.execution.linears, config.stream.recache) == ("fp8", "none")


def test_a_file_can_name_its_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(as_yaml(load_config("pocket")) + "preset: low_memory\n", encoding="utf-8")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.execution.kv, config.stages.text_encoder.device) == ("int8", "cpu")


def test_an_unknown_preset_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"preset balance: did you mean balanced\? known are balanced, low_memory"):
        load_config("pocket", ["preset=balance"])


@pytest.mark.parametrize("preset", EXACT)
@pytest.mark.parametrize("path", STREAMS, ids=case_id)
def test_exact_presets_equal_the_reference(path: Path, preset: str, tmp_path: Path) -> None:
    case = load(path)
    plain = case_rollout(case, tmp_path / "model")
    video = VideoConfig(height=8 * plain.shape[2], width=8 * plain.shape[3])
    config = load_config("pocket", [f"preset={preset}"])
    config = config.model_copy(update={"stream": plain.stream, "video": video})
    rollout = Rollout(plain.model, plain.stream, video, passes=choose_passes(config, plain.model))
    assert rollout.passes is not plain.passes
    with torch.inference_mode():
        assert relative_error(play(case, rollout), case.tensors["latents"]) <= 1e-4
