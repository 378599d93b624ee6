"""The output stage: plays frames at their pace, hands them to all sinks, and grants generation its credits.

It knows frames, blocks and versions by number and nothing of how they were made. It never opens CUDA and imports no
torch.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from configs.schema import RuntimeConfig, StageName
from configs.targets import check_target, parse_target
from ipc.messages import (
    Credit,
    Drained,
    EndOfStream,
    FramesPlayed,
    FramesReady,
    Message,
    PlayoutReport,
    VersionPlayed,
)
from workers.ffmpeg import find_ffmpeg
from workers.playout import NS, CreditPolicy, PlayoutClock, Rate
from workers.sinks import Sink, open_sinks
from workers.stage import IDLE_WAIT_S

REPORT_NS = NS // 2
"""How often playout is reported and the credit said again, because messages may be lost."""
Send = Callable[[Message], object]


class FrameReader(Protocol):
    """The consumer's end of the frames ring."""

    def take(self) -> tuple[Any, FramesReady] | None:
        """The oldest ready slot, as a token, and its message."""

    def view(self, token: Any) -> memoryview:
        """All bytes of a slot."""

    def release(self, token: Any) -> None:
        """Gives it back."""


@dataclass
class Piece:
    """A slot that is being played; `index` frames of it are done."""

    token: Any
    message: FramesReady
    index: int = 0

    @property
    def frame(self) -> int:
        """Number of the next frame in it."""
        return self.message.first_frame + self.index

    @property
    def over(self) -> bool:
        return self.index >= self.message.count


