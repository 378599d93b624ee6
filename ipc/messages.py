"""The wire: every message between our processes and with clients, grouped by the edge it travels.

A message is one MessagePack map. Tensors never travel here: a message names a ring, an epoch and a slot. Times are
nanoseconds of the machine-wide monotonic clock. Blocks, frames and versions count from 0.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION = 1
Count = Annotated[int, Field(ge=0, lt=2**63)]
Stamp = Count
Name = Annotated[str, Field(min_length=1, max_length=64)]
Line = Annotated[str, Field(max_length=4096)]


class Message(BaseModel):
    """A typed message. Unknown keys and values of another type are refused, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    type: ClassVar[str]


# Client -> daemon: commands. Each gets exactly one final answer.


class PromptSet(Message):
    """Put a prompt in force, at the next block boundary or at the block named."""

    type = "prompt.set"
    text: Annotated[str, Field(max_length=60_000)]
    at: Count | None = None


class StatusGet(Message):
    """Ask for a snapshot."""

    type = "status.get"


class Stop(Message):
    """Finish the block in work, close the outputs, end."""

    type = "stop"


# Daemon -> client: answers. Accepted may come first; exactly one of the others is final.


class Accepted(Message):
    """The command will be carried out; its final answer follows."""

    type = "accepted"
    version: Count | None = None


class Applied(Message):
    """The prompt is in force from this block and frame on."""

    type = "applied"
    version: Count
    block: Count
    frame: Count


class Superseded(Message):
    """A later prompt came before this one's block began."""

    type = "superseded"
    version: Count
    by: Count


class Cancelled(Message):
    """The stream ended before the command could be carried out."""

    type = "cancelled"
    reason: Line


class Rejected(Message):
    """The command is refused; nothing changed."""

    type = "rejected"
    code: Name
    text: Line


class Stopped(Message):
    """Outputs are closed; the daemon is about to end."""

    type = "stopped"
    frames: Count


class StageStatus(Message):
    """One stage in a snapshot."""

    type = "stage_status"
    state: Name
    pid: Count
    restarts: Count
    device: Name
    block_ms: float | None
    memory_bytes: Count
    device_memory_bytes: Count


class SinkStatus(Message):
    """One output in a snapshot; `target` is redacted."""

    type = "sink_status"
    target: Line
    state: Name
    frames: Count
    dropped: Count
    segment: Line | None = None
    error: Line | None = None


class Status(Message):
    """Snapshot of a run. `fps` counts frames that left playout; `rtf` is fps over the native rate.

    `preset` is the one in force, None where the run names none; `mps` says whether the run has a multi-process service
    of its own for processes that share a GPU.
    """

    type = "status"
    state: Name
    config: Name
    preset: Name | None
    pid: Count
    width: Count
    height: Count
    pace: Name
    placement: Name
    mps: bool = False
    seed: Count
    prompt: Line
    version: Count
    block: Count
    frame: Count
    fps: float
    rtf: float
    block_ms: float | None
    underruns: Count
    underruns_after_first_second: Count
    cache_hits: Count
    cache_misses: Count
    memory_bytes: Count
    device_memory_bytes: Count
    uptime_s: float
    first_frame_s: float | None
    abstract_picture: bool
    stages: dict[str, StageStatus]
    sinks: list[SinkStatus]
    last_error: Line | None


# Daemon -> everybody who listens: events.


class StateChanged(Message):
    """The run went to another state."""

    type = "event.state"
    state: Name
    text: Line


class PromptInForce(Message):
    """A prompt took effect at a block; the denoiser worked on the switch, its recache included, between the stamps."""

    type = "event.applied"
    version: Count
    block: Count
    frame: Count
    began_ns: Stamp
    ended_ns: Stamp


class OnAir(Message):
    """The first frame of a prompt left playout, this many milliseconds after the prompt was accepted."""

    type = "event.on_air"
    version: Count
    block: Count
    frame: Count
    ms: float


class Discontinuity(Message):
    """The picture does not follow from what was before this block."""

    type = "event.discontinuity"
    block: Count
    reason: Line


