"""Training runs from nothing to files that the runtime loads, and goes on where it was interrupted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_files import CPU, TINY

from configs.load import load_config
from pocket.charts import save_curves
from pocket.decoder_stage import changes, train_decoder
from pocket.masters import Masters
from pocket.recipe import SMOKE, Phase
from pocket.shipping import ship
from pocket.training import Training, steps
from pocket.transformer_stages import train_adapter, train_self_forcing, train_teacher
from pocket.vae_stage import train_vae
from pocket.videos import Bare

pytestmark = pytest.mark.timeout(300)
NARROW = (*TINY, "model.vae.base_dim=2", "model.transformer.num_layers=1")


def training(folder: Path, recipe: object = SMOKE) -> Training:
    return Training(folder, load_config("pocket", NARROW), recipe, CPU, console=Console(quiet=True))


def test_every_stage_runs_and_what_is_shipped_makes_a_video(tmp_path: Path) -> None:
    run = training(tmp_path)
    for stage in (train_vae, train_decoder, train_teacher, train_self_forcing, train_adapter):
        stage(run)
    save_curves(tmp_path)
    ship(run, tmp_path / "shipped")
    for name in ("curves.png", "teacher_sheet.png", "self_forcing_sheet.png", "adapter_sheet.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.state.pt"))
    video = Bare(str(tmp_path / "shipped" / "config.yaml")).make(["a red circle", "a blue star"], 3, 0, at=(2,))
    assert video.shape == (33, 96, 160, 3)


def test_an_interrupted_stage_goes_on(tmp_path: Path) -> None:
    run = replace(training(tmp_path), state_every_s=0.0)
    phase = Phase(steps=6, minutes=1.0, batch=1, rate=0.1)

    def trained(upto: int) -> tuple[list[int], Masters]:
        torch.manual_seed(0)
        masters = Masters({"layer": torch.nn.Linear(2, 2)}, rate=0.1)
        seen = []
        for step, progress in steps(run, "stage", phase, masters):
            seen.append(step)
            if step == upto:
                break
            for parameter in masters.parameters:
                parameter.grad = torch.ones_like(parameter)
            masters.step(progress)
        return seen, masters

    assert trained(3)[0] == [0, 1, 2, 3]
    seen, masters = trained(99)
    assert seen == [3, 4, 5]
    assert masters.steps == 6
    assert not list(tmp_path.glob("*.state.pt"))


def test_a_stage_ends_with_its_minutes(tmp_path: Path) -> None:
    run = training(tmp_path, replace(SMOKE, vae=Phase(10**9, 1e-9, 1, 1e-3)))
    masters = Masters({"layer": torch.nn.Linear(2, 2)}, rate=0.1)
    assert len(list(steps(run, "vae", run.recipe.vae, masters))) <= 1


def test_changes_are_told_apart_by_where_they_are() -> None:
    pixels = torch.zeros(2, 33, 3, 4, 4)
    seams = torch.repeat_interleave(torch.arange(9) % 2, torch.tensor([1, *[4] * 8])).float()
    made = pixels + torch.tensor([1.0, 2.0])[:, None, None, None, None] * seams[None, :, None, None, None]
    at_edges, elsewhere = changes(made, pixels)
    assert (at_edges.tolist(), elsewhere.tolist()) == ([1.0, 4.0], [0.0, 0.0])