class OutputStage:
    """The `output` stage.

    Args:
        frame_limit: play exactly that many frames, then close; None for all that come.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        frames: FrameReader,
        to_daemon: Send,
        to_denoiser: Send,
        frame_limit: int | None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name: StageName = "output"
        self.note: str | None = None
        self.warnings: list[str] = []
        self._config, self._frames, self._limit, self._clock = config, frames, frame_limit, clock
        self._to_daemon, self._to_denoiser = to_daemon, to_denoiser
        self._paced = config.output.pace == "live"
        self._playout = PlayoutClock(config.video.fps)
        self._rate = Rate()
        self._policy = CreditPolicy(config.output, config.stream, config.video)
        self._pieces: deque[Piece] = deque()
        self._sinks: list[Sink] = []
        self._hash = hashlib.sha256()
        self._next_frame = 0
        self._played = 0
        self._version = -1
        self._block = 0
        self._first_ns: int | None = None
        self._stamps: list[int] = []
        self._last_picture: bytes | None = None
        self._repeat_ns = 0
        self._reported_ns = 0
        self._said_credit = -1
        self._end: EndOfStream | None = None
        self._closing = False
        self._told_drained = False

    def load(self) -> None:
        """Finds ffmpeg and opens all outputs. Raises UserError."""
        targets = [parse_target(text) for text in self._config.output.out]
        for target in targets:
            check_target(target)
        needed = any(target.kind != "null" for target in targets)
        ffmpeg = find_ffmpeg(self._config.output.ffmpeg) if needed else None
        self._sinks = open_sinks(targets, ffmpeg, self._config.output, self._config.video)

    def warm_up(self) -> None:
        """A block costs this stage nothing worth telling."""

    def receive(self, message: Message) -> None:
        """Notes the end of the stream; other messages only wake."""
        if isinstance(message, EndOfStream):
            self._end = message

    def process(self) -> bool:
        """Takes what has come and plays one frame if it is due."""
        now = self._clock()
        took = self._take(now)
        played = self._play_next(now)
        if not played:
            self._repeat(now)
        self._say(now)
        if not took and not played:
            self._close_when_over()
        return took or played

    def wait_s(self) -> float:
        due = self._playout.due_ns
        if not self._paced or not self._pieces or due is None:
            return IDLE_WAIT_S if not self._pieces else 0.005
        return min(IDLE_WAIT_S, max(0.001, (due - self._clock()) / NS))

    def close(self) -> None:
        """Closes outputs that are still open, at once."""
        for sink in self._sinks:
            if not sink.done:
                sink.abort()

    def _take(self, now: int) -> bool:
        took = self._frames.take()
        if took is None:
            return False
        token, message = took
        self._policy.arrived(message.block, message.first_frame + message.count - 1, now)
        self._pieces.append(Piece(token, message))
        return True

    def _play_next(self, now: int) -> bool:
        """Plays or passes over the next frame; False if it is not due or a file has no room for it."""
        if not self._pieces:
            return False
        piece = self._pieces[0]
        if not self._over_limit and piece.frame >= self._next_frame:
            if not self._may_play(now):
                return False
            self._play(piece, now)
        piece.index += 1
        if piece.over:
            self._frames.release(self._pieces.popleft().token)
        return True

    @property
    def _over_limit(self) -> bool:
        return self._closing or (self._limit is not None and self._played >= self._limit)

    def _may_play(self, now: int) -> bool:
        if any(sink.lossless and not sink.has_room() for sink in self._sinks):
            return False
        due = self._playout.due_ns
        return not self._paced or self._ended_early or due is None or now >= due

    @property
    def _ended_early(self) -> bool:
        """Somebody ended the stream before its planned length: what is left is played without waiting."""
        if self._end is None:
            return False
        return self._limit is None or self._config.stream.first_frame(self._end.blocks) < self._limit

    def _play(self, piece: Piece, now: int) -> None:
        size = self._config.video.frame_bytes
        picture = bytes(self._frames.view(piece.token)[piece.index * size : (piece.index + 1) * size])
        for sink in self._sinks:
            sink.offer(picture)
        self._hash.update(picture)
        self._last_picture, self._repeat_ns = picture, now + 2 * NS // self._config.video.fps
        if not self._ended_early:
            self._playout.play(now)
        self._rate.add(now)
        self._policy.playing(piece.frame, now)
        self._note(piece, now)

    def _note(self, piece: Piece, now: int) -> None:
        frame, message = piece.frame, piece.message
        self._played += 1
        self._next_frame = frame + 1
        if message.block != self._block:
            self._stamps.clear()
        self._block = message.block
        self._stamps.append(self._clock())
        if frame + 1 == self._config.stream.first_frame(message.block + 1):
            self._tell_block(message)
        if message.version != self._version:
            self._version = message.version
            self._to_daemon(VersionPlayed(version=message.version, block=message.block, frame=frame, played_ns=now))
        if self._first_ns is None:
            self._first_ns = now
            self._report(now)

    def _tell_block(self, message: FramesReady) -> None:
        """When the frames of a block were played, after its last one; a block that lost its end is not told."""
        stamps, self._stamps = self._stamps, []
        first = self._next_frame - len(stamps)
        self._to_daemon(FramesPlayed(block=message.block, version=message.version, first_frame=first, played_ns=stamps))

    def _repeat(self, now: int) -> None:
        """While playout stands still, streams get the last picture again, so that their time goes on."""
        if not self._paced or self._last_picture is None or self._closing or now < self._repeat_ns:
            return
        self._repeat_ns += NS // self._config.video.fps
        for sink in self._sinks:
            if sink.live:
                sink.offer(self._last_picture)

    def _say(self, now: int) -> None:
        due = now - self._reported_ns >= REPORT_NS
        if due or self._policy.credit != self._said_credit:
            self._said_credit = self._policy.credit
            self._to_denoiser(Credit(block=self._said_credit))
        if due:
            self._report(now)

    def _report(self, now: int) -> None:
        self._reported_ns = now
        self._to_daemon(
            PlayoutReport(
                frames=self._played,
                block=self._block,
                fps=self._rate.fps,
                underruns=self._playout.underruns,
                underruns_after_first_second=self._playout.underruns_after_first_second,
                first_frame_ns=self._first_ns,
                sinks=[sink.status() for sink in self._sinks],
            )
        )

    def _close_when_over(self) -> None:
        """Once the last frame is played the sinks close in the background; when all have, the daemon is told."""
        if not self._closing:
            if not (self._over_limit or (self._end is not None and not self._pieces)):
                return
            self._closing = True
            for sink in self._sinks:
                sink.finish()
        if not self._told_drained and all(sink.done for sink in self._sinks):
            self._told_drained = True
            self._report(self._clock())
            self._to_daemon(
                Drained(
                    frames=self._played,
                    sha256=self._hash.hexdigest(),
                    sinks=[sink.status() for sink in self._sinks],
                )
            )
