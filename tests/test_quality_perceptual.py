"""LPIPS and CLIP score: what is lacking is named, nothing is fetched; with weights, the figures are what they say."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from workers.quality import perceptual
from workers.quality.judged import judge_lack
from workers.quality.perceptual import CLIP_FILES, CLIP_MEAN, CLIP_STD, LPIPS_WEIGHTS, Clip, Lpips, clip_pixels


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name in names else found(name, *rest)
    )


def test_lpips_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lack = perceptual.lpips_lack()
    assert lack == "torchmetrics and torchvision not installed; pip install 'longlive-runtime[quality]'"


def test_lpips_needs_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, "torchmetrics", "torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / LPIPS_WEIGHTS
    assert perceptual.lpips_lack().startswith(f"{file}: no such file")
    file.parent.mkdir()
    file.touch()
    assert perceptual.lpips_lack() == ""


def test_a_torchvision_for_another_torch_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    installed(monkeypatch, "torchmetrics", "torchvision")
    monkeypatch.setattr(importlib, "import_module", fails)
    assert perceptual.lpips_lack() == "torchvision cannot be imported: operator torchvision::nms does not exist"


def test_lpips_gives_torchmetrics_pixels_from_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the class of torchmetrics that answers with the mean difference."""

    class Stand:
        def __init__(self, net_type: str, normalize: bool) -> None:
            assert (net_type, normalize) == ("alex", True)

        def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            assert one.shape == (2, 3, 4, 6)
            return (other - one).mean()

    module = ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = Stand  # type: ignore[attr-defined]
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    white = np.full((2, 4, 6, 3), 255, np.uint8)
    assert Lpips()(0 * white, white) == 1.0


def test_clip_names_the_files_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    lack = perceptual.clip_lack()
    assert all(
        name in lack for name in (*sum(CLIP_FILES, ()), str(tmp_path), "hf download openai/clip-vit-base-patch16")
    )
    snapshot = tmp_path / "models--openai--clip-vit-base-patch16" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (refs := snapshot.parent.parent / "refs").mkdir()
    (refs / "main").write_text("abc")
    for name in ("config.json", "pytorch_model.bin"):
        (snapshot / name).touch()
    assert perceptual.clip_lack().startswith("tokenizer.json of ")
    (snapshot / "tokenizer.json").touch()
    assert perceptual.clip_lack() == ""


def test_clip_sees_the_middle_normalised() -> None:
    frames = np.zeros((1, 96, 192, 3), np.uint8)
    frames[:, :, 48:144] = 255
    pixels = clip_pixels(frames)
    assert pixels.shape == (1, 3, 224, 224)
    white = [(1 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    assert pixels[0, :, 112, 112].tolist() == pytest.approx(white, abs=1e-5)


def test_clip_score_is_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one frame in four with its own text; less than 0 counts as 0."""

    class Stand:
        config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

        def eval(self) -> "Stand":
            return self

        def __call__(self, pixel_values: torch.Tensor, texts: list[str]) -> SimpleNamespace:
            assert len(pixel_values) == 2
            image = torch.tensor([[0.6, 0.8]] * 2)
            text = torch.tensor([[1.0, 0.0] if one == "like" else [-1.0, 0.0] for one in texts])
            return SimpleNamespace(image_embeds=image, text_embeds=text)

    def tokenizer(texts: list[str], max_length: int, **rest: object) -> dict[str, list[str]]:
        assert max_length == 77
        return {"texts": texts}

    import transformers

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda name, local_files_only: Stand())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, local_files_only: tokenizer)
    scores = Clip()(np.zeros((8, 16, 16, 3), np.uint8), ["like"] * 4 + ["unlike"] * 4)
    assert scores == pytest.approx([60.0, 0.0])


def test_the_judge_is_asked_about_the_embedded_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from configs.load import load_config

    assert judge_lack(load_config("pocket")) == ""
    assert "model.path is not set" in judge_lack(
        load_config("pocket", ["model.path=null", "model.random_weights=true"])
    )
    assert "video is 64x160" in judge_lack(load_config("pocket", ["video.height=64"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert judge_lack(load_config("pocket")) == "needs scripts/pocket of the sources, which is not here"