class WorkerRestarted(Message):
    """A worker died and was started again."""

    type = "event.worker_restarted"
    stage: Name
    reason: Line


class PresetChanged(Message):
    """From this block on the denoiser is at another preset, because of what it measured; `unit` is rtf or p99_ms."""

    type = "event.preset"
    block: Count
    old: Name
    new: Name
    unit: Name
    measured: float
    target: float
    reason: Line


class BlockTimes(Message):
    """When a stage began and ended its work on a block; on a GPU also the time between two CUDA events around it."""

    type = "event.block"
    stage: Name
    block: Count
    version: Count
    began_ns: Stamp
    ended_ns: Stamp
    device_ms: float | None = None


class FramesPlayed(Message):
    """From the output by way of the daemon: when each frame of a block had been handed to all sinks."""

    type = "event.frames"
    block: Count
    version: Count
    first_frame: Count
    played_ns: list[Stamp]


class SinkChanged(Message):
    """An output went to another state."""

    type = "event.sink"
    sink: SinkStatus


# Daemon -> stages.


class EncodePrompt(Message):
    """To the text encoder: embed a prompt. `given` names a row of the inputs file instead of a text to encode."""

    type = "encode_prompt"
    version: Count
    text: str
    at: Count | None = None
    given: Count | None = None


class ExpectPrompt(Message):
    """To the denoiser: block `at` must not begin before this version has arrived or was dropped."""

    type = "expect_prompt"
    version: Count
    at: Count


class Begin(Message):
    """To the denoiser: generate from this block on; past block 0 the cache is recomputed from the retained latents.

    `preset`: the one to begin at, where the run adapts; None for the run's own.
    """

    type = "begin"
    block: Count
    preset: Name | None = None


class Drain(Message):
    """To the denoiser: begin no further block and say where the stream ends."""

    type = "drain"


class Shutdown(Message):
    """To any stage: end now."""

    type = "shutdown"


# Stage -> stage.


class RingExported(Message):
    """Producer of a ring in device memory to its consumer: what to open, once an epoch."""

    type = "ring_exported"
    ring: Name
    epoch: Count
    pid: Count
    device_uuid: Name
    handle: bytes
    slots: Count
    slot_nbytes: Count
    total_nbytes: Count
    shape: list[int]
    dtype: Name


class SlotFreed(Message):
    """Consumer to producer: a slot may be filled again. Only wakes; the ring's header decides."""

    type = "slot_freed"
    ring: Name


class EmbedsReady(Message):
    """Text encoder to denoiser: a prompt's embeddings [tokens, text_dim] lie in a slot."""

    type = "embeds_ready"
    ring: Name
    epoch: Count
    slot: Count
    version: Count
    tokens: Count
    at: Count | None
    sent_ns: Stamp


class PromptDropped(Message):
    """Text encoder to denoiser: a version will not arrive."""

    type = "prompt_dropped"
    version: Count


class LatentsReady(Message):
    """Denoiser to VAE decoder: a block's clean latents [B, F, C, h, w] float32 lie in a slot."""

    type = "latents_ready"
    ring: Name
    epoch: Count
    slot: Count
    block: Count
    version: Count
    fresh: bool
    began_ns: Stamp
    sent_ns: Stamp


class FramesReady(Message):
    """VAE decoder to output: frames [count, H, W, 3] uint8 of one latent frame lie in a slot."""

    type = "frames_ready"
    ring: Name
    epoch: Count
    slot: Count
    block: Count
    version: Count
    first_frame: Count
    count: Count
    sent_ns: Stamp


class EndOfStream(Message):
    """To the next stage: block `blocks` and what follows it will not come."""

    type = "end_of_stream"
    blocks: Count


class Credit(Message):
    """Output to denoiser: blocks up to this one may begin. Replaces earlier credits, also downwards never."""

    type = "credit"
    block: Count


# Stage -> daemon.


class Loading(Message):
    """What a stage does before it is ready."""

    type = "loading"
    stage: Name
    text: Line


