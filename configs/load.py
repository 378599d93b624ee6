"""From YAML files and `key=value` overrides to a checked configuration; every mistake becomes one line.

Knows the schema and the shipped files, no command line and no process.
"""

import difflib
import os
import re
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.adaptive import at_preset, check_presets
from configs.schema import AdaptiveConfig, Preset, RuntimeConfig
from ipc.errors import ConfigError

SHIPPED = Path(__file__).parent
PRESETS = SHIPPED / "presets"
LONGEST_SHOWN = 60
"""Characters of a wrong value that an error line repeats."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain data only, and no key twice: PyYAML alone would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def shipped_names() -> list[str]:
    """Names of the configurations that come with the program."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def preset_names() -> list[str]:
    """Names of the presets that come with the program."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """A shipped preset. Raises ConfigError."""
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise _error(f"preset {_shown(name)}: {hint}known are {', '.join(names)}")
    return Preset.model_validate(_read_mapping(PRESETS / f"{name}.yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> RuntimeConfig:
    """The checked configuration of a run: the file, over it the changes of its `preset`, over these the overrides.

    Where `adaptive` has a target and no preset is named, it is the first that `adaptive` lists.

    Args:
        name_or_path: a shipped name, or the path of a YAML file.
        overrides: `part.key=value`, the value in YAML; a missing part is created. `preset=NAME` names the preset.

    Raises:
        ConfigError: one line; what, where, found, expected.
    """
    path = _config_file(name_or_path)
    tree = _read_mapping(path)
    _place_weights(tree, path.parent)
    first, changes = _partition(overrides, lambda text: re.split(r"[.=]", text)[0].strip() in ("preset", "adaptive"))
    for override in first:
        _apply(tree, override)
    if tree.get("preset") is None:
        tree["preset"] = _best_listed(tree.get("adaptive"))
    if isinstance(tree.get("preset"), str):
        _merge(tree, load_preset(tree["preset"]).changes)
    for override in changes:
        _apply(tree, override)
    try:
        config = RuntimeConfig.model_validate(tree)
        if config.adaptive.is_on:
            check_presets(config, {name: load_preset(name) for name in config.adaptive.presets}, changes)
    except ValidationError as error:
        raise explain(error, str(path), overrides) from error
    return _with_absolute_paths(config)


def configs_at_presets(config: RuntimeConfig) -> dict[str, RuntimeConfig]:
    """What the denoiser runs at each preset it can change to, by name, the best first; {} where it has no target."""
    names = config.adaptive.presets if config.adaptive.is_on else ()
    return {name: at_preset(config, load_preset(name)) for name in names}


def as_yaml(config: RuntimeConfig) -> str:
    """The whole configuration as YAML that `load_config` reads back; what a preset changed is in it already.

    The preset is named only where the run begins with it and may leave it.
    """
    exclude = set() if config.adaptive.is_on else {"preset"}
    text: str = yaml.safe_dump(
        config.model_dump(mode="json", exclude=exclude), sort_keys=False, allow_unicode=True, width=120
    )
    return text


def check_model_files(config: RuntimeConfig) -> None:
    """Raises ConfigError where real weights are asked for and their folder is not named or not there."""
    path = config.model.path
    if path is None and not config.model.random_weights:
        raise _error(
            f"config {config.name}: model.path: found nothing, expected the folder with the weights;"
            " pass --set model.path=FOLDER"
        )
    if path is not None and not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise _error(f"model.path: {path}: found {found}, expected the folder with the weights")


def explain(error: ValidationError, source: str, overrides: Sequence[str] = ()) -> ConfigError:
    """The first problem of a validation as one line that names its key, what was found and what is expected.

    Args:
        source: the file that was read.
        overrides: as passed to `load_config`; a key that one of them set is blamed on it instead of the file.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    location = tuple(part for part in problem["loc"] if part != "[key]")
    key = ".".join(str(part) for part in location)
    blamed = next((text for text in reversed(overrides) if _causes(text, key, problem["msg"])), None)
    where = f"--set {_shown(blamed)}" if blamed else f"config {source}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _error(f"{where}: {_problem_text(key, location, problem)}{more}")


def _config_file(name_or_path: str) -> Path:
    names = shipped_names()
    if name_or_path in names:
        return SHIPPED / f"{name_or_path}.yaml"
    path = _expanded(Path(name_or_path)) if name_or_path else Path()
    if path.is_file():
        return path
    looks_like_path = "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    if looks_like_path and path.is_dir():
        raise _error(f"config {name_or_path}: found a folder, expected a YAML file")
    if looks_like_path and not path.exists():
        raise _error(f"config {name_or_path}: no such file")
    if looks_like_path:
        return path
    close = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise _error(f"config {_shown(name_or_path)}: {hint}known are {', '.join(names)}, or give the path of a YAML file")


def _expanded(path: Path) -> Path:
    return _expanded_home(path).absolute()


def _expanded_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise _error(f"{path}: no home folder known for it; write the path in full") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _error(f"config {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _error(f"config {path}: found bytes that are not UTF-8, expected YAML text") from error
    value = _parse(text, f"config {path}")
    if not isinstance(value, dict):
        raise _error(f"config {path}: found {_kind(value)}, expected a mapping of keys")
    return value


def _place_weights(tree: dict[str, Any], folder: Path) -> None:
    """A file's `model.path` is relative to the file, so that a configuration can lie beside its weights."""
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str) and model["path"]:
        model["path"] = os.path.normpath(folder / _expanded_home(Path(model["path"])))


