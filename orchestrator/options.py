"""What several commands have in common: options, and what is made of them. Knows no command."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs.load import preset_names
from ipc.errors import InputError

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A shipped name, or the path of a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: --set stream.window=12. Repeatable."),
]
PresetOption = Annotated[
    str | None,
    typer.Option(help=f"Changes that belong together: {', '.join(preset_names())}. --set comes on top."),
]


def settings_of(overrides: Sequence[str] | None, options: Mapping[str, object]) -> tuple[str, ...]:
    """Changes to a configuration, KEY=VALUE each; --set comes on top of what has an option of its own.

    Args:
        overrides: of --set.
        options: values by key; None was not given.
    """
    return (*(f"{key}={value}" for key, value in options.items() if value is not None), *(overrides or ()))


def help_without_command(context: typer.Context) -> None:
    """What a group of commands does where none is named: it shows its help, and all is well."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def expanded(path: Path, option: str) -> Path:
    """The path without `~`. Raises InputError."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(f"{option} {path}: no such home folder; write the path in full") from error


def writable_folder(path: Path, option: str) -> Path:
    """The folder's absolute path, made if it is not there. Raises InputError where no file can be made in it."""
    path = expanded(path, option).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: no folder can be made there: {error.strerror}") from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{option} {path}: no file can be made there: {error.strerror}; choose another") from error
    return path
