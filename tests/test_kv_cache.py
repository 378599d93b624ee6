"""Which block lies where: slots, positions and what a pass sees."""

import pytest
import torch

from configs.schema import StreamConfig
from workers.models.kv_cache import CacheLayout, KVCache
from workers.models.rope import rotate, rotation


def layout(**changes: object) -> CacheLayout:
    return CacheLayout(StreamConfig(**{"rope": "relative", **changes}))


def test_sink_stays_and_the_ring_turns() -> None:
    assert [layout().slot(block) for block in range(9)] == [0, 1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("block", range(12))
def test_a_block_is_never_written_over_one_that_it_sees(block: int) -> None:
    """The slot a block takes is free or that of the block that has just left the window."""
    plan = layout()
    seen = [0, *range(max(1, block - 2), block)] if block else []
    assert plan.slot(block) not in {plan.slot(other) for other in seen}


def test_relative_sink_stands_right_before_the_window() -> None:
    """At 3b - 9 for denoising block b, at 3b - 12 for a recache."""
    plan = layout()
    assert [plan.denoise(block, 0).sink for block in (4, 5, 100)] == [3, 6, 291]
    assert [plan.recache(block, 0)[0].sink for block in (5, 100)] == [3, 288]


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_positions_count_from_where_the_stream_begins(rope: str) -> None:
    """No output tells: attention sees distances alone."""
    plan = layout(rope=rope, first_position=3_000_000)
    assert plan.denoise(5, 0).frames == (3_000_015, 3_000_016, 3_000_017)
    assert plan.recache(3, 0)[0].frames == tuple(range(3_000_000, 3_000_009))


def test_absolute_sink_is_never_moved() -> None:
    plan = layout(rope="absolute")
    assert all(plan.denoise(block, 0).sink is None for block in range(20))


def test_recache_takes_what_the_window_holds() -> None:
    """All blocks until the window has slid; then the ring alone, or everything with a new sink."""
    assert layout().recache(3, 0)[1] == range(3)
    assert layout().recache(4, 0)[1] == range(4)
    assert layout().recache(5, 0)[1] == range(2, 5)
    plan, blocks, anchor = layout(global_sink=False).recache(7, 0)
    assert (blocks, anchor, plan.slots[0]) == (range(3, 7), 3, 0)


def test_a_recent_recache_takes_the_newest_blocks_and_sees_all() -> None:
    """What is not recomputed keeps its place: slots, positions and the sink are those of the whole recache."""
    whole, recent = layout(), layout(recache="recent(6)")
    for block in (3, 4, 5, 50):
        plan, blocks, anchor = recent.recache(block, 0)
        full, all_blocks, _ = whole.recache(block, 0)
        assert (list(blocks), anchor) == (list(all_blocks)[-2:], 0)
        assert plan.slots == tuple(recent.slot(b) for b in blocks)
        assert (plan.visible, plan.sink, plan.frames) == (full.visible, full.sink, full.frames[-6:])
    assert recent.recache(2, 0) == whole.recache(2, 0)


def test_without_recache_there_is_no_plan() -> None:
    assert all(layout(recache="none").recache(block, 0) is None for block in (1, 4, 9))


def test_a_restart_rebuilds_everything_whatever_the_recache() -> None:
    assert layout(recache="none").reanchor(9) == layout().reanchor(9)


def test_a_pass_sees_views_of_whole_slots() -> None:
    stream = StreamConfig(rope="relative")
    cache = KVCache(
        stream, layers=1, heads=2, head_dim=12, frame_tokens=4, device=torch.device("cpu"), dtype=torch.float32
    )
    plan = CacheLayout(stream).denoise(1, 0)
    k, v = cache.visible(0, plan)
    assert k.shape == (1, 2 * 12, 2, 12)
    assert k.data_ptr() == cache.k.data_ptr()
    assert v.data_ptr() == cache.v.data_ptr()


def test_the_sink_is_rotated_from_its_raw_keys() -> None:
    """Moving it twice is the same as moving it once: nothing adds up over hours."""
    stream = StreamConfig(rope="relative")
    cache = KVCache(
        stream, layers=1, heads=2, head_dim=12, frame_tokens=1, device=torch.device("cpu"), dtype=torch.float32
    )
    cache.sink_k.normal_(generator=torch.Generator().manual_seed(0))
    there = rotation(range(30, 33), 1, 1, 12, torch.device("cpu"))
    cache.place_sink(3, rotation(range(3, 6), 1, 1, 12, torch.device("cpu")))
    cache.place_sink(30, there)
    assert torch.equal(cache.k[:, :, :3], rotate(cache.sink_k, there))
    assert cache.sink_at == 30
