"""The shipped weights show what prompts say. A sample of what scripts/eval_pocket.py measures at length."""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from configs.load import load_config
from pocket.evaluation import MOTION_BLOCKS, SOON, SWITCHED_AT, Scores, fresh_streams, switches, vae_quality
from pocket.videos import Bare, Runtime
from workers.models.checkpoint import load_transformer
from workers.models.lora import PREFIX, lora_shapes
from workers.models.tensor_file import open_tensors

POCKET = Path(__file__).parent.parent / "workers" / "assets" / "pocket"
SEED = 5
AFTER = SOON + MOTION_BLOCKS
"""Blocks looked at after a switch: the fewest that can tell in time how an object moves."""
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


def early_switches(scores: Scores) -> None:
    """One of every kind at block 5."""
    switches(scores, Bare().make, SEED, 4, silent, SWITCHED_AT[:1], looked_at=AFTER)


def held_out_captions(scores: Scores) -> None:
    """Eight streams."""
    fresh_streams(scores, Bare().make, SEED, 8, silent, blocks=4)


def late_switch(scores: Scores) -> None:
    """At block 20."""
    switches(scores, Bare().make, SEED + 1, 1, silent, SWITCHED_AT[1:], looked_at=AFTER)


def clips(scores: Scores) -> None:
    """Three through the VAE."""
    vae_quality(scores, load_config("pocket"), VAE_SEED, 3, silent)


PARTS = (early_switches, held_out_captions, late_switch, clips)
"""Longest first, so that two processes end at about the same time."""


def measured(part: Callable[[Scores], None]) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    scores = Scores()
    part(scores)
    return scores.values


@pytest.fixture(scope="module")
def scores() -> Scores:
    """Of all parts, two at a time: each computes in one thread."""
    scores = Scores()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for values in pool.map(measured, PARTS):
            for name, outcomes in values.items():
                scores.values.setdefault(name, []).extend(outcomes)
    return scores


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
    alone, whole = (each.make(prompts, 3, 3, at=(1,)).astype(int) for each in (maker, Runtime()))
    assert alone.shape == whole.shape == (33, 96, 160, 3)
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
