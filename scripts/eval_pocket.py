"""Judges the embedded model by what its videos show.

    .venv/bin/python scripts/eval_pocket.py --quick --seed 3
    .venv/bin/python scripts/eval_pocket.py --report out/pocket.json
    .venv/bin/python scripts/eval_pocket.py --ablations

Prints the judge's own accuracy on rendered videos first. Exits with 1 where a score misses its bar. Videos come from
the whole runtime, by `orchestrator generate`; those of ablations from its model alone.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from configs.load import load_config
from pocket.ablations import ablations
from pocket.evaluation import (
    AFTER_SWITCH,
    MOTION_BLOCKS,
    SOON,
    SWITCHED_AT,
    Scores,
    drift,
    fresh_streams,
    judge_accuracy,
    switches,
    vae_quality,
)
from pocket.videos import Bare, Runtime

LEAST = {
    "judge": 0.99,
    "presence": 0.99,
    "colour": 0.95,
    "shape": 0.85,
    "count": 0.90,
    "motion": 0.85,
    "switched within 2 blocks": 0.95,
    "kept": 0.95,
    "VAE plain dB": 32.0,
    "VAE textured dB": 28.0,
}
WITHIN = {"sharpness, last 10 s / first": 0.10, "change at block edges / elsewhere": 0.05}
"""How far from 1."""
WHOLE = ((100, 60, 10), 80, SWITCHED_AT, AFTER_SWITCH)
"""Streams, switches and long streams; clips of the VAE; where prompts are switched; blocks looked at from there."""
QUICK = ((14, 20, 0), 12, 4 * SWITCHED_AT[:1] + SWITCHED_AT[1:], SOON + MOTION_BLOCKS)
"""Four switches of twenty come late, and are looked at for as few blocks as can tell a motion in time."""
DRIFT = 0.05
"""How much less a score of the last 10 s may be than that of the first."""


def missed(scores: Scores) -> dict[str, str]:
    """What misses its bar, by name, with the bar."""
    out = {n: f">= {bar:g}" for n, bar in LEAST.items() if n in scores.values and scores.mean(n) < bar}
    for name, bar in WITHIN.items():
        if name in scores.values and abs(scores.mean(name) - 1) > bar:
            out[name] = f"within {bar:g} of 1"
    for name in scores.values:
        first = name.replace("last 10 s, ", "first 10 s, ")
        if first != name and scores.mean(name) < scores.mean(first) - DRIFT:
            out[name] = f">= {scores.mean(first) - DRIFT:.3f}"
    return out


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fresh sample, in ten minutes on two cores")
    parser.add_argument("--ablations", action="store_true", help="the table of docs/pocket.md instead")
    parser.add_argument("--seed", type=int, default=0, help="of captions and streams")
    parser.add_argument("--captions", type=int, help="streams of 10 s; else 100, with --quick 14")
    parser.add_argument("--switches", type=int, help="prompt switches; else 60, with --quick 20")
    parser.add_argument("--drifts", type=int, help="streams of 3 minutes; else 10, with --quick none")
    parser.add_argument("--bare", action="store_true", help="without processes and ffmpeg: the same frames, sooner")
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console, began = Console(), time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)  # noqa: T201

    if given.ablations:
        console.print(ablations(given.config, given.set, given.seed, say))
        return 0
    defaults, clips, places, looked_at = QUICK if given.quick else WHOLE
    asked = (given.captions, given.switches, given.drifts)
    captions, changes, drifts = (d if a is None else a for a, d in zip(asked, defaults, strict=True))
    scores = Scores()
    judge_accuracy(scores, given.seed, 20 if given.quick else 100, say)
    console.print(table(scores, "The judge, on rendered videos"))
    maker = (Bare if given.bare else Runtime)(given.config, tuple(given.set))
    fresh_streams(scores, maker.make, given.seed, captions, say, at_once=maker.at_once)
    switches(scores, maker.make, given.seed, changes, say, places, maker.at_once, looked_at)
    drift(scores, maker.make, given.seed, drifts, say, at_once=maker.at_once)
    vae_quality(scores, load_config(given.config, given.set), given.seed, clips, say)
    console.print(table(scores, f"{given.config}, seed {given.seed}, {time.monotonic() - began:.0f} s"))
    if given.report:
        given.report.write_text(json.dumps(scores.summary(), indent=2) + "\n", encoding="utf-8")
    return int(bool(missed(scores)))


def table(scores: Scores, title: str) -> Table:
    """All scores, with what misses its bar."""
    out, misses = Table("score", "value", "of", "", title=title), missed(scores)
    for name, outcomes in scores.values.items():
        out.add_row(
            name, f"{scores.mean(name):.3f}", str(len(outcomes)), f"MISSED {misses[name]}" if name in misses else ""
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
