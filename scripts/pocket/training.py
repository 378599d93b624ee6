"""One run of training: its folder, curves, steps against the clock, and what an interrupted stage goes on from.

Knows no network and no loss.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from configs.schema import RuntimeConfig
from pocket.masters import Masters
from pocket.pool import Pool
from pocket.recipe import Phase, Recipe


@dataclass
class Training:
    """Where training happens and what it is to make.

    Attributes:
        workers: processes that draw stories.
        compile: whether layers are compiled where shapes stay.
        state_every_s: between two states that an interrupted stage can go on from.
        console: where lines and progress bars go.
        pools: stories as latents, by name, once they are there.
    """

    folder: Path
    config: RuntimeConfig
    recipe: Recipe
    device: torch.device
    seed: int = 0
    workers: int = 1
    compile: bool = False
    state_every_s: float = 120.0
    console: Console = field(default_factory=lambda: Console(stderr=True))
    pools: dict[str, Pool] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        return self.folder / name

    def say(self, line: str) -> None:
        self.console.print(f"{datetime.now():%H:%M:%S} {line}", soft_wrap=True, markup=False, highlight=False)

    def log(self, stage: str, **numbers: float) -> None:
        """One line of a stage's curve."""
        with self.file(f"{stage}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")
        self.say(f"{stage}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))


def steps(run: Training, stage: str, phase: Phase, masters: Masters) -> Iterator[tuple[int, float]]:
    """Numbers of steps with the share of the stage that is done, from where an interrupted run stood."""
    path = run.file(f"{stage}.state.pt")
    spent = 0.0
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        masters.restore(state["masters"])
        spent = state["seconds"]
        run.say(f"{stage}: goes on at step {masters.steps}")
    began = saved = time.monotonic()
    columns = (TextColumn(stage), BarColumn(), TextColumn("{task.fields[number]} steps"), TimeRemainingColumn())
    with Progress(*columns, console=run.console, transient=True) as bar:
        task = bar.add_task(stage, total=1.0, number=masters.steps)
        while True:
            now = time.monotonic()
            seconds = spent + now - began
            progress = max(masters.steps / phase.steps, seconds / (60 * phase.minutes))
            if progress >= 1:
                break
            bar.update(task, completed=progress, number=masters.steps)
            yield masters.steps, progress
            if now - saved > run.state_every_s:
                saved = now
                torch.save({"masters": masters.state(), "seconds": seconds}, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
    run.log(stage + "_end", steps=masters.steps, seconds=seconds)
    path.unlink(missing_ok=True)
