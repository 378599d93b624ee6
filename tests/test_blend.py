"""`recache: blend(SECONDS)`: embeddings go from one prompt to the next, block by block, in any execution alike."""

import pytest
import torch
from golden_cases import relative_error
from stream_case import SMALL, embeds, new_rollout, tiny_transformer
from torch import Tensor

from configs.schema import Execution, StreamConfig
from workers.models.blend import Blend, between
from workers.models.denoise import LatentHistory, Rollout
from workers.models.noise import DrawnNoise

both = pytest.mark.parametrize("execution", ["plain", "static"])
OLD, NEW = embeds(0), embeds(1)


@pytest.mark.parametrize(
    ("recache", "fps", "blocks"),
    [("blend(1.5)", 16, 2), ("blend(3)", 16, 4), ("blend(0.1)", 16, 1), ("blend(1.5)", 24, 3), ("full", 16, 1)],
)
def test_seconds_become_blocks_of_twelve_frames(recache: str, fps: int, blocks: int) -> None:
    assert StreamConfig(recache=recache).blend_blocks(fps) == blocks


def test_smaller_blocks_make_a_way_of_more() -> None:
    assert StreamConfig(recache="blend(1.5)", frames_per_block=1).blend_blocks(16) == 6


def test_a_way_begins_with_a_part_and_ends_with_the_new_prompt() -> None:
    """Block i of N is i / N; exactly the old prompt before, exactly the new one from the last block on."""
    blend = Blend(OLD, NEW, first=5, blocks=4)
    for block, part in ((5, 0.25), (6, 0.5), (7, 0.75)):
        torch.testing.assert_close(blend.at(block), (1 - part) * OLD + part * NEW)
    assert blend.at(4) is OLD
    assert blend.at(8) is blend.at(100) is NEW
    assert [block for block in range(12) if blend.goes_on_at(block)] == [6, 7, 8]


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (3, 3)])
def test_the_shorter_prompt_ends_in_zeros(old: int, new: int) -> None:
    mixed = between(OLD[:, :old], NEW[:, :new], 0.25)
    assert mixed.shape[1] == max(old, new)
    for row in range(4):
        parts = (0.75 * OLD[0, row] if row < old else 0) + (0.25 * NEW[0, row] if row < new else 0)
        if row < max(old, new):
            torch.testing.assert_close(mixed[0, row], parts)


def test_the_first_prompt_comes_from_nowhere() -> None:
    """And a second one before any block was made replaces it."""
    first = Blend(None, OLD, first=0, blocks=3)
    assert first.at(0) is first.at(1) is OLD
    assert first.at(-1) is None
    assert not any(first.goes_on_at(block) for block in range(5))


class Stream:
    """A rollout, and beside it one without any blend that is told every block's embeddings."""

    def __init__(self, execution: Execution, recache: str = "blend(2.25)", **stream: object) -> None:
        model = tiny_transformer()
        self.blended = new_rollout(model, StreamConfig(recache=recache, **stream), SMALL, execution=execution)
        self.told = new_rollout(model, StreamConfig(recache="none", **stream), SMALL, execution="plain")
        self.noise = DrawnNoise(0, self.told.shape)

    def equal_block(self, expected: Tensor) -> bool:
        """Makes the next block of both, the second under given embeddings."""
        self.told.switch(expected)
        return relative_error(self.blended.denoise_block(self.noise), self.told.denoise_block(self.noise)) <= 1e-4


THIRD, TWO_THIRDS = 1 / 3, 2 / 3


@both
@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("block", [1, 4, 6])
@pytest.mark.parametrize(("old", "new"), [(4, 4), (1, 4), (4, 2)])
def test_every_block_of_the_way_has_its_embeddings(
    old: int, new: int, block: int, rope: str, execution: Execution
) -> None:
    """Three blocks; in each the cross-attention's keys and values, and nothing else, are computed anew."""
    stream = Stream(execution, rope=rope)
    before, after = OLD[:, :old], NEW[:, :new]
    stream.blended.switch(before)
    for _ in range(block):
        assert stream.equal_block(before)
    stream.blended.switch(after)
    for part in (THIRD, TWO_THIRDS):
        assert stream.equal_block(between(before, after, part))
    for _ in range(3):
        assert stream.equal_block(after)


@both
def test_a_prompt_on_the_way_begins_where_the_way_has_come_to(execution: Execution) -> None:
    stream, last = Stream(execution), embeds(2)
    stream.blended.switch(OLD)
    assert stream.equal_block(OLD)
    stream.blended.switch(NEW)
    assert stream.equal_block(between(OLD, NEW, THIRD))
    stream.blended.switch(last)
    here = between(OLD, NEW, THIRD)
    assert stream.equal_block(between(here, last, THIRD))
    assert stream.equal_block(between(here, last, TWO_THIRDS))
    assert stream.equal_block(last)


def test_of_two_prompts_at_one_block_the_later_alone_counts() -> None:
    """What was never in force is no place to begin at."""
    stream = Stream("static")
    stream.blended.switch(OLD)
    assert stream.equal_block(OLD)
    stream.blended.switch(embeds(2))
    stream.blended.switch(NEW)
    assert stream.equal_block(between(OLD, NEW, THIRD))


@both
def test_a_short_way_is_a_switch_without_recache(execution: Execution) -> None:
    stream = Stream(execution, "blend(0.1)")
    stream.blended.switch(OLD)
    assert stream.equal_block(OLD)
    stream.blended.switch(NEW)
    assert stream.equal_block(NEW)


def rollout(recache: str) -> Rollout:
    history = LatentHistory(torch.randn(4, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0)))
    return new_rollout(tiny_transformer(), StreamConfig(recache=recache), SMALL, history, execution="static")


def test_a_resumed_stream_does_not_blend() -> None:
    """The denoiser that knew the way is gone: the prompt in force is in force at once. The next switch blends again."""
    blended, full = rollout("blend(2.25)"), rollout("full")
    noise = DrawnNoise(0, full.shape)
    for each in (blended, full):
        each.resume(9, NEW)
    for _ in range(3):
        assert torch.equal(blended.denoise_block(noise), full.denoise_block(noise))
    for each in (blended, full):
        each.switch(OLD)
    assert not torch.equal(blended.denoise_block(noise), full.denoise_block(noise))


def test_a_new_stream_has_no_prompt_to_come_from() -> None:
    """The scratch stream of the warm-up leaves nothing."""
    fresh, used = rollout("blend(2.25)"), rollout("blend(2.25)")
    noise = DrawnNoise(0, fresh.shape)
    used.switch(OLD)
    used.denoise_block(noise)
    used.begin(LatentHistory(torch.zeros(4, 3, 16, 4, 4)))
    for each in (fresh, used):
        each.switch(NEW)
    assert torch.equal(fresh.denoise_block(noise), used.denoise_block(noise))
