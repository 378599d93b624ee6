"""The command line: `orchestrator start | prompt | status | stop | generate | config | quality | bench | version`.

Knows neither models nor workers; the daemon is imported by the commands that run it. Whatever a person gets wrong is
one line on standard error.

Exit codes: 0 done; 1 refused, failed, or a prompt that did not take effect; 2 wrong input; 3 already running;
4 not running; 130 interrupted.
"""

import itertools
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from configs.load import as_yaml, load_config, load_preset, preset_names
from configs.schema import RuntimeConfig
from ipc.errors import InputError, LongLiveError, Refused, UserError
from ipc.messages import Applied, Superseded
from orchestrator.bench.cli import app as bench_app
from orchestrator.client import Client, PromptHandle
from orchestrator.options import ConfigOption, PresetOption, SetOption, help_without_command, settings_of
from orchestrator.plan import RunPlan, RunSummary
from orchestrator.prepare import (
    RunOptions,
    checked_length,
    file_plan,
    live_plan,
    parse_switch_frames,
    prepare_config,
    prompts_of,
)
from orchestrator.progress import one_line, print_status, reporter_for_this_terminal
from orchestrator.quality import quality
from orchestrator.run_directory import RunDirectory, locate

MOST = 2**63 - 1

app = typer.Typer(
    help="Endless video with LongLive, steered by prompts while it plays.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
config_app = typer.Typer(help="Look at configurations.", rich_markup_mode="rich")
app.add_typer(config_app, name="config")
app.command()(quality)
app.add_typer(bench_app, name="bench")

TargetRtfOption = Annotated[
    float | None,
    typer.Option(help="Change presets to stay that much faster than real time: 1.2. Same as adaptive.target_rtf."),
]
TargetP99Option = Annotated[
    float | None,
    typer.Option(
        "--target-p99-ms",
        help="Change presets so that 99 of 100 blocks take no longer. Same as adaptive.target_p99_ms.",
    ),
]
SeedOption = Annotated[int | None, typer.Option(min=0, max=MOST, help="Seed of the noise.")]
OutOption = Annotated[
    list[str] | None,
    typer.Option("--out", "-o", metavar="TARGET", help="A file such as video.mp4, rtmp://..., null:. Repeatable."),
]
FfmpegOption = Annotated[Path | None, typer.Option(help="The ffmpeg program to use.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; before the command.")] = False,
) -> None:
    """Endless video with LongLive, steered by prompts while it plays."""
    if show_version:
        version()
        raise typer.Exit
    help_without_command(context)


@config_app.callback(invoke_without_command=True)
def config_root(context: typer.Context) -> None:
    """Look at configurations."""
    help_without_command(context)


@app.command()
def start(
    config: ConfigOption = "pocket",
    prompt: Annotated[str | None, typer.Option(help="The first prompt; else the configuration's.")] = None,
    seed: SeedOption = None,
    out: OutOption = None,
    seconds: Annotated[float | None, typer.Option(help="End after that much video; else run until stopped.")] = None,
    pace: Annotated[
        Literal["live", "free"] | None,
        typer.Option(help="live plays at the video's rate, free as fast as it comes."),
    ] = None,
    ffmpeg: FfmpegOption = None,
    preset: PresetOption = None,
    target_rtf: TargetRtfOption = None,
    target_p99_ms: TargetP99Option = None,
    overrides: SetOption = None,
    log: Annotated[Path | None, typer.Option(help="File for the workers' log; else standard error.")] = None,
) -> None:
    """Start the stream in the foreground; Ctrl-C or `orchestrator stop` ends it.

    While it runs, `orchestrator prompt "..."` changes the picture and `orchestrator status` shows how it does.

    [b]Examples[/]

    orchestrator start

    orchestrator start --prompt "a red fox in the snow" --out fox.mp4 --seconds 30

    orchestrator start --config longlive-1.3b --set model.path=~/LongLive --out rtmp://localhost/live/key
    """
    settings = _settings(preset, target_rtf, target_p99_ms, overrides)
    options = RunOptions(config, settings, prompt, seed, out or (), pace, ffmpeg)
    resolved = prepare_config(options)
    plan = live_plan(resolved, seconds, log)
    with RunDirectory.open(locate()) as directory:
        summary = _run(resolved, plan, directory)
    _finish(resolved, summary)


