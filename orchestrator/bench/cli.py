"""The benchmark's command line: `orchestrator bench ...`. What measures is imported by the commands that run it."""

import json
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ipc.errors import InputError
from orchestrator.options import ConfigOption, PresetOption, SetOption, help_without_command, settings_of

if TYPE_CHECKING:
    from orchestrator.bench.suite import Bench, Parts

app = typer.Typer(help="Measure the runtime as it is shipped.", rich_markup_mode="rich", add_completion=False)
QuickOption = Annotated[bool, typer.Option("--quick", help="Fewer blocks and rounds: minutes instead of hours.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for report.json, report.html and report.md.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the bootstrap and of pauses between prompts.")]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Also trace.json of all processes, and time on the device by operation.")
]
PaceOption = Annotated[Literal["free", "live"], typer.Option(help="As fast as frames come, or at the video's rate.")]
BlocksOption = Annotated[int | None, typer.Option(min=2, help="Blocks measured, of each round where there are some.")]
RoundsOption = Annotated[int | None, typer.Option(min=1, help="Rounds: A, B, then B, A, ...")]
OUT = Path("out/bench")
AXES = ("streams", "device", "placement", "window", "resolution", "steps")
ABLATIONS = ("off", "on", "geometry")


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure the runtime as it is shipped."""
    help_without_command(context)


@app.command()
def steady(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    profile: ProfileOption = False,
    pace: PaceOption = "free",
    blocks: BlocksOption = None,
    warmup: Annotated[int | None, typer.Option(min=1, help="Blocks before; they must fill the window.")] = None,
) -> None:
    """Latency of frames and blocks once the window is full: percentiles, jitter, late blocks, memory by worker."""
    bench = _bench("steady", config, preset, overrides, quick, out, seed, blocks=blocks, warmup=warmup)
    _run(bench, bench.steady(pace, profile))


@app.command()
def switch(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    pace: PaceOption = "live",
    switches: Annotated[int | None, typer.Option(min=1, help="Prompt switches of each way.")] = None,
) -> None:
    """From a prompt to its first frame, whole and in parts: hot and cold cache, every recache policy and cut."""
    bench = _bench("switch", config, preset, overrides, quick, out, seed, switches=switches)
    _run(bench, bench.switch(pace))


@app.command()
def throughput(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seconds: Annotated[float | None, typer.Option(min=1, help="How long.")] = None,
) -> None:
    """Frames a second over a minute, with load and clocks of processors and GPUs beside them."""
    bench = _bench("throughput", config, preset, overrides, quick, out, 0, seconds=seconds)
    _run(bench, bench.throughput())


@app.command()
def startup(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    rounds: RoundsOption = None,
) -> None:
    """From the command to the first frame, cold and warm."""
    bench = _bench("startup", config, preset, overrides, quick, out, 0, starts=rounds)
    _run(bench, bench.startup())


@app.command()
def scaling(
    axes: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(AXES)}; else all.")] = None,
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    blocks: BlocksOption = None,
) -> None:
    """Streams side by side, devices, placements, windows, resolutions, steps."""
    bench = _bench("scaling", config, preset, overrides, quick, out, 0, scaling_blocks=blocks)
    chosen = _chosen("axis", axes, AXES)
    _run(bench, bench.scaling(chosen))


@app.command()
def compare(
    sides: Annotated[list[str], typer.Argument(metavar="A B ...", help="Presets or configurations, changes behind.")],
    config: ConfigOption = "pocket",
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    rounds: RoundsOption = None,
    blocks: BlocksOption = None,
) -> None:
    """Presets or configurations in turn in one run, and how many times as fast each is as the first.

    [b]Example[/]

    orchestrator bench compare reference balanced "balanced stream.window=6"
    """
    bench = _bench("compare", config, None, overrides, quick, out, seed, rounds=rounds, round_blocks=blocks)
    _run(bench, bench.compare(sides))


@app.command()
def ablate(
    kinds: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ABLATIONS)}; else all.")] = None,
    config: ConfigOption = "pocket",
    preset: PresetOption = "balanced",
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    rounds: RoundsOption = None,
    blocks: BlocksOption = None,
) -> None:
    """One optimisation off at a time from a preset, on at a time from `reference`; windows and precisions."""
    bench = _bench("ablate", config, preset, overrides, quick, out, seed, ablation_rounds=rounds, round_blocks=blocks)
    chosen = _chosen("ablation", kinds, ABLATIONS)
    _run(bench, bench.ablate(chosen))


@app.command()
def reference(
    sides: Annotated[
        list[str] | None,
        typer.Argument(metavar="A B ...", help="Presets of the runtime, changes behind; else what --preset says."),
    ] = None,
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    rounds: RoundsOption = None,
    blocks: BlocksOption = None,
) -> None:
    """The same work by the straightforward pipeline and by the runtime, in turn: how many times as fast it is."""
    sizes = {"rounds": rounds, "round_blocks": blocks, "straightforward_blocks": blocks}
    bench = _bench("reference", config, preset, overrides, quick, out, seed, **sizes)
    _run(bench, bench.reference(sides or ()))


@app.command()
def roofline(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    repeats: Annotated[int | None, typer.Option(min=1, help="Blocks measured of each stage.")] = None,
) -> None:
    """Operations and bytes of a block, the device's ceilings, and how near each stage is to its limit."""
    bench = _bench("roofline", config, preset, overrides, quick, out, 0, repeats=repeats)
    _run(bench, bench.roofline())


