"""A program that stands for `orchestrator start`: it tells of blocks whose times are made up, over the real sockets.

Every block takes the stages the milliseconds of `TIMES`, or of the JSON in SCRIPTED_MS, to the nanosecond. It begins
when somebody asks for its status, which who listens does first. SCRIPTED_FAULT takes one thing away from it: `silent`
tells of three blocks and no more, `endless` does not stop when it is asked to, `deaf` puts no prompt in force.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count

from fake_daemon import FakeDaemon, a_status

from configs.load import load_config
from configs.schema import RuntimeConfig
from ipc.messages import (
    Accepted,
    Applied,
    BlockTimes,
    FramesPlayed,
    Message,
    OnAir,
    PromptEncoded,
    PromptInForce,
    PromptSet,
    StateChanged,
    Status,
    StatusGet,
    Stop,
    Stopped,
)
from orchestrator.run_directory import RunDirectory, locate

TIMES = {"denoiser": 40, "vae_decoder": 30, "output": 11}
SUBSCRIBED_S = 0.05
"""Within which a subscription of somebody who is connected has arrived."""
MS = 1_000_000


class Script:
    """What the daemon says."""

    def __init__(self, config: RuntimeConfig, blocks: int | None) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()
        self.version, self.block = 0, 0
        self._config, self._blocks = config, blocks
        self._ms = TIMES | json.loads(os.environ.get("SCRIPTED_MS", "{}"))
        self._told: dict[str, int] = {}
        self._fault = os.environ.get("SCRIPTED_FAULT", "")

    def answer(self, command: Message) -> Iterator[Message]:
        match command:
            case StatusGet():
                self.begun.set()
                yield self._status()
            case Stop() if self._fault == "endless":
                yield Accepted()
            case Stop():
                self.ended.set()
                yield from (Accepted(), Stopped(frames=1))
            case PromptSet():
                yield from self._switched(command.text)

    def blocks(self) -> Iterator[Message]:
        """Events, block by block; in a run without an end when the clock is at the end of each."""
        yield StateChanged(state="running", text="generating")
        start = time.monotonic_ns()
        for block in count() if self._blocks is None else range(self._blocks):
            self.block = block
            if self._fault == "silent" and block == 3:
                self.ended.wait()
                return
            ahead_ns = start + block * self._period_ns + sum(self._ms.values()) * MS - time.monotonic_ns()
            if self._blocks is None and self.ended.wait(max(0.0, ahead_ns / 1e9)):
                return
            yield from self._block(block, start + block * self._period_ns)

    @property
    def _period_ns(self) -> int:
        return max(self._ms.values()) * MS

    def _block(self, block: int, began: int) -> Iterator[Message]:
        for stage in ("denoiser", "vae_decoder"):
            ended = began + self._ms[stage] * MS
            yield BlockTimes(stage=stage, block=block, version=self.version, began_ns=began, ended_ns=ended)
            began = ended
        frames = self._config.stream.frames_in(block)
        played = [began + self._ms["output"] * MS * n // max(1, frames - 1) for n in range(frames)]
        first = self._config.stream.first_frame(block)
        yield FramesPlayed(block=block, version=self.version, first_frame=first, played_ns=played)

    def _switched(self, text: str) -> Iterator[Message]:
        """In force at once at a block to come, on air 100 ms after it was accepted."""
        self.version += 1
        version, block, now = self.version, self.block + 2, time.monotonic_ns()
        known = text in self._told
        self._told[text] = version
        at = {"version": version, "block": block, "frame": self._config.stream.first_frame(block)}
        yield Accepted(version=version)
        if self._fault == "deaf":
            return
        yield PromptEncoded(version=version, tokens=4, cached=known, ms=1.0, sent_ns=now)
        yield PromptInForce(**at, began_ns=now, ended_ns=now + MS)
        yield OnAir(**at, ms=100.0)
        yield Applied(**at)

    def _status(self) -> Status:
        told = a_status()
        stages = {name: stage.model_copy(update={"pid": os.getpid()}) for name, stage in told.stages.items()}
        return told.model_copy(update={"pid": os.getpid(), "stages": stages})


def main() -> None:
    """As `orchestrator start`, of the options what a measurement gives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--config")
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    config = load_config(given.config, given.set)
    frames = None if given.seconds is None else round(given.seconds * config.video.fps)
    script = Script(config, None if frames is None else config.stream.blocks_for_frames(frames))
    with RunDirectory.open(locate()) as directory, FakeDaemon(directory, script.answer) as daemon:
        script.begun.wait()
        time.sleep(SUBSCRIBED_S)
        for event in script.blocks():
            daemon.publish(event)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
