"""The shipped weights show what prompts say. A sample of what scripts/eval_pocket.py measures at length."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from configs.load import load_config
from pocket.evaluation import SWITCHED_AT, Scores, fresh_streams, switches, vae_quality
from pocket.videos import Bare, Runtime
from workers.models.checkpoint import load_transformer
from workers.models.lora import PREFIX, lora_shapes
from workers.models.tensor_file import open_tensors

POCKET = Path(__file__).parent.parent / "workers" / "assets" / "pocket"
SEED = 5
VAE_SEED = 9
"""Of three clips, one on a textured ground."""
pytestmark = pytest.mark.timeout(240)


def silent(line: str) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def maker() -> Iterator[Bare]:
    """In one thread, as the stages are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bare()
    torch.set_num_threads(threads)


def measured(part: str) -> Scores:
    """Eight streams of held-out captions; prompt switches of every kind at block 5, one at block 20; or three clips."""
    torch.set_num_threads(1)
    scores, make = Scores(), Bare().make
    if part == "streams":
        fresh_streams(scores, make, SEED, 8, silent, blocks=4)
    elif part == "switches":
        switches(scores, make, SEED, 4, silent, SWITCHED_AT[:1])
        switches(scores, make, SEED + 1, 1, silent, SWITCHED_AT[1:])
    else:
        vae_quality(scores, load_config("pocket"), VAE_SEED, 3, silent)
    return scores


@pytest.fixture(scope="module")
def scores() -> Scores:
    """All parts, two at a time: each computes in one thread."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = [scores.values for scores in pool.map(measured, ("switches", "streams", "vae"))]
    return Scores({name: values for part in parts for name, values in part.items()})


@pytest.mark.parametrize(
    ("what", "least"),
    [("presence", 0.97), ("colour", 0.95), ("shape", 0.8), ("count", 0.85), ("motion", 0.85), ("ground", 0.95)],
)
def test_streams_show_what_held_out_captions_say(scores: Scores, what: str, least: float) -> None:
    assert scores.mean(what) >= least


def test_a_prompt_switch_is_on_screen_within_two_blocks(scores: Scores) -> None:
    assert scores.mean("switched at block 5") >= 0.75
    assert scores.mean("switched at block 20") == 1


def test_the_vae_keeps_pictures(scores: Scores) -> None:
    assert scores.mean("VAE plain dB") >= 32
    assert scores.mean("VAE textured dB") >= 28


def test_the_model_alone_makes_what_the_runtime_makes(maker: Bare) -> None:
    """So that what is measured in one process holds for all of them."""
    prompts = ["a red circle moving right", "a blue star circling"]
    alone, whole = (each.make(prompts, 4, 3, at=(2,)).astype(int) for each in (maker, Runtime()))
    assert alone.shape == whole.shape == (45, 96, 160, 3)
    assert np.abs(alone - whole).mean() < 1.5  # H.264


def test_another_seed_is_another_video(maker: Bare) -> None:
    one, other = (maker.make(["a white square"], 1, seed).astype(int) for seed in (1, 2))
    assert np.abs(one - other).mean() > 1


def test_the_files_are_small_and_those_of_the_card() -> None:
    files = [path for path in POCKET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20
    card = (POCKET / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"`(\S+\.safetensors)`[^|]*\|[^|]*\|\s*`([0-9a-f]{64})`", card))
    assert said == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.suffix == ".safetensors"}


def test_tensors_are_bfloat16_under_the_published_names() -> None:
    """Base and LoRA as in the published files, but for their number of layers and widths."""
    model = load_config("pocket").model
    for path in POCKET.glob("*.safetensors"):
        assert {dtype for _, dtype in open_tensors(path).shapes.values()} == {"bfloat16"}, path.name
    transformer = load_transformer(model.model_copy(update={"lora": None}), torch.device("cpu"))
    assert open_tensors(POCKET / "adapter_model.safetensors").shapes.keys() == lora_shapes(transformer, 8).keys()


def test_peft_loads_the_adapter_as_it_lies() -> None:
    """And what it merges is what the runtime merges."""
    model, cpu = load_config("pocket").model, torch.device("cpu")
    merged = load_transformer(model, cpu).state_dict()
    base = load_transformer(model.model_copy(update={"lora": None}), cpu)
    base.config = {"model_type": "custom"}  # type: ignore[assignment]  # peft asks a dict for it
    theirs = PeftModel.from_pretrained(base, str(POCKET)).merge_and_unload().state_dict()
    assert PREFIX == "base_model.model."
    for name, tensor in merged.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name
