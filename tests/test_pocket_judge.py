"""The judge sees what was rendered, and says so of what is wrong."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pocket.captions import COLOURS, GROUNDS, MOTIONS, SHAPES, TEXTURES, Scene, draw_scene
from pocket.clips import Story, draw_frames, frames_of
from pocket.evaluation import (
    Scores,
    by_block,
    changes_at_edges,
    first_shown,
    judge_accuracy,
    keeps,
    made,
    moves,
    sharpness,
)
from pocket.judge import ground, look
from pocket.world import Start

SCENE = Scene(1, "medium", "red", "circle", "right", "dark blue", "striped")


def video(scene: Scene, blocks: int = 6, then: Scene | None = None, at: int = 0) -> np.ndarray:
    story = Story(Start(60, 44), scene, "", then or scene, "", at)
    return draw_frames(story, frames_of(blocks), torch.device("cpu")).numpy()


def test_the_judge_is_right_about_rendered_videos() -> None:
    scores = Scores()
    judge_accuracy(scores, seed=11, clips=6, say=lambda line: None)
    assert scores.mean("judge") >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_colour_and_size(shape: str) -> None:
    for colour in COLOURS:
        for size in ("small", "medium", "large"):
            seen = look(video(replace(SCENE, shape=shape, colour=colour, size=size), 1)[4])
            assert [(thing.shape, thing.colour) for thing in seen] == [(shape, colour)], size


def test_every_ground() -> None:
    for name in GROUNDS:
        for texture in TEXTURES:
            assert ground(video(replace(SCENE, ground=name, texture=texture), 1)[0]).name == name


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_every_motion(motion: str, count: int) -> None:
    assert moves(by_block(video(replace(SCENE, motion=motion, count=count), 9))[1:]) == motion


def test_an_object_across_the_edge_is_one() -> None:
    frame = np.roll(video(SCENE, 1)[0], (0, 100), axis=(0, 1))
    assert [thing.shape for thing in look(frame)] == ["circle"]


def test_noise_and_an_empty_frame_are_no_objects() -> None:
    frame = np.full((96, 160, 3), 40, np.uint8)
    assert look(frame) == []
    frame[10:13, 10:13] = 255
    assert look(frame) == []


def test_a_switch_is_seen_in_its_block_and_what_is_lost_is_named() -> None:
    blue = replace(SCENE, colour="blue")
    seen = by_block(video(SCENE, 8, blue, at=4))
    assert first_shown("colour", blue, seen, 3) == 1
    assert first_shown("shape", replace(SCENE, shape="star"), seen, 4) is None
    assert all(keeps("colour", SCENE, blue, seen, 4).values())
    other = by_block(video(SCENE, 8, replace(blue, ground="dark red", shape="star"), at=4))
    assert [name for name, held in keeps("colour", SCENE, blue, other, 4).items() if not held] == ["shape", "ground"]


def test_flicker_at_blocks_and_blur_are_measured() -> None:
    still = video(replace(SCENE, motion="still"), 6).astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 2, still.shape)
    edges, elsewhere = changes_at_edges(still + noise)
    assert edges == pytest.approx(elsewhere, rel=0.05)
    seam = np.repeat(np.arange(6) % 2, [9, 12, 12, 12, 12, 12])[:, None, None, None] * 3
    edges, elsewhere = changes_at_edges(still + noise + seam)
    assert edges > 1.5 * elsewhere
    soft = (still + np.roll(still, 1, axis=2)) / 2
    assert sharpness(soft) < 0.8 * sharpness(still)


def test_a_wrong_video_scores_low() -> None:
    """What the bars are for: another colour, shape and number is not taken for the wanted one."""
    rng, scores = np.random.default_rng(4), Scores()
    for _ in range(3):
        scene = draw_scene(rng)
        wrong = replace(scene, colour="white" if scene.colour != "white" else "red", count=3 - scene.count)
        for block in by_block(video(wrong, 3))[1:]:
            scores.add("colour", block.colour == scene.colour)
            scores.add("count", block.count == scene.count)
    assert scores.mean("colour") == scores.mean("count") == 0


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_videos_come_in_order_however_many_are_made_at_once(at_once: int) -> None:
    lock, under_way, most_at_once = threading.Lock(), set[int](), 0

    def make(prompts: Sequence[str], blocks: int, seed: int, at: Sequence[int]) -> np.ndarray:
        nonlocal most_at_once
        with lock:
            under_way.add(seed)
            most_at_once = max(most_at_once, len(under_way))
        with lock:
            under_way.remove(seed)
        return np.full((1, 1, 1, 3), seed, np.uint8)

    videos = list(made(make, [([], 1, seed, ()) for seed in range(7)], at_once))
    assert [int(video.flat[0]) for video in videos] == list(range(7))
    assert most_at_once <= at_once
