"""Training computes what the runtime computes: the same weights, the same past, the same latents."""

import pytest
import torch
from tiny_files import CPU, TINY

from configs.load import load_config
from configs.schema import RuntimeConfig
from pocket.chance import coupled
from pocket.forcing import Batch, SelfForcing, weighed
from pocket.network import TrainedTransformer
from pocket.pool import cells_near_objects
from workers.models.checkpoint import load_transformer
from workers.models.denoise import Rollout
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer

BLOCKS = 8


class Recorded:
    """Noise that a rollout of training has used."""

    def __init__(self, draws: list[torch.Tensor], steps: int) -> None:
        self.draws, self.steps = draws, steps

    def start(self, block: int) -> torch.Tensor:
        return self.draws[block * self.steps]

    def between(self, block: int, step: int) -> torch.Tensor:
        return self.draws[block * self.steps + step + 1]

    def expect(self, block: int, steps: int) -> None:
        """All of it is there."""


@pytest.fixture(scope="module")
def config() -> RuntimeConfig:
    return load_config("pocket", TINY)


@pytest.fixture(scope="module")
def model(config: RuntimeConfig) -> CausalWanTransformer:
    return load_transformer(config.model, CPU)


def batch(switch: int) -> Batch:
    torch.manual_seed(3)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    latents = torch.randn(1, 3 * BLOCKS, 16, 12, 20)
    return Batch(latents, torch.ones_like(latents[:, :, :1]), torch.tensor([[70.0, 40.0]]), switch, ids, ids)


@pytest.mark.parametrize("switch", [0, 2, 4, 6])
@torch.no_grad()
def test_a_rollout_of_training_is_the_runtimes(switch: int, config: RuntimeConfig, model: CausalWanTransformer) -> None:
    """Filling, sliding and recache, at a switch while the window fills and after."""
    embeds = torch.randn(2, 1, 5, config.model.transformer.text_dim)
    network = TrainedTransformer(model, config.stream, config.video)
    draws: list[torch.Tensor] = []

    def recorded(like: torch.Tensor) -> torch.Tensor:
        draws.append(torch.randn_like(like))
        return draws[-1]

    forcing = SelfForcing(network, config.stream, Schedule.from_config(config.stream), recorded)
    given = batch(switch)
    texts = [network.text(embed) for embed in embeds]
    made = forcing.rollout(given, lambda after: texts[int(after) if switch else 1]).latents
    draws[0] = coupled(draws[0], given.start)  # as the rollout did with the first block's noise
    steps = len(config.stream.steps)
    draws[0] = coupled(draws[0], given.start)  # as the rollout did with the first block's noise
    rollout = Rollout(model, config.stream, config.video)
    noise = Recorded(draws, steps)
    rollout.switch(embeds[0] if switch else embeds[1])
    blocks = []
    for block in range(BLOCKS):
        if block and block == switch:
            rollout.switch(embeds[1])
        blocks.append(rollout.denoise_block(noise))
    error = (torch.cat(blocks, dim=1) - made).norm() / made.norm()
    assert error < 2e-5


@torch.no_grad()
def test_teacher_forcing_sees_the_past_as_a_rollout_does(config: RuntimeConfig, model: CausalWanTransformer) -> None:
    """All blocks at once give the flow that block after block gives on the same clean past."""
    network = TrainedTransformer(model, config.stream, config.video)
    torch.manual_seed(4)
    clean, noisy = torch.randn(2, 1, 3 * BLOCKS, 16, 12, 20)
    text = network.text(torch.randn(1, 5, config.model.transformer.text_dim))
    at_once = network.teacher_forced(clean, noisy, torch.full((1, BLOCKS), 500.0), text)
    kept = {}
    for block in range(BLOCKS):
        cut = slice(3 * block, 3 * block + 3)
        context = network.context(kept, block)
        flow, _ = network.pass_over(noisy[:, cut], 500.0, 3 * block, text, context)
        assert (flow - at_once[:, cut]).abs().max() < 1e-4
        _, kept[block] = network.pass_over(clean[:, cut], 0.0, 3 * block, text, context)


@torch.no_grad()
def test_blocks_that_are_given_are_kept(config: RuntimeConfig, model: CausalWanTransformer) -> None:
    network = TrainedTransformer(model, config.stream, config.video)
    forcing = SelfForcing(network, config.stream, Schedule.from_config(config.stream))
    text = network.text(torch.randn(1, 5, config.model.transformer.text_dim))
    story = batch(0).cut(9)
    lesson = forcing.rollout(story, lambda after: text, given=2)
    assert torch.equal(lesson.latents[:, :6], story.latents[:, :6])
    assert [float(error) > 0 for error in lesson.errors] == [False, False, True]


def test_errors_near_objects_count_more() -> None:
    off, weight = torch.zeros(2, 1, 16, 2, 2), torch.ones(2, 1, 1, 2, 2)
    off[0, :, :, 0, 0] = 1.0
    weight[0, :, :, 0, 0] = 5.0
    assert weighed(off, weight).tolist() == pytest.approx([5 / 8, 0.0])


def test_cells_near_an_object() -> None:
    """The object's own cells and those beside them, in every latent frame that holds one of its frames."""
    pixels = torch.full((1, 9, 3, 48, 64), -1.0)
    pixels[:, 6, :, 20, 28] = 1.0
    cells = cells_near_objects(pixels)
    assert cells.shape == (1, 3, 6, 8)
    assert [int(frame.sum()) for frame in cells[0]] == [0, 0, 9]
    assert cells[0, 2, 1:4, 2:5].all()
