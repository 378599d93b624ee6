"""The denoiser stage: when a prompt takes effect, what an aborted block becomes, when latents are handed over."""

import threading
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from stage_case import DenoiserCase, MadeBlock, MemoryRing, ignore

from configs.rings import ring_specs
from configs.schema import Execution
from ipc.messages import BlockDone, ExpectPrompt, FramesReady, Message, PromptApplied
from workers.latents_source import HostSource
from workers.models.denoise import Rollout
from workers.stage import Progress, run_stage
from workers.vae_decoder import VaeDecoderStage

both = pytest.mark.parametrize("execution", ["plain", "static"])
ABORT = "stream.switch=abort"
STEPS = 4
"""Of the default schedule; a block's fifth pass is the clean one."""


class Arrivals:
    """A stream into which prompts come after certain passes.

    Args:
        when: versions by block and pass, counted from 1; pass 0 is before the block begins.

    Attributes:
        passes: how many each block took.
    """

    def __init__(self, when: dict[tuple[int, int], int], *overrides: str) -> None:
        self._when = dict(when)
        self._block = self._begun = 0
        self.case = DenoiserCase(*overrides, on_pass=self._arrive)
        self.case.prompt(0)
        self.passes: list[int] = []

    def _arrive(self) -> None:
        version = self._when.pop((self._block, self.case.passes - self._begun), None)
        if version is not None:
            self.case.prompt(version)

    def stream(self, blocks: int) -> list[MadeBlock]:
        made = []
        for self._block in range(blocks):
            self._begun = self.case.passes
            self._arrive()
            made.append(self.case.block())
            self.passes.append(self.case.passes - self._begun)
        assert not self._when, "some never arrived"
        return made


def equal(one: list[MadeBlock], other: list[MadeBlock]) -> bool:
    """The same blocks under the same versions, to the bit."""
    return all(
        (a.block, a.version, a.fresh) == (b.block, b.version, b.fresh) and torch.equal(a.latents, b.latents)
        for a, b in zip(one, other, strict=True)
    )


@both
@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("recache", ["full", "recent(3)", "recent(6)", "none", "blend(1.5)"])
def test_an_aborted_block_is_that_of_a_switch_at_its_boundary(recache: str, rope: str, execution: Execution) -> None:
    """While the window fills, when it first slides and later; so are all blocks that follow."""
    common = (f"stream.recache={recache}", f"stream.rope={rope}", f"execution.denoiser={execution}")
    for block, step in ((1, 1), (3, 2), (4, 3), (5, 1), (6, 2)):
        aborted = Arrivals({(block, step): 1}, *common, ABORT)
        boundary = Arrivals({(block, 0): 1}, *common)
        assert equal(aborted.stream(block + 4), boundary.stream(block + 4))
        assert aborted.case.applied == boundary.case.applied == [(0, 0), (1, block)]
        assert torch.equal(aborted.case.history, boundary.case.history)
        assert aborted.passes[block] == boundary.passes[block] + step


@pytest.mark.parametrize(
    "geometry",
    [{"sink": 0}, {"sink": 6, "window": 15}, {"global_sink": "false"}, {"window": 9}, {"frames_per_block": 1}],
    ids=str,
)
@pytest.mark.parametrize("kept", ["kv=model", "kv=int8", "kv=fp8", "attend=fp8"])
def test_an_aborted_block_leaves_nothing_in_any_geometry(geometry: dict[str, object], kept: str) -> None:
    """`recent` is the recache that sees what the aborted steps wrote over."""
    stream = {"recache": "recent(3)", **geometry}
    common = (*(f"stream.{key}={value}" for key, value in stream.items()), f"execution.{kept}")
    for block in (2, 5, 7):
        aborted, boundary = Arrivals({(block, 2): 1}, *common, ABORT), Arrivals({(block, 0): 1}, *common)
        assert equal(aborted.stream(block + 3), boundary.stream(block + 3))


def test_by_default_a_prompt_waits_for_the_boundary() -> None:
    stream = Arrivals({(5, 1): 1})
    stream.stream(7)
    assert stream.case.applied == [(0, 0), (1, 6)]
    assert stream.passes[5] == STEPS + 1


@pytest.mark.parametrize("late", [STEPS, STEPS + 1])
def test_latents_that_are_made_are_never_aborted(late: int) -> None:
    """After the last step, and in the clean pass, whose latents are already handed over."""
    stream = Arrivals({(5, late): 1}, ABORT)
    made = stream.stream(7)
    assert [block.version for block in made] == [0] * 6 + [1]
    assert stream.passes[5] == STEPS + 1


def test_a_flood_of_prompts_starves_nobody() -> None:
    """A prompt after every pass: a block is begun anew at most once, and each version that was applied is seen."""
    case = DenoiserCase(ABORT, on_pass=lambda: flood())
    versions = iter(range(10**6))

    def flood() -> None:
        if case.takes_prompt:
            case.prompt(next(versions))

    flood()
    made, passes = [], []
    for _ in range(8):
        before = case.passes
        made.append(case.block())
        passes.append(case.passes - before)
    recache = 1
    assert max(passes) <= (STEPS - 1) + recache + STEPS + 1
    assert [block.block for block in made] == list(range(8))
    assert case.applied == [(block.version, block.block) for block in made]