@app.command()
def generate(
    prompts: Annotated[
        Path, typer.Option(help='JSON lines: {"prompts": ["...", "..."]}, or {"prompt": "..."} on every line.')
    ],
    out: OutOption = None,
    line: Annotated[int | None, typer.Option(min=1, help="Which line of the file; else the first.")] = None,
    switch_frames: Annotated[
        str | None,
        typer.Option(metavar="40,80", help="Latent frames from which the next prompt counts; else evenly spread."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length; else 10 s a prompt, or 10 s after the last switch frame.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, max=MOST, help="Length in blocks of 3 latent frames.")] = None,
    seed: SeedOption = None,
    config: ConfigOption = "pocket",
    ffmpeg: FfmpegOption = None,
    preset: PresetOption = None,
    target_rtf: TargetRtfOption = None,
    target_p99_ms: TargetP99Option = None,
    overrides: SetOption = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Safetensors with noise or embeddings to use instead of drawn ones.")
    ] = None,
    dump_latents: Annotated[Path | None, typer.Option(help="Safetensors file for the clean latents.")] = None,
) -> None:
    """Make one video from a file of prompts, as fast as it goes.

    A prompt takes effect with the first block that starts at its switch frame or later, as in LongLive's interactive
    inference.

    [b]Example[/]

    orchestrator generate --prompts story.jsonl --switch-frames 40,80 --out story.mp4
    """
    if not out:
        raise InputError("--out: found nothing, expected a target such as video.mp4")
    settings = _settings(preset, target_rtf, target_p99_ms, overrides)
    paced = any(setting.partition("=")[0].strip() == "output.pace" for setting in settings)
    texts = prompts_of(prompts, line)
    switches = parse_switch_frames(switch_frames)
    options = RunOptions(config, settings, texts[0], seed, out, None if paced else "free", ffmpeg)
    resolved = prepare_config(options)
    plan = file_plan(resolved, texts, switches, checked_length(resolved, seconds, blocks), inputs, dump_latents)
    with RunDirectory.temporary() as directory:
        summary = _run(resolved, plan, directory)
    _finish(resolved, summary)


@app.command()
def prompt(
    text: Annotated[str, typer.Argument(help="What the video shall show from now on.")],
    at: Annotated[
        int | None, typer.Option(min=0, max=MOST, metavar="BLOCK", help="From this block on; else the next.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is on air.")] = False,
) -> None:
    """Change the prompt of the running stream.

    Exit code 0: accepted, with --wait: on air. 1: rejected, superseded or cancelled.
    """
    with Client() as client:
        handle = client.prompt(text, at)
        typer.echo(f"accepted: version {handle.version}")
        if wait:
            _wait(handle)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="One JSON object with all fields.")] = False) -> None:
    """Show how the running stream does."""
    with Client() as client:
        snapshot = client.status()
    if as_json:
        typer.echo(snapshot.model_dump_json())
    else:
        print_status(snapshot)


@app.command()
def stop(
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the end.")] = 60.0,
) -> None:
    """End the running stream: finish the block in work, close the outputs."""
    with Client() as client:
        try:
            stopped = client.stop(timeout)
        except TimeoutError as error:
            raise LongLiveError(f"the daemon did not end within {timeout:g} s; it goes on trying") from error
    typer.echo(f"stopped after {stopped.frames} frames")


@app.command()
def version() -> None:
    """Print the version."""
    try:
        number = installed_version("longlive-runtime")
    except PackageNotFoundError:
        number = "not installed"
    typer.echo(f"longlive-runtime {number}")


