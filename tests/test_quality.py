"""Two configurations compared: figures by hand, what a taught stream is taught, the gate both ways, the report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from stream_case import SMALL, embeds, new_rollout, tiny_transformer
from tiny_files import TINY as TINY_SETTINGS

from configs.load import load_config
from configs.schema import StreamConfig
from workers.models.noise import DrawnNoise
from workers.quality.comparison import Comparison
from workers.quality.job import Gate, Job, Option, Scene, Story
from workers.quality.metrics import latent_error, psnr_db, ssim
from workers.quality.pictures import AMPLIFIED, beside
from workers.quality.report import SCHEMA, Against, Block, Report, compared, passes
from workers.quality.run import verdict, write
from workers.quality.streams import Streams, encoded

BLOCKS = 5
"""One more than the window: the first that a sink can be wrong in."""
HEIGHT, WIDTH = 64, 96
OPTIONS = {"same": (), "int8": ("execution.kv=int8",), "wrong sink": ("stream.sink=9",)}
GATE = Gate(least_db=30, judges="teacher_forced")
STORY = Story(
    seed=5, prompts=(Scene(text="a red circle circling", block=0), Scene(text="a blue circle circling", block=3))
)


def frames(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 16, 16, 3), value, np.uint8)


def option(name: str, *settings: str) -> Option:
    size = (f"video.height={HEIGHT}", f"video.width={WIDTH}")
    return Option(name=name, config=load_config("pocket", [*size, *settings]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """The embedded weights, small pictures, one story with a switch; and its folder."""
    out, threads = tmp_path_factory.mktemp("quality"), torch.get_num_threads()
    against = tuple(option(name, *settings) for name, settings in OPTIONS.items())
    job = Job(a=option("A"), against=against, stories=(STORY,), blocks=BLOCKS, gate=GATE, out=out)
    made = Comparison(job, lambda line: None).report()
    write(made, out / "report.json")
    torch.set_num_threads(threads)
    return made, out


def of(report: Report, name: str) -> Against:
    return next(one for one in report.against if one.option.name == name)


# Figures


def test_psnr_is_of_all_pixels_together() -> None:
    one, other = frames(0, 2), frames(0, 2)
    other[0, 0, 0, 0] = 51  # a fifth of the peak, in one of 2 * 16 * 16 * 3 numbers
    assert psnr_db(one, other) == pytest.approx(10 * math.log10(25 * one.size))


def test_psnr_of_black_and_white_is_zero_and_of_equal_frames_nothing() -> None:
    assert psnr_db(frames(0), frames(255)) == 0
    assert psnr_db(frames(7), frames(7)) is None


def test_ssim_of_flat_frames() -> None:
    """Without structure only the means are left: (2 a b + C1) / (a^2 + b^2 + C1)."""
    c1 = (0.01 * 255) ** 2
    assert ssim(frames(100, 2), frames(100, 2)) == pytest.approx(1)
    expected = (2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)
    assert ssim(frames(100), frames(50)) == pytest.approx(expected, abs=1e-4)


def test_latent_error_is_relative_to_the_reference() -> None:
    assert latent_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_the_difference_is_amplified_and_cut() -> None:
    row = beside(frames(10), frames(13))[0, 0]
    assert [row[0, 0], row[16, 0], row[32, 0]] == [10, 13, 3 * AMPLIFIED]
    assert beside(frames(0), frames(200))[0, 0, 32, 0] == 255


# The gate


def block(story: int, number: int, decibels: float | None, error: float = 0.1) -> Block:
    return Block(story=story, block=number, psnr_db=decibels, ssim=0.9, lpips=None, latent_error=error)


def test_worst_block_first_below_and_divergence() -> None:
    blocks = [block(0, 0, None), block(0, 1, 29.0, 0.3), block(1, 0, 40.0), block(1, 1, None)]
    found = compared(blocks, (STORY, STORY), GATE)
    assert (found.worst.story, found.worst.block, found.worst.psnr_db) == (0, 1, 29.0)
    assert found.worst.prompt == "a red circle circling"
    assert found.first_below == (1, None)
    assert [moment.worst_psnr_db for moment in found.over_time] == [40.0, 29.0]
    assert [moment.largest_latent_error for moment in found.over_time] == [0.1, 0.3]
    assert found.over_time[1].mean_latent_error == pytest.approx(0.2)


@pytest.mark.parametrize(("decibels", "passed"), [(29.99, False), (30.0, True), (None, True)])
def test_the_gate_looks_at_the_comparison_it_names(decibels: float | None, passed: bool) -> None:
    bad, one = (compared([block(0, 0, value)], (STORY,), GATE) for value in (1.0, decibels))
    assert passes(GATE, one, bad) is passed
    assert passes(GATE.model_copy(update={"judges": "free_running"}), bad, one) is passed


def test_the_same_configuration_is_equal_in_every_block(report: tuple[Report, Path]) -> None:
    same = of(report[0], "same")
    for found in (same.teacher_forced, same.free_running):
        assert [(b.psnr_db, b.latent_error, b.ssim) for b in found.blocks] == [(None, 0.0, pytest.approx(1))] * BLOCKS
    assert same.passed


def test_int8_keys_and_values_pass_and_are_not_equal_once_there_is_a_past(report: tuple[Report, Path]) -> None:
    int8 = of(report[0], "int8")
    assert int8.passed
    assert all((b.psnr_db is None) == (b.block == 0) == (b.latent_error == 0) for b in int8.teacher_forced.blocks)


def test_a_wrong_sink_fails_where_it_first_matters(report: tuple[Report, Path]) -> None:
    """Taught by the same latents: only its own cache can make the difference, and only once the window slides."""
    made = report[0]
    wrong = of(made, "wrong sink").teacher_forced
    assert [b.psnr_db for b in wrong.blocks[:4]] == [None] * 4
    assert wrong.worst.block == 4 and wrong.worst.prompt == "a blue circle circling"
    assert wrong.worst.psnr_db is not None and wrong.worst.psnr_db < GATE.least_db
    assert not of(made, "wrong sink").passed and not made.passed
    assert len(verdict(made)) == 1
    assert verdict(made)[0].startswith(
        "failed: wrong sink: teacher-forced, story 0, block 4 (a blue circle circling): found "
    )


@pytest.mark.parametrize("execution", ["plain", "static"])
def test_a_taught_stream_has_the_teachers_past(execution: Any) -> None:
    """What it made itself leaves no trace: the next block is the teacher's, a recache from the history included."""
    model, stream = tiny_transformer(), StreamConfig(window=9, sink=3)
    teacher, taught = (new_rollout(model, stream, SMALL, execution=execution) for _ in range(2))
    right, other = (DrawnNoise(seed, teacher.shape) for seed in (1, 2))
    for rollout in (teacher, taught):
        rollout.switch(embeds(1))
    for _ in range(4):
        latents = teacher.denoise_block(right)
        assert not torch.equal(taught.denoise(other), latents)
        taught.remember(latents)
    for rollout in (teacher, taught):
        rollout.switch(embeds(2))
    assert torch.equal(taught.denoise(right), teacher.denoise(right))