@app.command("all")
def everything(
    sides: Annotated[list[str] | None, typer.Argument(metavar="A B ...", help="What to compare.")] = None,
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    quick: QuickOption = False,
    out: OutOption = OUT,
    seed: SeedOption = 0,
    profile: ProfileOption = False,
) -> None:
    """All of the above in one report."""
    bench = _bench("all", config, preset, overrides, quick, out, seed)
    kinds = ABLATIONS[:1] if quick else ABLATIONS
    _run(bench, bench.all(sides or ("reference", "balanced"), AXES, kinds, profile))


@app.command()
def overlap(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    overrides: SetOption = None,
    blocks: Annotated[int, typer.Option(min=8, help="Blocks of each run.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 2,
) -> None:
    """Serial against pipelined: time a block, the stages' shares, and the timeline; last line JSON."""
    from orchestrator.bench.overlap import measure_overlap, overlap_result, print_overlap

    subject = _bench("overlap", config, preset, overrides, False, OUT, 0).subject
    with _ended_in_order():
        serial, pipelined = measure_overlap(subject, blocks, rounds, _say)
    result = overlap_result(serial, pipelined)
    print_overlap(result, pipelined[-1])
    typer.echo(json.dumps({"bench": "overlap", "config": config, "blocks": blocks, "rounds": rounds, **result}))


def _bench(
    name: str,
    config: str,
    preset: str | None,
    overrides: Sequence[str] | None,
    quick: bool,
    out: Path,
    seed: int,
    **sizes: Any,
) -> "Bench":
    """A bench with the sizes that were given instead of the usual ones. Raises UserError for a wrong configuration."""
    from orchestrator.bench.runs import Subject
    from orchestrator.bench.suite import FULL, QUICK, Bench

    subject = Subject(config, settings_of(overrides, {"preset": preset}))
    subject.load()
    given = {name: value for name, value in sizes.items() if value is not None}
    words = sys.argv[1:]
    command = shlex.join(words[words.index(name) :]) if name in words else name
    return Bench(command, subject, replace(QUICK if quick else FULL, **given), quick, out, seed, _say)


def _chosen(what: str, given: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """Those given, else all. Raises InputError."""
    for name in given or ():
        if name not in known:
            raise InputError(f"{what}: found {name}, expected one of {', '.join(known)}")
    return given or known


def _run(bench: "Bench", measured: "Iterable[Parts]") -> None:
    from rich.console import Console

    from orchestrator.bench.suite import summary

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    with _ended_in_order():
        report = bench.run(measured, console)
    typer.echo(f"wrote {bench.out / 'report.json'}, report.html, report.md")
    typer.echo(summary(report, bench.out))


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that no run that was started stays behind."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    typer.echo(line, err=True)