@config_app.command()
def show(
    config: ConfigOption = "pocket",
    preset: PresetOption = None,
    target_rtf: TargetRtfOption = None,
    target_p99_ms: TargetP99Option = None,
    overrides: SetOption = None,
) -> None:
    """Print a configuration with all defaults and changes, as YAML that --config reads back."""
    settings = _settings(preset, target_rtf, target_p99_ms, overrides)
    typer.echo(as_yaml(load_config(config, settings)), nl=False)


@config_app.command()
def presets() -> None:
    """Print the presets: name, whether it is exact, what it is for."""
    for name in preset_names():
        preset = load_preset(name)
        typer.echo(f"{name:<11} {'exact' if preset.exact else 'not exact':<10} {preset.about}")


def _settings(
    preset: str | None, target_rtf: float | None, target_p99_ms: float | None, overrides: Sequence[str] | None
) -> tuple[str, ...]:
    own = {"preset": preset, "adaptive.target_rtf": target_rtf, "adaptive.target_p99_ms": target_p99_ms}
    return settings_of(overrides, own)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code. With --debug errors keep their traceback.

    Typer itself turns Ctrl-C into 130, and ends quietly when whoever reads our output has enough.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(given, prog_name="orchestrator", standalone_mode=False)
    except (LongLiveError, typer.TyperException) as error:
        if "--debug" in itertools.takewhile(lambda argument: argument.startswith("-"), given):
            raise
        return _fail(error)
    return code if isinstance(code, int) else 0


def _fail(error: LongLiveError | typer.TyperException) -> int:
    text = _usage_text(error) if isinstance(error, typer.TyperException) else str(error)
    if isinstance(error, Refused):
        text = f"rejected ({error.code}): {text}"
    typer.echo(f"error: {one_line(text)}", err=True)
    return error.exit_code if isinstance(error, UserError | typer.TyperException) else 1


def _usage_text(error: typer.TyperException) -> str:
    """Typer's text; where it hides the value that it did not like, with that value."""
    text = error.format_message()
    if not isinstance(error.__cause__, ValidationError):
        return text
    found = error.__cause__.errors()[0]["input"]
    return f"{text.replace('Input should', 'should').replace('Value error, ', '').rstrip('.')}; found {found!r:.60}"


def _run(config: RuntimeConfig, plan: RunPlan, directory: RunDirectory) -> RunSummary:
    from orchestrator.daemon import run

    reporter = reporter_for_this_terminal()
    try:
        if plan.live and config.stream.most_blocks is not None and plan.blocks == config.stream.most_blocks:
            reporter.note(f"stream.rope is absolute: the stream ends after {plan.blocks} blocks")
        return run(config, plan, directory, reporter)
    finally:
        reporter.close()


def _finish(config: RuntimeConfig, summary: RunSummary) -> None:
    """Tells the result and ends with its exit code."""
    if summary.frames and summary.blocks and summary.wall_s > 0:
        fps, block_ms = summary.frames / summary.wall_s, 1000 * summary.wall_s / summary.blocks
        line = f"{summary.frames} frames in {summary.blocks} blocks, {summary.wall_s:.1f} s: {fps:.1f} fps"
        if config.output.pace != "live":  # a paced stream plays at its rate, whatever the capacity is
            line += f", {block_ms:.0f} ms a block, RTF {fps / config.video.fps:.2f}"
        typer.echo(line)
    if summary.frames_sha256:
        typer.echo(f"sha256 of the frames {summary.frames_sha256}")
    for file in summary.files:
        typer.echo(f"wrote {one_line(file)}")
    if summary.error is not None:
        typer.echo(f"error: {one_line(summary.error)}", err=True)
    raise typer.Exit(summary.exit_code)


def _wait(handle: PromptHandle) -> None:
    """Tells what becomes of a prompt; ends with 1 where it does not take effect."""
    answer = handle.result()
    if isinstance(answer, Applied):
        typer.echo(f"applied at block {answer.block}, frame {answer.frame}")
        typer.echo(f"on air after {handle.on_air().ms:.0f} ms")
        return
    if isinstance(answer, Superseded):
        typer.echo(f"superseded: version {answer.version} by version {answer.by}")
    else:
        typer.echo(f"cancelled: {one_line(answer.reason)}")
    raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(main())
