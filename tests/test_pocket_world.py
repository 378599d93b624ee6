"""What the embedded model learns from: captions, motion, and the noise that says where objects start."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.load import load_config
from pocket.captions import MOTIONS, Scene, draw_scene, phrase
from pocket.chance import coupled, place
from pocket.clips import CHANGES, FIRST, LATER, SLID, changed, draw_story, frames_of
from pocket.pool import MOST_TOKENS, draw_stories, token_ids
from pocket.world import HEIGHT, WIDTH, Start, tracks
from workers.models.kv_cache import CacheLayout
from workers.models.prompt_text import clean, pocket_tokenizer

SCENE = Scene(1, "medium", "red", "circle", "right")


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """On the torus, in pixels."""
    size = np.array([WIDTH, HEIGHT])
    return np.linalg.norm((one - other + size / 2) % size - size / 2, axis=-1)


def test_one_combination_in_ten_is_held_out() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([draw_scene(rng).held_out for _ in range(4000)])
    assert 0.07 < share < 0.13
    assert not any(draw_scene(rng, held_out=False).held_out for _ in range(50))
    assert all(draw_scene(rng, held_out=True).held_out for _ in range(50))


def test_what_is_held_out_does_not_depend_on_ground_and_size() -> None:
    """Else a held-out caption could be known by its twin on another ground."""
    assert {replace(SCENE, ground=g, size=s).held_out for g in ("black", "grey") for s in ("small", "large")} == {
        SCENE.held_out
    }


def test_captions_are_known_to_the_tokenizer_and_short() -> None:
    rng, tokenizer = np.random.default_rng(1), pocket_tokenizer()
    captions = [phrase(draw_scene(rng), rng) for _ in range(500)]
    assert len(set(captions)) > 480
    assert max(len(tokenizer.ids(clean(caption))) for caption in captions) <= MOST_TOKENS
    assert token_ids(captions[:3]).shape == (3, MOST_TOKENS)


@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_never_jump(motion: str) -> None:
    """Whoever knows the last frames knows the next ones, at a change of scene too."""
    scenes = [SCENE] * 20 + [replace(SCENE, motion=motion)]
    track = tracks(scenes, Start(50, 40), 90)[:, 0]
    assert distance(track[1:, :2], track[:-1, :2]).max() < 6
    assert np.abs(np.diff(track[:, 2])).max() <= 3.1


def test_a_stream_is_as_long_as_its_blocks() -> None:
    assert frames_of(1) == FIRST and frames_of(14) == FIRST + 13 * LATER == 165
    story = draw_story(np.random.default_rng(2), 7, switching=1.0)
    assert 1 <= story.block < 6
    assert story.scenes().index(story.second) == frames_of(story.block) or story.first == story.second


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_changes_one_thing(what: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scene = draw_scene(rng)
        other = changed(scene, what, rng)
        allowed = {what, "texture"} if what == "ground" else {what, "size"} if what == "motion" else {what}
        differs = {name for name, value in vars(other).items() if value != getattr(scene, name)}
        assert what in differs and differs <= allowed


def test_stories_are_the_same_whatever_the_number_of_processes() -> None:
    one, two = (draw_stories(6, 4, seed=5, switching=0.5, workers=workers) for workers in (1, 2))
    assert [story for story, _ in one] == [story for story, _ in two]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))


def test_scenes_change_before_and_after_the_window_has_slid() -> None:
    """The two recaches of the runtime differ: only the later one keeps the sink of the scene before."""
    rng = np.random.default_rng(0)
    blocks = [draw_story(rng, SLID + 3, switching=1.0).block for _ in range(400)]
    assert set(blocks) == set(range(1, SLID + 2))
    assert 0.5 < np.mean([block >= SLID for block in blocks]) < 0.8
    stream = load_config("pocket").stream
    kept = {block for block in range(1, 9) if 0 not in CacheLayout(stream).recache(block, 0)[0].slots}
    assert min(kept) == SLID


def test_noise_says_the_start_it_was_coupled_with() -> None:
    torch.manual_seed(0)
    noise = torch.randn(500, 3, 16, 12, 20)
    start = torch.rand(500, 2) * torch.tensor([126.0, 62.0]) + 17
    assert (place(coupled(noise, start)) - start).abs().max() < 0.1
    # Noise that says a start already keeps its channels but the two means, which were exact before.
    assert (coupled(noise, place(noise)) - noise).abs().mean() < 1e-3


def test_coupled_noise_is_normal() -> None:
    """Over uniform starts, so that a stream's plain noise looks like what training saw."""
    torch.manual_seed(1)
    free = place(torch.randn(4000, 3, 16, 12, 20))
    assert (free.mean(dim=0) - torch.tensor([80.0, 48.0])).abs().max() < 2
    start = torch.rand(4000, 2) * torch.tensor([128.0, 64.0]) + 16
    made = coupled(torch.randn(4000, 3, 16, 12, 20), start)
    first = made[:, :, :3]
    assert first.mean().abs() < 0.005 and abs(first.std() - 1) < 0.005
    assert first.mean(dim=0).abs().max() < 0.08
    assert (first.std(dim=0) - 1).abs().max() < 0.06


def test_a_start_at_the_edge_is_refused() -> None:
    with pytest.raises(ValueError, match="16 pixels"):
        coupled(torch.randn(1, 3, 16, 12, 20), torch.tensor([[8.0, 40.0]]))
