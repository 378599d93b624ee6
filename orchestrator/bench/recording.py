"""What a run says: the events of its daemon, as a client hears them, and what its processes hold meanwhile.

Knows the events and nothing of the daemon's inside; what the times mean is said elsewhere.
"""

import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ipc.errors import NotRunning
from ipc.messages import (
    BlockTimes,
    Discontinuity,
    FramesPlayed,
    Message,
    OnAir,
    PromptEncoded,
    PromptInForce,
    StateChanged,
    WorkerRestarted,
)
from ipc.processes import resident_bytes
from orchestrator.client import Client

ASK_NS = 2_000_000_000
"""How often the daemon is asked for what the workers hold on their devices."""
LAST_STAGE = "vae_decoder"
"""Of the model stages the one that ends a block."""


@dataclass
class Recording:
    """What a run said, in the order in which it came.

    Attributes:
        memory: by worker, pairs of a block and resident bytes when it was decoded.
        device_peaks: by worker, the most bytes that it was seen to hold on devices.
        came_ns: when an event came, for events without a stamp of their own.
    """

    spawned_ns: int = 0
    answered_ns: int = 0
    pids: dict[str, int] = field(default_factory=dict)
    blocks: list[BlockTimes] = field(default_factory=list)
    frames: list[FramesPlayed] = field(default_factory=list)
    encoded: dict[int, PromptEncoded] = field(default_factory=dict)
    in_force: dict[int, PromptInForce] = field(default_factory=dict)
    on_air: dict[int, OnAir] = field(default_factory=dict)
    states_ns: dict[str, int] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    device_peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    underruns: int = 0

    def block_ends(self, began_ns: int, ended_ns: int) -> list[int]:
        """Stamps of the last frame of each block that ended between two stamps."""
        ends = (frames.played_ns[-1] for frames in self.frames)
        return [end for end in ends if began_ns <= end < ended_ns]

    def note(self, event: Message, now_ns: int) -> None:
        """Takes an event in."""
        match event:
            case BlockTimes():
                self.blocks.append(event)
                if event.stage == LAST_STAGE:
                    self._note_memory(event.block)
            case FramesPlayed():
                self.frames.append(event)
            case PromptEncoded():
                self.encoded[event.version] = event
            case PromptInForce():
                self.in_force[event.version] = event
            case OnAir():
                self.on_air[event.version] = event
            case StateChanged():
                self.states_ns.setdefault(event.state, now_ns)
            case Discontinuity() | WorkerRestarted():
                self.breaks.append(event.reason)

    def _note_memory(self, block: int) -> None:
        for worker, pid in self.pids.items():
            held = resident_bytes(pid)
            if held is not None:
                self.memory[worker].append((block, held))


class Listener(threading.Thread):
    """Takes a daemon's events in until it ends, and now and again asks for a snapshot.

    Args:
        quiet_s: how long nothing may come before it gives up.

    Attributes:
        recording: what it heard.
    """

    def __init__(self, directory: Path, recording: Recording, quiet_s: float) -> None:
        super().__init__(name="events", daemon=True)
        self.recording = recording
        self._directory = directory
        self._quiet_s = quiet_s

    def run(self) -> None:
        """A daemon that is gone is no error here: its exit code says more."""
        with suppress(NotRunning), Client(self._directory) as client:
            events = client.events(self._quiet_s)
            asked_ns = time.monotonic_ns()
            self._ask(client)
            for event in events:
                now = time.monotonic_ns()
                self.recording.note(event, now)
                if now - asked_ns >= ASK_NS and isinstance(event, BlockTimes):
                    asked_ns = now
                    self._ask(client)

    def _ask(self, client: Client) -> None:
        """What came before the daemon ended is still to be heard, so its silence ends nothing here."""
        try:
            status, recording = client.status(), self.recording
        except NotRunning:
            return
        recording.underruns = status.underruns
        recording.pids["orchestrator"] = status.pid
        shared = Counter(stage.pid for stage in status.stages.values())
        for name, stage in status.stages.items():
            worker = "models" if shared[stage.pid] > 1 else name
            recording.pids[worker] = stage.pid
            recording.device_peaks[worker] = max(recording.device_peaks[worker], stage.device_memory_bytes)
