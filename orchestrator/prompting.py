"""Prompts on their way through the stages: who is told of one, and what is said to clients when something comes of it.

Knows versions, blocks and stages; sends messages through the functions it is given and owns no socket.
"""

from collections.abc import Callable, Sequence

from configs.schema import RuntimeConfig, StageName
from ipc.errors import Refused
from ipc.messages import (
    EncodePrompt,
    ExpectPrompt,
    Message,
    OnAir,
    PromptApplied,
    PromptInForce,
    PromptRefused,
    VersionPlayed,
)
from orchestrator.gateway import ClientDesk
from orchestrator.plan import ScheduledPrompt
from orchestrator.session import Prompt, PromptBook

SendTo = Callable[[StageName, Message], None]


class Prompting:
    """Accepts prompts, sends them on, and tells their fate.

    Args:
        blocks: where the stream ends, None for never.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self, config: RuntimeConfig, blocks: int | None, desk: ClientDesk, send: SendTo, clock: Callable[[], int]
    ) -> None:
        self._stream, self._blocks = config.stream, blocks
        self._desk, self._send, self._clock = desk, send, clock
        self._book = PromptBook()
        self._planned = 0

    @property
    def in_force(self) -> Prompt | None:
        """The prompt that was applied last."""
        return self._book.in_force

    def plan(self, prompts: Sequence[ScheduledPrompt], given: bool) -> None:
        """Accepts the prompts of the plan, the first of all; `given` takes their embeddings from the inputs file."""
        self._planned = len(prompts)
        for row, prompt in enumerate(prompts):
            own_row = row if given else None
            self._pass_on(self._book.accept(prompt.text, prompt.at, self._clock(), given=own_row))

    def accept(self, text: str, at: int | None, command: str) -> int:
        """Accepts a client's prompt; its version. Raises Refused."""
        if at is not None and self._blocks is not None and at >= self._blocks:
            raise Refused(
                "beyond_end", f"prompt: block {at} will not come, the stream ends before block {self._blocks}"
            )
        prompt = self._book.accept(text, at, self._clock(), command)
        self._pass_on(prompt)
        return prompt.version

    def is_planned(self, version: int) -> bool:
        """Whether a version is one of the plan's, without which the run makes no sense."""
        return version < self._planned

    def refused(self, message: PromptRefused) -> None:
        self._desk.answer(self._book.refused(message.version, message.code, message.text))

    def applied(self, message: PromptApplied) -> None:
        frame = self._stream.first_frame(message.block)
        self._desk.answer(self._book.applied(message.version, message.block, frame))
        self._desk.publish(PromptInForce(frame=frame, **message.model_dump()))

    def played(self, message: VersionPlayed) -> None:
        prompt = self._book.played(message.version)
        if prompt is not None:
            ms = (message.played_ns - prompt.accepted_ns) / 1e6
            self._desk.publish(OnAir(version=message.version, block=message.block, frame=message.frame, ms=ms))

    def end(self, reason: str) -> None:
        """No further block will come."""
        self._desk.answer(self._book.end(reason))

    def again(self) -> None:
        """Sends what waits once more, for a stage that was started again and knows of nothing."""
        for prompt in self._book.waiting:
            self._pass_on(prompt)

    def resume_at(self, block: int) -> None:
        """Tells a new denoiser which prompt is in force at the block where it goes on, and what waits."""
        prompt = self._book.in_force
        if prompt is not None:
            self._pass_on(Prompt(prompt.version, prompt.text, block, prompt.accepted_ns, given=prompt.given))
        self.again()

    def _pass_on(self, prompt: Prompt) -> None:
        """To the text encoder; a prompt that is meant for a block is waited for by the denoiser."""
        if prompt.at is not None:
            self._send("denoiser", ExpectPrompt(version=prompt.version, at=prompt.at))
        self._send(
            "text_encoder",
            EncodePrompt(version=prompt.version, text=prompt.text, at=prompt.at, given=prompt.given),
        )
