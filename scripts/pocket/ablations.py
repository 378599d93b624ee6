"""What each part of the runtime's way to generate is worth, on one set of weights: one row a change of settings.

Streams of one prompt, prompt switches and long streams, made by the model alone in this process, all rows with the same
prompts and seeds.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
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
    "no recache, prompts blended over 1.5 s": ("stream.recache=blend(1.5)",),
    "recache of 12 latents, the sink's replaced": ("stream.global_sink=false",),
    "3 steps": ("stream.steps=[1000,667,333]",),
    "2 steps": ("stream.steps=[1000,500]",),
    "1 step": ("stream.steps=[1000]",),
}
STREAMS, SWITCHES, LONG_STREAMS = 8, 8, 2
MINUTE = 81
"""Blocks of a stream of one minute."""
COLUMNS = (
    *("presence", "colour", "shape", "count", "motion", "switched within 2 blocks", "kept"),
    *("last 10 s, shape", "sharpness, last 10 s / first"),
)


def ablations(config: str, settings: Sequence[str], seed: int, say: Progress, workers: int = 2) -> Table:
    """One row for each change, one column for each score; as many rows at a time as there are workers."""
    table = Table("", *COLUMNS, "ms a block", title=f"{config}, seed {seed}")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
        jobs = [(config, (*settings, *changes), seed) for changes in ROWS.values()]
        for name, row in zip(ROWS, processes.map(_row, jobs), strict=True):
            say(f"{name}: {', '.join(row)}")
            table.add_row(name, *row)
    return table


def _row(job: tuple[str, tuple[str, ...], int]) -> list[str]:
    config, settings, seed = job
    torch.set_num_threads(1)
    maker, scores = Bare(config, settings), Scores()
    fresh_streams(scores, maker.make, seed, STREAMS, _silent)
    switches(scores, maker.make, seed, SWITCHES, _silent)
    drift(scores, maker.make, seed, LONG_STREAMS, _silent, MINUTE)
    return [*(f"{scores.mean(column):.2f}" for column in COLUMNS), f"{maker.median_block_ms:.0f}"]


def _silent(line: str) -> None:
    """Rows at work beside each other say nothing of their streams."""
