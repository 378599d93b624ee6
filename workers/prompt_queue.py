"""Which prompt is in force from which block on. Pure: no tensor is looked into, no message is sent.

A prompt without a block takes effect at the next boundary after its embeddings arrive and never holds a block up. A
prompt with a block is waited for: the same schedule gives the same video, live or offline.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keep:
    """The prompt in force stays."""


@dataclass(frozen=True)
class Wait:
    """The block must not begin yet: this version is due at it and has neither arrived nor been dropped."""

    version: int


@dataclass(frozen=True)
class Apply:
    """This version is in force from the block on."""

    version: int
    embeds: Any


class PromptQueue:
    """Prompts on their way to the denoiser. Versions rise in the order in which prompts were accepted."""

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        self._arrived: dict[int, tuple[int | None, Any]] = {}
        self._applied: list[tuple[int, int]] = []

    @property
    def version(self) -> int | None:
        """The version in force, None before the first."""
        return self._applied[-1][0] if self._applied else None

    def expect(self, version: int, at: int) -> None:
        """Block `at` waits for this version, unless it has come already or a later one has replaced it."""
        if version not in self._arrived and not self._is_stale(version, at):
            self._expected[version] = at

    def arrive(self, version: int, at: int | None, embeds: Any) -> None:
        """A version's embeddings are here; those of a version that was replaced meanwhile are forgotten."""
        self._expected.pop(version, None)
        if not self._is_stale(version, at):
            self._arrived[version] = (at, embeds)

    def drop(self, version: int) -> None:
        """A version will not come."""
        self._expected.pop(version, None)

    def decide(self, block: int) -> Keep | Wait | Apply:
        """What must happen before a block begins: wait, keep, or apply the latest version that is due."""
        late = [version for version, at in self._expected.items() if at <= block]
        if late:
            return Wait(min(late))
        due = [version for version, (at, _) in self._arrived.items() if at is None or at <= block]
        if not due:
            return Keep() if self._applied else Wait(0)
        version = max(due)
        return Apply(version, self._arrived[version][1])

    def applied(self, version: int, block: int) -> None:
        """The version is in force; what it replaces is forgotten."""
        self._applied = [(v, b) for v, b in self._applied if v > version] + [(version, block)]
        for other in [v for v, (at, _) in self._arrived.items() if v == version or self._is_stale(v, at)]:
            del self._arrived[other]
        for other in [v for v, at in self._expected.items() if self._is_stale(v, at)]:
            del self._expected[other]

    def _is_stale(self, version: int, at: int | None) -> bool:
        """A later version took effect at or after the block this one was meant for, or it was applied itself."""
        return any(v == version or (v > version and (at is None or at <= block)) for v, block in self._applied)