class HalfWrongNoise(DrawnNoise):
    """Another seed's in every second block, the first included."""

    def _draw(self, block: int, draw: int, out: torch.Tensor) -> torch.Tensor:
        return DrawnNoise(self.seed + 1 - block % 2, self.shape)._draw(block, draw, out)


def test_a_block_that_went_wrong_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the cache nor in the decoder: a taught stream's next block is equal again, latents and frames."""
    config = load_config("pocket", [*TINY_SETTINGS, "video.height=32", "video.width=32", "stream.window=9"])
    streams = Streams(config, encoded(config, [scene.text for scene in STORY.prompts]))
    video = list(streams.alone(STORY, 6))
    monkeypatch.setattr("workers.quality.streams.DrawnNoise", HalfWrongNoise)
    taught = list(streams.taught(STORY, [made.latents for made in video]))
    for alike in (
        [torch.equal(one.latents, other.latents) for one, other in zip(video, taught, strict=True)],
        [np.array_equal(one.frames, other.frames) for one, other in zip(video, taught, strict=True)],
    ):
        assert alike == [False, True] * 3


# The report

FIELDS = {
    "": "schema versions blocks stories gate a a_notes against not_measured passed",
    "versions": "longlive_runtime python torch platform devices",
    "stories": "seed prompts",
    "stories.prompts": "text block",
    "gate": "least_db judges",
    "a": "name config",
    "against": "option notes teacher_forced free_running clip judge passed files",
    "against.option": "name config",
    "against.teacher_forced": "blocks over_time worst first_below",
    "against.teacher_forced.blocks": "story block psnr_db ssim lpips latent_error",
    "against.teacher_forced.over_time": ("block worst_psnr_db mean_ssim mean_latent_error largest_latent_error"),
    "against.teacher_forced.worst": "story block psnr_db prompt",
}
"""Of version 1. Whoever changes a line raises `SCHEMA`, and says so in docs/quality.md."""


def inside(value: Any, path: str) -> Mapping[str, Any]:
    for key in filter(None, path.split(".")):
        value = value[key]
        value = value[0] if isinstance(value, list) else value
    return value


def test_the_schema_of_the_report(report: tuple[Report, Path]) -> None:
    text = (report[1] / "report.json").read_text(encoding="utf-8")
    plain = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert plain["schema"] == SCHEMA == 1
    for path, names in FIELDS.items():
        assert list(inside(plain, path)) == names.split(), path
    assert plain["a"]["config"]["execution"]["kv"] == "model"
    assert inside(plain, "against.free_running").keys() == inside(plain, "against.teacher_forced").keys()
    assert Report.model_validate_json(text) == report[0]


def test_the_documentation_names_every_field() -> None:
    text = (Path(__file__).parent.parent / "docs" / "quality.md").read_text(encoding="utf-8")
    assert {name for names in FIELDS.values() for name in names.split() if f"`{name}`" not in text} == set()


def test_what_is_not_measured_is_said(report: tuple[Report, Path]) -> None:
    lines = report[0].not_measured
    assert "judge: not measured: video is 64x96, it was trained for 96x160" in lines
    assert {line.partition(":")[0] for line in lines} <= {"SSIM", "LPIPS", "CLIP score", "judge"}


def test_pictures(report: tuple[Report, Path]) -> None:
    made, out = report
    assert of(made, "wrong sink").files == ("03_side_by_side.mp4", "03_difference.png")
    video = imageio_ffmpeg.read_frames(str(out / "03_side_by_side.mp4"))
    about = next(video)
    assert about["size"] == (3 * WIDTH, HEIGHT) and about["pix_fmt"].startswith("yuv420p")
    assert sum(1 for _ in video) == made.a.config.stream.first_frame(BLOCKS)
    header = (out / "03_difference.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 3 * WIDTH + 8
    assert int.from_bytes(header[20:24], "big") == 4 * HEIGHT + 12