def _parse(text: str, where: str) -> Any:
    """The value of YAML text. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise _error(f"{where}:{line} not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise _error(f"{where}: not valid YAML: {_shown(str(error))}") from error
    except RecursionError as error:
        raise _error(f"{where}: nested too deeply") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets the key of an override in the tree; parts that are missing or null are created."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise _error(f"--set {_shown(override)}: expected KEY=VALUE, such as stream.window=12")
    value = _parse(text, f"--set {key.strip()}")
    part = tree
    for depth, name in enumerate(parts[:-1], start=1):
        below = part.get(name)
        if below is not None and not isinstance(below, dict):
            parent = ".".join(parts[:depth])
            raise _error(f"--set {_shown(override)}: {parent} is {_kind(below)} and has no keys")
        part[name] = dict(below or {})
        part = part[name]
    part[parts[-1]] = value


def _best_listed(adaptive: Any) -> str | None:
    """The preset that a run with a target begins with; None without one, and where it is not what it should be."""
    if not isinstance(adaptive, dict) or all(adaptive.get(key) is None for key in ("target_rtf", "target_p99_ms")):
        return None
    listed = adaptive.get("presets", AdaptiveConfig().presets)
    best = listed[0] if isinstance(listed, list | tuple) and listed else None
    return best if isinstance(best, str) else None


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Puts the changes over a tree, part by part."""
    for name, value in changes.items():
        if isinstance(value, dict):
            below = tree.get(name)
            tree[name] = dict(below) if isinstance(below, dict) else {}
            _merge(tree[name], value)
        else:
            tree[name] = value


def _partition(texts: Sequence[str], belongs: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Those that belong, and the others."""
    return [text for text in texts if belongs(text)], [text for text in texts if not belongs(text)]


def _causes(override: str, key: str, message: str) -> bool:
    """Whether an override can be the cause of a problem at a key, or in a part as a whole."""
    own = override.partition("=")[0].strip()
    if own == key or key.startswith(f"{own}."):
        return True
    inside = not key or own.startswith(f"{key}.")
    return inside and ("not permitted" in message or own.split(".")[-1] in re.findall(r"\w+", message))


def _problem_text(key: str, location: tuple[int | str, ...], problem: Mapping[str, Any]) -> str:
    kind, found = problem["type"], _shown(problem["input"])
    message = re.sub(r"^(Input|String|List|Tuple|Keys) should (be |have )?", "", problem["msg"]).partition(", unable")[
        0
    ]
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_nearest_key(location)}"
    if kind == "missing":
        return f"{key}: found nothing, expected a value"
    if kind == "value_error":
        return f"{key or 'config'}: {problem['msg'].removeprefix('Value error, ')}"
    if location and location[-1] == "device":
        message = "cpu, cuda or cuda:NUMBER"
    elif location and location[-1] == "recache":
        message = "full, none, recent(LATENT FRAMES) or blend(SECONDS)"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "a mapping of keys"
    elif kind == "tuple_type":
        message = "a list"
    return f"{key}: found {found}, expected {message}"


def _nearest_key(location: tuple[int | str, ...]) -> str:
    """A hint for an unknown key: the most similar beside it, else the most similar anywhere, else what is there."""
    *parents, last = (str(part) for part in location)
    siblings = [key for key in _legal_keys(RuntimeConfig) if key.split(".")[:-1] == parents]
    anywhere = {key.split(".")[-1]: key for key in reversed(list(_legal_keys(RuntimeConfig)))}
    close = difflib.get_close_matches(last, [key.split(".")[-1] for key in siblings], n=1)
    if close and last not in anywhere:
        return f"did you mean {'.'.join([*parents, close[0]])}?"
    close = difflib.get_close_matches(last, list(anywhere), n=1, cutoff=0.8)
    if close:
        return f"did you mean {anywhere[close[0]]}?"
    return f"known here are {', '.join(key.split('.')[-1] for key in siblings)}"


def _legal_keys(part: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of a part and of the parts in it, dotted."""
    for name, field in part.model_fields.items():
        yield f"{prefix}{name}"
        for kind in _alternatives(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _legal_keys(kind, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _with_absolute_paths(config: RuntimeConfig) -> RuntimeConfig:
    """Paths of overrides are relative to the current folder, which workers need not share; `~` is the home folder."""
    model, output = config.model, config.output
    if model.path is not None:
        model = model.model_copy(update={"path": _expanded(model.path)})
    if output.ffmpeg is not None:
        output = output.model_copy(update={"ffmpeg": _expanded(output.ffmpeg)})
    return config.model_copy(update={"model": model, "output": output})


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else _shown(value)


def _shown(value: Any) -> str:
    """A value as a line can repeat it: short, without control characters."""
    text = value if isinstance(value, str) else repr(value)
    if not text or value is None:
        return "nothing"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _error(text: str) -> ConfigError:
    """A ConfigError on one line, whatever the names and values in it contain."""
    return ConfigError(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
