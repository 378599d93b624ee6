"""What is known of a running pipeline, gathered from its messages and told as a status snapshot.

Knows no socket and no process; times are given to it.
"""

from collections import deque

from configs.schema import STAGES, RuntimeConfig, StageName
from ipc.messages import (
    BlockDone,
    Heartbeat,
    Message,
    PlayoutReport,
    PresetApplied,
    PromptEncoded,
    Ready,
    SinkStatus,
    StageStatus,
    Status,
)

RECENT_BLOCKS = 16
NS = 1_000_000_000


class StageRecord:
    """What one stage told about itself."""

    def __init__(self) -> None:
        self.state = "starting"
        self.pid = 0
        self.restarts = 0
        self.device = "cpu"
        self.memory_bytes = 0
        self.device_memory_bytes = 0
        self.warm_ms: float | None = None
        self.block_ms: deque[float] = deque(maxlen=RECENT_BLOCKS)

    @property
    def mean_block_ms(self) -> float | None:
        """Mean over the last blocks; before the first, what the warm-up took."""
        return sum(self.block_ms) / len(self.block_ms) if self.block_ms else self.warm_ms

    def status(self) -> StageStatus:
        return StageStatus(
            state=self.state,
            pid=self.pid,
            restarts=self.restarts,
            device=self.device,
            block_ms=self.mean_block_ms,
            memory_bytes=self.memory_bytes,
            device_memory_bytes=self.device_memory_bytes,
        )


class Telemetry:
    """Gathers and tells.

    Args:
        started_ns: when the run was started, monotonic.
    """

    def __init__(self, config: RuntimeConfig, started_ns: int) -> None:
        self._config = config
        self._started_ns = started_ns
        self.stages: dict[StageName, StageRecord] = {name: StageRecord() for name in STAGES}
        self.preset = config.preset
        self.mps = False
        self.next_block = 0
        self.frames = 0
        self.fps = 0.0
        self.block = 0
        self.underruns = 0
        self.underruns_after_first_second = 0
        self.first_frame_ns: int | None = None
        self.cache_hits = 0
        self.cache_misses = 0
        self.sinks: list[SinkStatus] = []
        self.last_error: str | None = None

    def note(self, message: Message) -> None:
        """Takes in what a message tells, if it tells something."""
        match message:
            case Ready():
                record = self._record(message.stage)
                record.state, record.device, record.warm_ms = "ready", message.device, message.block_ms
            case Heartbeat():
                record = self._record(message.stage)
                record.memory_bytes, record.device_memory_bytes = message.memory_bytes, message.device_memory_bytes
                if record.state not in {"starting", "restarting"}:  # it beats while it loads, too
                    record.state = "busy" if message.busy else "idle"
            case BlockDone():
                self._record(message.stage).block_ms.append((message.ended_ns - message.began_ns) / 1e6)
                if message.stage == "denoiser":
                    self.next_block = message.block + 1
            case PresetApplied():
                self.preset = message.new
            case PromptEncoded():
                self.cache_hits += message.cached
                self.cache_misses += not message.cached
            case PlayoutReport():
                self._note_playout(message)

    def _record(self, stage: str) -> StageRecord:
        return next(record for name, record in self.stages.items() if name == stage)

    def _note_playout(self, report: PlayoutReport) -> None:
        self.frames, self.fps, self.block = report.frames, report.fps, report.block
        self.underruns = report.underruns
        self.underruns_after_first_second = report.underruns_after_first_second
        self.first_frame_ns = report.first_frame_ns
        self.sinks = report.sinks

    @property
    def slowest_block_ms(self) -> float | None:
        """What a block costs the slowest stage: the pipeline's pace."""
        times = [record.mean_block_ms for record in self.stages.values()]
        return max((ms for ms in times if ms is not None), default=None)

    @property
    def device_memory_bytes(self) -> int:
        return sum({r.pid: r.device_memory_bytes for r in self.stages.values()}.values())

    def memory_bytes(self, own: int) -> int:
        """Resident memory of the daemon and its workers; pages that they share count in each."""
        return own + sum({r.pid: r.memory_bytes for r in self.stages.values()}.values())

    def up_line(self, own_memory: int) -> str:
        """The one line that says what runs, from the warm-up's times."""
        video = self._config.video
        parts = [f"{video.width}x{video.height}"]
        block_ms = self.slowest_block_ms
        if block_ms:
            fps = self._block_frames * 1000 / block_ms
            parts += [f"{fps:.1f} fps", f"{block_ms:.0f} ms a block", f"RTF {fps / video.fps:.2f} (warm-up)"]
        parts.append(f"{self.memory_bytes(own_memory) / 2**30:.1f} GiB")
        if self.device_memory_bytes:
            parts.append(f"{self.device_memory_bytes / 2**30:.1f} GiB on the GPU")
        return " · ".join(parts)

    @property
    def abstract_picture(self) -> bool:
        """Whether the weights are random."""
        return self._config.model.path is None and self._config.model.random_weights

    @property
    def _block_frames(self) -> int:
        return self._config.stream.frames_in(1)

    def status(self, *, now_ns: int, pid: int, own_memory: int, state: str, prompt: str, version: int) -> Status:
        """A snapshot."""
        config = self._config
        first = self.first_frame_ns
        return Status(
            state=state,
            config=config.name,
            preset=self.preset,
            pid=pid,
            width=config.video.width,
            height=config.video.height,
            pace=config.output.pace,
            placement=config.placement,
            mps=self.mps,
            seed=config.seed,
            prompt=prompt[:1000],
            version=version,
            block=self.block,
            frame=self.frames,
            fps=self.fps,
            rtf=self.fps / config.video.fps,
            block_ms=self.slowest_block_ms,
            underruns=self.underruns,
            underruns_after_first_second=self.underruns_after_first_second,
            cache_hits=self.cache_hits,
            cache_misses=self.cache_misses,
            memory_bytes=self.memory_bytes(own_memory),
            device_memory_bytes=self.device_memory_bytes,
            uptime_s=(now_ns - self._started_ns) / NS,
            first_frame_s=None if first is None else (first - self._started_ns) / NS,
            abstract_picture=self.abstract_picture,
            stages={name: record.status() for name, record in self.stages.items()},
            sinks=self.sinks,
            last_error=self.last_error,
        )