def test_the_block_after_a_flood_can_be_aborted_again() -> None:
    """Version 1 aborts block 2, version 2 comes while that is begun anew and waits, version 3 aborts block 4."""
    stream = Arrivals({(2, 1): 1, (2, 4): 2, (4, 3): 3}, ABORT)
    made = stream.stream(6)
    assert stream.case.applied == [(0, 0), (1, 2), (2, 3), (3, 4)]
    assert [block.version for block in made] == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize(("at", "applied"), [(9, 9), (6, 6), (5, 5), (2, 5)])
def test_a_prompt_for_a_later_block_aborts_nothing(at: int, applied: int) -> None:
    """One whose block has come is as good as one without a block."""
    case = DenoiserCase(ABORT, on_pass=lambda: case.passes == 5 * (STEPS + 1) + 2 and case.prompt(1, at))
    case.prompt(0)
    for _ in range(10):
        case.block()
    assert case.applied == [(0, 0), (1, applied)]


def test_a_block_that_waited_for_its_prompt_keeps_it() -> None:
    """What is scheduled gives the same video live and offline: another prompt does not take its block."""
    case = DenoiserCase(ABORT, on_pass=lambda: case.passes == STEPS + 2 and case.prompt(2))
    case.stage.receive(ExpectPrompt(version=1, at=1))
    case.prompt(0)
    case.block()
    assert not case.stage.process()
    case.prompt(1, at=1)
    assert [case.block().version for _ in range(2)] == [1, 2]
    assert case.applied == [(0, 0), (1, 1), (2, 2)]


def test_a_blend_is_applied_once() -> None:
    """At its first block; a prompt that comes on the way begins where the way has come to."""
    stream = Arrivals({(3, 0): 1, (5, 0): 2}, "stream.recache=blend(3)")
    made = stream.stream(12)
    assert stream.case.applied == [(0, 0), (1, 3), (2, 5)]
    assert [block.version for block in made] == [0] * 3 + [1] * 2 + [2] * 7
    assert stream.passes == [STEPS + 1] * 12, "no recache"


def test_a_restarted_denoiser_does_not_blend() -> None:
    """It goes on under the prompt in force, as with any recache."""
    made = []
    for recache in ("full", "blend(3)"):
        case = DenoiserCase(f"stream.recache={recache}", begin=9)
        case.history.normal_(generator=torch.Generator().manual_seed(0))
        case.prompt(4, at=9)
        made.append([case.block() for _ in range(3)])
    assert equal(*made)
    assert made[0][0].fresh


class Idle:
    """The inbox of a stage that is told nothing, only woken."""

    def __init__(self) -> None:
        self.woken = threading.Event()

    def drain(self) -> Iterator[Message]:
        return iter(())

    def wait(self, timeout_s: float) -> None:
        self.woken.wait(timeout_s)
        self.woken.clear()


def test_decoding_begins_before_the_clean_pass_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each clean pass waits until the VAE decoder, in a thread of its own, has given the first frames of that block."""
    inbox, events = Idle(), []
    case = DenoiserCase(to_decoder=lambda message: inbox.woken.set())
    frames = MemoryRing(ring_specs(case.config)["frames"])
    output = frames.reader(FramesReady)
    first_frames = threading.Semaphore(0)

    def play(message: Message) -> None:
        taken, ready = output.take()
        output.release(taken)
        if ready.first_frame == case.config.stream.first_frame(ready.block):
            events.append(f"first frames of block {ready.block}")
            first_frames.release()

    decoder = VaeDecoderStage(
        case.config,
        latents=case.decoder,
        latents_source=HostSource(case.latents.slots),
        frames=frames.writer(play),
        frames_slots=frames.slots,
        to_daemon=ignore,
    )
    decoder.load()
    remember = Rollout.remember

    def waiting(rollout: Rollout) -> None:
        block = rollout.block
        assert first_frames.acquire(timeout=20), "the latents were not there to decode"
        remember(rollout)
        events.append(f"clean pass of block {block}")

    monkeypatch.setattr(Rollout, "remember", waiting)
    stopped = threading.Event()
    thread = threading.Thread(target=run_stage, args=(decoder, inbox, Progress(), stopped))
    thread.start()
    try:
        case.prompt(0)
        for _ in range(3):
            assert case.stage.process()
    finally:
        stopped.set()
        inbox.woken.set()
        thread.join()
    assert events == [f"{what} of block {block}" for block in range(3) for what in ("first frames", "clean pass")]
    assert [said.block for said in case.said if isinstance(said, BlockDone)] == [0, 1, 2]


def test_all_stamps_are_of_the_stages_clock() -> None:
    """A recache lies within its block, on the axis of the clock that was given."""
    ticks = count(1000)
    case = DenoiserCase(clock=lambda: next(ticks))
    for version in range(2):
        case.prompt(version)
        case.block()
    blocks = [said for said in case.said if isinstance(said, BlockDone)]
    recaches = [said for said in case.said if isinstance(said, PromptApplied)]
    for block, recache in zip(blocks, recaches, strict=True):
        assert 1000 <= block.began_ns < recache.began_ns < recache.ended_ns < block.ended_ns < 1100
