"""What each part of the runtime's way to generate is worth, on one set of weights: one row a change of settings.

Streams of one prompt, prompt switches and long streams, made by the model alone in this process, all rows with the same
prompts and seeds.
"""

from collections.abc import Sequence

from rich.table import Table

from pocket.evaluation import Progress, Scores, drift, fresh_streams, switches
from pocket.videos import Bare

ROWS: dict[str, tuple[str, ...]] = {
    "as shipped: window 12, sink 3, recache of 9, 4 steps": (),
    "without sink (window 12)": ("stream.sink=0",),
    "without sink (window 9)": ("stream.sink=0", "stream.window=9"),
    "window 6": ("stream.window=6",),
    "window 9": ("stream.window=9",),
    "without recache": ("stream.recache=none",),
    "recache of 3 latents": ("stream.recache=recent(3)",),
    "recache of 6 latents": ("stream.recache=recent(6)",),
    "recache of 12 latents, the sink's replaced": ("stream.global_sink=false",),
    "3 steps": ("stream.steps=[1000,667,333]",),
    "2 steps": ("stream.steps=[1000,500]",),
    "1 step": ("stream.steps=[1000]",),
}
STREAMS, SWITCHES, LONG_STREAMS = 16, 16, 4
MINUTE = 81
"""Blocks of a stream of one minute."""
COLUMNS = (
    *("presence", "colour", "shape", "count", "motion", "switched within 2 blocks", "kept"),
    *("last 10 s, shape", "sharpness, last 10 s / first"),
)


def ablations(config: str, settings: Sequence[str], seed: int, say: Progress) -> Table:
    """One row for each change, one column for each score."""
    table = Table("", *COLUMNS, "ms a block", title=f"{config}, seed {seed}")
    for name, changes in ROWS.items():
        say(name)
        maker, scores = Bare(config, (*settings, *changes)), Scores()
        fresh_streams(scores, maker.make, seed, STREAMS, say)
        switches(scores, maker.make, seed, SWITCHES, say)
        drift(scores, maker.make, seed, LONG_STREAMS, say, MINUTE)
        table.add_row(name, *(f"{scores.mean(column):.2f}" for column in COLUMNS), f"{maker.median_block_ms:.0f}")
    return table
