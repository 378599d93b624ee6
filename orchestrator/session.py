"""Prompts and commands as state machines: every command gets exactly one final answer, whatever happens.

Pure: no socket, no clock, no process. Versions number prompts in the order in which they were accepted; the rules of
which prompt replaces which are those of the denoiser's prompt queue.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from ipc.errors import Refused
from ipc.messages import Applied, Cancelled, Message, Rejected, Superseded

MAX_PENDING = 1000
"""Prompts that may wait for their block at one time."""
MAX_REMEMBERED = 4096
"""Answered commands whose answers are kept, so that a repeated id has no second effect."""
MAX_CHARACTERS = 16_000
"""Longest text worth tokenizing: more than 512 tokens in any script, and in any encoding below the wire's 64 KiB."""


def check_text(text: str) -> None:
    """Raises Refused for a text that no tokenizer should see; cheap, before any cleaning."""
    if len(text) > MAX_CHARACTERS:
        raise Refused(
            "too_long", f"prompt: found {len(text)} characters, at most {MAX_CHARACTERS} are taken; shorten it"
        )
    if not text.strip():
        raise Refused("empty", "prompt: found no text, expected some words")
    if "\0" in text:
        raise Refused("bad_text", "prompt: found a NUL character; remove it")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise Refused("bad_text", "prompt: found a lone surrogate, expected Unicode text")


@dataclass(frozen=True)
class Prompt:
    """An accepted prompt.

    Attributes:
        at: the block it is meant for; None for the next boundary.
        accepted_ns: monotonic time of its acceptance.
        command: id of the client's command, None for a prompt of the plan.
        given: row of the inputs file that replaces its text.
    """

    version: int
    text: str
    at: int | None
    accepted_ns: int
    command: str | None = None
    given: int | None = None


Answer = tuple[str, Message]
"""A command's id and its final answer."""


class PromptBook:
    """Which prompts wait and which is in force."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, Prompt] = {}
        self._texts: OrderedDict[int, Prompt] = OrderedDict()
        self.in_force: Prompt | None = None

    @property
    def waiting(self) -> tuple[Prompt, ...]:
        """Prompts without their final answer, oldest first."""
        return tuple(self._waiting.values())

    def accept(
        self, text: str, at: int | None, now_ns: int, command: str | None = None, given: int | None = None
    ) -> Prompt:
        """Gives a prompt its version. Raises Refused: the text is unusable, or too many wait."""
        if given is None:
            check_text(text)
        if len(self._waiting) >= MAX_PENDING:
            raise Refused("busy", f"prompt: {MAX_PENDING} prompts already wait for their block; try again later")
        prompt = Prompt(self._next, text, at, now_ns, command, given)
        self._next += 1
        self._waiting[prompt.version] = prompt
        return prompt

    def applied(self, version: int, block: int, frame: int) -> list[Answer]:
        """A version is in force from a block on; the answers of it and of those that it replaced."""
        prompt = self._waiting.pop(version, None)
        if prompt is None:
            return []
        self.in_force = prompt
        self._remember(prompt)
        replaced = [p for p in self.waiting if p.version < version and (p.at is None or p.at <= block)]
        for other in replaced:
            del self._waiting[other.version]
        answers = [(p, Superseded(version=p.version, by=version)) for p in replaced]
        return _answers([*answers, (prompt, Applied(version=version, block=block, frame=frame))])

    def refused(self, version: int, code: str, text: str) -> list[Answer]:
        """The text encoder cannot use a version."""
        prompt = self._waiting.pop(version, None)
        return _answers([(prompt, Rejected(code=code, text=text))]) if prompt else []

    def end(self, reason: str) -> list[Answer]:
        """No further block will come; everything that waits is cancelled."""
        waiting, self._waiting = self.waiting, {}
        return _answers((prompt, Cancelled(reason=reason)) for prompt in waiting)

    def played(self, version: int) -> Prompt | None:
        """The prompt whose first frame was played, once."""
        return self._texts.pop(version, None)

    def _remember(self, prompt: Prompt) -> None:
        self._texts[prompt.version] = prompt
        while len(self._texts) > MAX_REMEMBERED:
            self._texts.popitem(last=False)


def _answers(pairs: Iterable[tuple[Prompt, Message]]) -> list[Answer]:
    return [(prompt.command, message) for prompt, message in pairs if prompt.command is not None]


class CommandBook:
    """Commands by id: who asked, and what was answered; a repeated id is answered again and has no second effect."""

    def __init__(self) -> None:
        self._commands: OrderedDict[str, tuple[bytes, list[Message]]] = OrderedDict()

    def open(self, identifier: str, peer: bytes) -> list[Message] | None:
        """None for a new command; for a known one the answers so far, which now belong to this peer."""
        known = self._commands.get(identifier)
        self._commands[identifier] = (peer, known[1] if known else [])
        self._commands.move_to_end(identifier)
        while len(self._commands) > MAX_REMEMBERED:
            self._commands.popitem(last=False)
        return known[1] if known else None

    def answer(self, identifier: str, message: Message) -> bytes | None:
        """Notes an answer; the peer it goes to, None if the command is forgotten."""
        known = self._commands.get(identifier)
        if known is None:
            return None
        known[1].append(message)
        return known[0]
