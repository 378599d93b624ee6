"""The flow-matching schedule equals the reference."""

from pathlib import Path

import pytest
import torch
from golden_cases import cases, load, relative_error

from configs.schema import StreamConfig
from workers.models.schedule import Schedule, shifted_sigmas

CASES = cases("scheduler")


def shift_cases() -> list[tuple[Path, float]]:
    return [(path, shift) for path in CASES for shift in load(path).config["shifts"]]


def case_id(value: Path | float) -> str:
    return f"golden-{value.name}-plain" if isinstance(value, Path) else f"shift{value:g}"


@pytest.mark.parametrize(("path", "shift"), shift_cases(), ids=case_id)
def test_schedule_equals_the_reference(path: Path, shift: float) -> None:
    """golden: sigmas, warped steps and noise mixed in, for every shift."""
    case = load(path)
    schedule = Schedule.from_config(StreamConfig(timestep_shift=shift, steps=tuple(case.config["steps"])))
    name = f"shift{shift:g}"
    assert relative_error(schedule.sigmas, case.tensors[f"{name}/sigmas"]) <= 1e-6
    assert relative_error(torch.tensor(schedule.steps), case.tensors[f"{name}/warped"]) <= 1e-6
    x, noise = case.tensors["x"], case.tensors["noise"]
    rows = [schedule.add_noise(x[i], noise[i], float(t)) for i, t in enumerate(case.tensors["timesteps"])]
    assert relative_error(torch.stack(rows), case.tensors[f"{name}/add_noise"]) <= 1e-6


def test_clean_undoes_noise() -> None:
    """With the true flow, noise minus clean, every step predicts the clean latents."""
    schedule = Schedule.from_config(StreamConfig())
    clean, noise = torch.randn(2, 1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in schedule.steps:
        noisy = schedule.add_noise(clean, noise, timestep)
        assert relative_error(schedule.clean(noisy, noise - clean, timestep), clean) <= 1e-5


def test_steps_that_are_not_warped_are_taken_as_they_are() -> None:
    stream = StreamConfig(warp_steps=False, steps=(1000, 500))
    assert Schedule.from_config(stream).steps == (1000.0, 500.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sigmas_fall_from_one(shift: float) -> None:
    sigmas = shifted_sigmas(shift)
    assert sigmas[0] == 1
    assert bool((sigmas.diff() < 0).all())