class Ready(Message):
    """A stage is loaded and warm. `block_ms`: its time a block in the warm-up, None where a block costs it nothing.

    `warnings`: what was asked for and is not to be had, and what is used instead.
    """

    type = "ready"
    stage: Name
    device: Name
    block_ms: float | None
    note: Line | None = None
    warnings: list[Line] = []


class Heartbeat(Message):
    """A stage's process is alive; `progress` rises while it works, `busy` says that it should."""

    type = "heartbeat"
    stage: Name
    progress: Count
    busy: bool
    memory_bytes: Count
    device_memory_bytes: Count


class PromptEncoded(Message):
    """Text encoder: a version's embeddings are on their way. The daemon tells it to everybody who listens."""

    type = "prompt_encoded"
    version: Count
    tokens: Count
    cached: bool
    ms: float
    sent_ns: Stamp


class PromptRefused(Message):
    """Text encoder: a prompt cannot be used."""

    type = "prompt_refused"
    version: Count
    code: Name
    text: Line


class PromptApplied(Message):
    """Denoiser: a version is in force from this block on; the switch was worked on between the stamps."""

    type = "prompt_applied"
    version: Count
    block: Count
    began_ns: Stamp
    ended_ns: Stamp


class PresetApplied(Message):
    """Denoiser: a preset is in force from this block on; as `PresetChanged`."""

    type = "preset_applied"
    block: Count
    old: Name
    new: Name
    unit: Name
    measured: float
    target: float
    reason: Line


class BlockDone(Message):
    """A model stage finished a block. `device_ms`: on a GPU, the time between CUDA events around the work."""

    type = "block_done"
    stage: Name
    block: Count
    version: Count
    began_ns: Stamp
    ended_ns: Stamp
    device_ms: float | None = None


class VersionPlayed(Message):
    """Output: the first frame of a version was played."""

    type = "version_played"
    version: Count
    block: Count
    frame: Count
    played_ns: Stamp


class PlayoutReport(Message):
    """Output: what was played until now."""

    type = "playout_report"
    frames: Count
    block: Count
    fps: float
    underruns: Count
    underruns_after_first_second: Count
    first_frame_ns: Stamp | None
    sinks: list[SinkStatus]


class Drained(Message):
    """Output: everything that came was played, all sinks are closed."""

    type = "drained"
    frames: Count
    sha256: Annotated[str, Field(max_length=64)]
    sinks: list[SinkStatus]


class StageFailed(Message):
    """A stage ends with an error; `user` when the person must change something."""

    type = "stage_failed"
    stage: Name
    text: Line
    user: bool


COMMANDS: tuple[type[Message], ...] = (PromptSet, StatusGet, Stop)
ANSWERS: tuple[type[Message], ...] = (Accepted, Applied, Superseded, Cancelled, Rejected, Stopped, Status)
EVENTS: tuple[type[Message], ...] = (
    StateChanged,
    PromptInForce,
    OnAir,
    Discontinuity,
    WorkerRestarted,
    PresetChanged,
    BlockTimes,
    FramesPlayed,
    PromptEncoded,
    SinkChanged,
)
TO_STAGE: tuple[type[Message], ...] = (
    EncodePrompt,
    ExpectPrompt,
    Begin,
    Drain,
    Shutdown,
    RingExported,
    SlotFreed,
    EmbedsReady,
    PromptDropped,
    LatentsReady,
    FramesReady,
    EndOfStream,
    Credit,
)
TO_DAEMON: tuple[type[Message], ...] = (
    Loading,
    Ready,
    Heartbeat,
    PromptEncoded,
    PromptRefused,
    PromptApplied,
    PresetApplied,
    BlockDone,
    FramesPlayed,
    VersionPlayed,
    PlayoutReport,
    Drained,
    StageFailed,
    RingExported,
)


class Envelope(BaseModel):
    """What a client and the daemon exchange: protocol version, command id, type and body."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    v: int
    id: Annotated[str, Field(min_length=1, max_length=64)]
    type: Name
    body: dict[str, Any]
