"""How much of everything training takes, on a GPU and on two CPU cores."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """One stage: it ends after so many steps or minutes, whichever comes first."""

    steps: int
    minutes: float
    batch: int
    rate: float


@dataclass(frozen=True)
class Recipe:
    """All stages.

    Attributes:
        pictures: clips that the VAE learns from; `picture_frames` of each pass at once.
        openings: stories of one block, from which it learns where objects start, `opening_batch` of them a step.
        decoder_clips: clips that its decoder learns to be calm on.
        clips, blocks: stories that the transformer learns from, and their length; `teacher_blocks` of it under teacher
            forcing.
        long_clips, long_blocks: the same for the adapter.
        look: steps between two looks at held-out stories.
    """

    pictures: int
    picture_frames: int
    vae: Phase
    decoder_clips: int
    decoder: Phase
    openings: int
    opening_batch: int
    clips: int
    blocks: int
    teacher_blocks: int
    teacher: Phase
    self_forcing: Phase
    long_clips: int
    long_blocks: int
    adapter: Phase
    look: int


GPU = Recipe(
    pictures=3000,
    picture_frames=13,
    vae=Phase(20_000, 7.0, 12, 6e-4),
    decoder_clips=600,
    decoder=Phase(20_000, 6.0, 32, 1e-4),
    openings=20_000,
    opening_batch=256,
    clips=10_000,
    blocks=8,
    teacher_blocks=6,
    teacher=Phase(40_000, 14.0, 128, 8e-4),
    self_forcing=Phase(20_000, 14.0, 320, 3e-4),
    long_clips=1500,
    long_blocks=12,
    adapter=Phase(2_000, 4.0, 96, 1.5e-4),
    look=250,
)
CPU = Recipe(
    pictures=400,
    picture_frames=9,
    vae=Phase(5_000, 120.0, 4, 6e-4),
    decoder_clips=240,
    decoder=Phase(4_000, 30.0, 4, 2e-4),
    openings=4_000,
    opening_batch=32,
    clips=1_200,
    blocks=8,
    teacher_blocks=6,
    teacher=Phase(20_000, 240.0, 8, 8e-4),
    self_forcing=Phase(10_000, 150.0, 16, 3e-4),
    long_clips=200,
    long_blocks=10,
    adapter=Phase(1_000, 40.0, 8, 5e-4),
    look=500,
)
SMOKE = Recipe(
    pictures=4,
    picture_frames=5,
    vae=Phase(4, 1.0, 2, 6e-4),
    decoder_clips=4,
    decoder=Phase(2, 1.0, 1, 2e-4),
    openings=8,
    opening_batch=4,
    clips=8,
    blocks=3,
    teacher_blocks=3,
    teacher=Phase(4, 1.0, 4, 8e-4),
    self_forcing=Phase(2, 1.0, 2, 3e-4),
    long_clips=4,
    long_blocks=4,
    adapter=Phase(2, 1.0, 2, 5e-4),
    look=2,
)
"""Every stage for a few steps, to see that all of it runs."""
RECIPES = {"gpu": GPU, "cpu": CPU, "smoke": SMOKE}


def timed(recipe: Recipe, minutes: float | None) -> Recipe:
    """A recipe whose every stage takes so many minutes; the same one for None."""
    if minutes is None:
        return recipe
    phases = {name: value for name, value in vars(recipe).items() if isinstance(value, Phase)}
    return replace(recipe, **{name: replace(phase, minutes=minutes) for name, phase in phases.items()})
