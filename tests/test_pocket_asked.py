"""What a prompt asks for, read from its words, and what a rendered video shows of it."""

import numpy as np
import torch

from pocket.asked import Asked, asked_for, outcomes
from pocket.captions import Scene, draw_scene, phrase
from pocket.clips import Story, draw_frames, frames_of
from pocket.world import Start


def test_every_phrasing_is_read_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = draw_scene(rng)
        text = phrase(scene, rng)
        asked = asked_for(text)
        assert (asked.count, asked.colour, asked.shape) == (scene.count, scene.colour, scene.shape), text
        assert asked.ground in (scene.ground, None if scene.ground == "grey" else scene.ground), text
        assert asked.motion in (scene.motion, None if scene.motion == "still" else scene.motion), text


def test_what_is_not_named_is_not_asked_for() -> None:
    assert asked_for("a fox in the snow") == Asked(None, None, None, None, None)
    assert asked_for("Two red boxes on a striped dark blue ground.") == Asked(2, "red", "square", "dark blue", None)


def test_a_rendered_video_shows_what_its_own_prompts_ask_for() -> None:
    first = Scene(1, "large", "red", "circle", "right", "black")
    second = Scene(1, "large", "green", "circle", "right", "black")
    story = Story(Start(80, 48), first, "", second, "", 6)
    video = draw_frames(story, frames_of(14), torch.device("cpu")).numpy()
    before, after = "a large red circle moving right on a black ground", "a green circle moving right"
    right = outcomes(video, [(0, before), (6, after)])
    assert {name: (min(values), len(values)) for name, values in right.items()} == {
        "count": (1.0, 11),
        "colour": (1.0, 11),
        "shape": (1.0, 11),
        "ground": (1.0, 5),
        "motion": (1.0, 2),
    }
    wrong = outcomes(video, [(0, before), (6, "a blue star moving left")])
    assert (sum(wrong["colour"]), sum(wrong["shape"]), sum(wrong["motion"])) == (5, 5, 1)
