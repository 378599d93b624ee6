"""What of a preset the denoiser can take on while it runs, and whether listed presets are of that kind.

Presets are given: it reads no file. Knows nothing of block times and of when to change.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.schema import Preset, RuntimeConfig
from ipc.errors import ConfigError


def at_preset(config: RuntimeConfig, preset: Preset) -> RuntimeConfig:
    """A run's configuration with what of a preset can change at a block boundary. Raises ValidationError."""
    tree = config.model_dump()
    for key, value in _keys(preset.changes):
        if _can_change(key):
            part, _, name = key.rpartition(".")
            tree[part][name] = value
    return RuntimeConfig.model_validate(tree)


def check_presets(config: RuntimeConfig, presets: Mapping[str, Preset], overrides: Sequence[str]) -> None:
    """Whether a run can change between presets.

    Args:
        presets: those of `adaptive.presets`, by name.
        overrides: `key=value` that were set beside them.

    Raises:
        ConfigError: the run begins with another one, they differ in what stays as it is, or would undo an override.
        ValidationError: what one of them sets does not go together with the run's other settings.
    """
    listed = ", ".join(presets)
    if config.preset not in presets:
        raise ConfigError(
            f"preset: found {config.preset} beside a target, expected one of adaptive.presets: {listed}; drop one of"
            " the two or add it there"
        )
    owned = {key for preset in presets.values() for key, _ in _keys(preset.changes)}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if any(key in (own, own.split(".")[0]) for own in owned):
            raise ConfigError(
                f"--set {key}: found it beside a target, but {listed} set it whenever one of them takes over; drop it"
                " or the target"
            )
    for name, preset in presets.items():
        for key, wanted in _keys(preset.changes):
            found = _value(config, key)
            if not _can_change(key) and found != wanted:
                raise ConfigError(
                    f"adaptive.presets: {name} sets {key} to {wanted}, which cannot change while a stream runs (this"
                    f" one has {found}); leave it out or begin with --preset {name}"
                )
        at_preset(config, preset)


def _can_change(key: str) -> bool:
    """What the denoiser alone reads, at a block boundary; `execution.native` is the VAE decoder's and stays."""
    return key in ("model.attention", "stream.recache") or key.startswith("execution.")


def _keys(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of what a preset sets, and the values."""
    for name, value in changes.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(config: RuntimeConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
