"""What a run is made of: one frozen, complete tree, checked once, handed out in parts.

Every stage receives only its part. Nothing here knows torch, sockets or processes; a name of a dtype or a device is a
word that the stage that owns the tensors resolves.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
VaeDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What the VAE computes in; `auto` is bfloat16, but float32 on a CPU that has no instructions for bfloat16."""
Execution = Literal["plain", "static"]
"""How the denoiser's passes are computed: one operation after the other, or with shapes and addresses that stay."""
KVKind = Literal["model", "int8", "fp8"]
"""How the fast path keeps keys and values: in `model.dtype`, or in 8 bits with a scale for each token and head."""
LinearKind = Literal["model", "fp8"]
"""How the fast path multiplies: in `model.dtype`, or e4m3 by e4m3 with a scale for each token and output channel."""
AttendKind = Literal["model", "fp8"]
"""In what the fast path's self-attention takes queries, keys and values: `model.dtype`, or e4m3 without scales."""
AttentionKind = Literal["auto", "cudnn", "flash", "flash3", "flash4", "sdpa", "math"]
"""What computes attention; `auto` is the fastest that is installed and right on a GPU, `sdpa` on a CPU."""
KernelsKind = Literal["auto", "torch", "triton"]
"""What computes the fast path's small operations; `auto` is Triton where the model is on a GPU and Triton installed."""
Switch = Literal["auto", True, False]
"""`auto` is on where it can be; what is asked for with `true` and cannot be is said in a warning."""
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
StageName = Literal["text_encoder", "denoiser", "vae_decoder", "output"]
STAGES: tuple[StageName, ...] = ("text_encoder", "denoiser", "vae_decoder", "output")
MODEL_STAGES: tuple[StageName, ...] = STAGES[:3]

LATENT_CHANNELS = 16
"""Channels of a Wan 2.1 latent."""
SPATIAL_STRIDE = 8
"""Pixels a latent covers in height and in width."""
TEMPORAL_STRIDE = 4
"""Frames a latent frame decodes to, the first of a stream excepted: that one decodes to a single frame."""
PATCH = 2
"""Latents a transformer token covers in height and in width."""
LAYER_LINEARS = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
"""Linears of a layer that every pass of the fast path runs; query, key and value are one."""

ABSOLUTE_POSITIONS = 1024
"""Length of the published position table (Wan 2.1): with `rope: absolute` a stream ends at latent frame 1023."""


class Part(BaseModel):
    """A frozen part of the configuration; a key it does not have is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TransformerConfig(Part):
    """Causal Wan transformer: what the shapes of its tensors are, and what they cannot tell."""

    dim: PositiveInt
    ffn_dim: PositiveInt
    freq_dim: PositiveInt = 256
    text_dim: PositiveInt
    text_len: PositiveInt = 512
    num_heads: PositiveInt
    num_layers: PositiveInt
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linears that every pass of the fast path runs."""
        return tuple(f"blocks.{layer}.{name}" for layer in range(self.num_layers) for name in LAYER_LINEARS)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> "TransformerConfig":
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be num_heads {self.num_heads} times an even number")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, found {self.freq_dim}")
        return self


class TextEncoderConfig(Part):
    """UMT5 encoder (gated GELU, a relative position bias of its own in every layer)."""

    vocab_size: PositiveInt
    dim: PositiveInt
    dim_attn: PositiveInt
    dim_ffn: PositiveInt
    num_heads: PositiveInt
    num_layers: PositiveInt
    num_buckets: PositiveInt = 32

    @model_validator(mode="after")
    def _heads_divide_attention(self) -> "TextEncoderConfig":
        if self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn {self.dim_attn} must be a multiple of num_heads {self.num_heads}")
        return self


class VaeConfig(Part):
    """Causal Wan 2.1 VAE (stride 4x8x8, 16 latent channels)."""

    base_dim: PositiveInt
    dim_mult: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    num_res_blocks: PositiveInt = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @model_validator(mode="after")
    def _lengths(self) -> "VaeConfig":
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != LATENT_CHANNELS:
                raise ValueError(f"{name} needs {LATENT_CHANNELS} numbers, found {len(values)}")
        if len(self.dim_mult) != 4 or sum(self.temporal_downsample) != 2 or len(self.temporal_downsample) != 3:
            raise ValueError("stride 4x8x8 needs four dim_mult and two of three temporal_downsample")
        return self


class LoraConfig(Part):
    """LoRA over all linears of the transformer's layers; the files do not state the alpha."""

    rank: PositiveInt
    alpha: float


class FilesConfig(Part):
    """Where each checkpoint file lies below `model.path`; the first that exists is read."""

    transformer: tuple[str, ...] = (
        "longlive_models/models/longlive_base.pt",
        "models/longlive_base.pt",
        "longlive_base.pt",
        "Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
        "Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    )
    lora: tuple[str, ...] = ("longlive_models/models/lora.pt", "models/lora.pt", "lora.pt", "adapter_model.safetensors")
    vae: tuple[str, ...] = ("Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
    tiny_vae: tuple[str, ...] = ("taew2_1.pth", "taew2_1.safetensors", "taehv/taew2_1.pth")
    text_encoder: tuple[str, ...] = (
        "Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_t5_umt5-enc-bf16.safetensors",
    )
    tokenizer: tuple[str, ...] = ("Wan2.1-T2V-1.3B/google/umt5-xxl", "google/umt5-xxl", "tokenizer")


class ModelConfig(Part):
    """The networks, their files, and how they are held in memory.

    `decoder: tiny` makes frames by TAEHV instead of the VAE's own decoder.
    """

    path: Path | None = None
    random_weights: bool = False
    random_weights_seed: int = 0
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig
    decoder: Literal["full", "tiny"] = "full"
    lora: LoraConfig | None = None
    files: FilesConfig = FilesConfig()
    generator: Literal["generator", "generator_ema"] = "generator"
    dtype: Dtype = "float32"
    vae_dtype: VaeDtype = "float32"
    text_dtype: Dtype = "float32"
    attention: AttentionKind = "auto"

    @model_validator(mode="after")
    def _widths_meet(self) -> "ModelConfig":
        if self.transformer.text_dim != self.text_encoder.dim:
            raise ValueError(
                f"transformer.text_dim {self.transformer.text_dim} must equal text_encoder.dim {self.text_encoder.dim}"
            )
        return self


class VideoConfig(Part):
    """Pixels and time of the picture."""

    height: PositiveInt
    width: PositiveInt
    fps: PositiveInt = 16

    @model_validator(mode="after")
    def _sixteen(self) -> "VideoConfig":
        step = SPATIAL_STRIDE * PATCH
        if self.height % step or self.width % step:
            raise ValueError(f"height and width must be divisible by {step}, found {self.height}x{self.width}")
        return self

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_STRIDE

    @property
    def frame_tokens(self) -> int:
        """Transformer tokens of one latent frame."""
        return (self.latent_height // PATCH) * (self.latent_width // PATCH)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame as uint8 RGB."""
        return self.height * self.width * 3


class StreamConfig(Part):
    """How a stream is generated: block by block, with which steps, seeing which past. Lengths in latent frames.

    `recache` says what of the cache is recomputed when the prompt changes: `full` what LongLive recomputes, `recent(N)`
    the last N latent frames of it, `none` nothing. `blend(SECONDS)` recomputes nothing either: the embeddings go from
    the old prompt to the new one over the blocks of that time, and the window fills with blocks made on the way.

    `switch` says when a prompt that need not wait takes effect: at the next `boundary` of blocks, or by `abort` in the
    block that is being denoised, which is begun anew; once a block, and not in a block that began with another prompt.
    """

    frames_per_block: PositiveInt = 3
    window: PositiveInt = 12
    sink: Annotated[int, Field(ge=0)] = 3
    steps: tuple[Annotated[int, Field(gt=0, le=1000)], ...] = (1000, 750, 500, 250)
    warp_steps: bool = True
    timestep_shift: Annotated[float, Field(gt=0)] = 5.0
    rope: Literal["absolute", "relative"] = "relative"
    global_sink: bool = True
    recache: Annotated[str, Field(pattern=r"^(full|none|recent\([1-9]\d*\)|blend\(\d{1,4}(\.\d{1,3})?\))$")] = "full"
    switch: Literal["boundary", "abort"] = "boundary"
    context_noise: Annotated[int, Field(ge=0, lt=1000)] = 0
    first_position: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _multiples_of_the_block(self) -> "StreamConfig":
        block = self.frames_per_block
        for name, value in (("window", self.window), ("sink", self.sink)):
            if value % block:
                raise ValueError(f"{name} must be a multiple of frames_per_block {block}, found {value}")
        if self.recache_frames is not None and self.recache_frames % block:
            raise ValueError(f"recache: recent(N) needs a multiple of frames_per_block {block}, found {self.recache}")
        if self.blend_s == 0:
            raise ValueError(f"recache: blend(SECONDS) needs more than 0, found {self.recache}")
        if self.sink + block > self.window:
            raise ValueError(f"window {self.window} must hold sink {self.sink} and a block of {block}")
        if not self.steps or list(self.steps) != sorted(set(self.steps), reverse=True):
            raise ValueError(f"steps must fall strictly, found {list(self.steps)}")
        return self

    @property
    def window_blocks(self) -> int:
        return self.window // self.frames_per_block

    @property
    def recache_frames(self) -> int | None:
        """How many latent frames are recomputed at most; None for all that LongLive recomputes."""
        if self.recache == "full":
            return None
        return int(self.recache[len("recent(") : -1]) if self.recache.startswith("recent(") else 0

    @property
    def blend_s(self) -> float | None:
        """Seconds over which one prompt turns into the next; None where it does at once."""
        return float(self.recache[len("blend(") : -1]) if self.recache.startswith("blend(") else None

    def blend_blocks(self, fps: int) -> int:
        """The same in blocks, at least 1."""
        return max(1, round((self.blend_s or 0) * fps / (self.frames_per_block * TEMPORAL_STRIDE)))

    @property
    def sink_blocks(self) -> int:
        return self.sink // self.frames_per_block

    def first_frame(self, block: int) -> int:
        """Number of the first frame of a block: 0 for block 0, one less latent frame's worth of three after it."""
        return 0 if block == 0 else block * self.frames_per_block * TEMPORAL_STRIDE - (TEMPORAL_STRIDE - 1)

    def frames_in(self, block: int) -> int:
        """Frames a block decodes to."""
        return self.first_frame(block + 1) - self.first_frame(block)

    def block_of_frame(self, frame: int) -> int:
        """The block whose decoding yields a frame."""
        return (frame + TEMPORAL_STRIDE - 1) // (self.frames_per_block * TEMPORAL_STRIDE)

    @property
    def most_blocks(self) -> int | None:
        """How many blocks a stream can have; None with `rope: relative`, which never ends."""
        if self.rope == "relative":
            return None
        return max(0, ABSOLUTE_POSITIONS - self.first_position) // self.frames_per_block

    def blocks_for_frames(self, frames: int) -> int:
        """Fewest blocks that hold that many frames."""
        return 0 if frames <= 0 else self.block_of_frame(frames - 1) + 1


class StageConfig(Part):
    """Where one model stage runs. What is null here is what the run says for all."""

    placement: Literal["process", "thread"] | None = None
    device: Device | None = None
    threads: PositiveInt = 1


class StagesConfig(Part):
    """Settings of the three model stages.

    `mps`: whether the run begins CUDA's multi-process service, through which processes that share a GPU do so at once;
    else they take turns, or use one that is there.
    """

    mps: Switch = "auto"
    text_encoder: StageConfig = StageConfig()
    denoiser: StageConfig = StageConfig()
    vae_decoder: StageConfig = StageConfig()


class RingsConfig(Part):
    """Slots of the rings between stages: a prompt's embeddings, a block's latents, a latent frame's pixels.

    `latents_memory`: `auto` keeps latents on the GPU where both of their stages have one; `host` passes them through
    host memory, for two GPUs that cannot reach each other.
    """

    latents_memory: Literal["auto", "host"] = "auto"
    embeds: PositiveInt = 2
    latents: Annotated[int, Field(ge=2)] = 2
    frames: Annotated[int, Field(ge=3)] = 6


class OutputConfig(Part):
    """What happens to frames: where they go and at which pace.

    `live` plays at the video's rate, `free` as fast as frames come, `serial` likewise but begins a block only when the
    one before has left the VAE decoder: no overlap, for comparison.
    """

    out: tuple[str, ...] = ("null:",)
    pace: Literal["live", "free", "serial"] = "live"
    ffmpeg: Path | None = None
    crf: Annotated[int, Field(ge=0, le=51)] = 20
    live_bitrate_kbit: PositiveInt = 2500


class SupervisionConfig(Part):
    """Deadlines, in seconds, after which a worker counts as failed."""

    start_s: Annotated[float, Field(gt=0)] = 600.0
    heartbeat_s: Annotated[float, Field(gt=0)] = 0.5
    hang_s: Annotated[float, Field(gt=0)] = 30.0
    drain_s: Annotated[float, Field(gt=0)] = 30.0


class ExecutionConfig(Part):
    """How the networks are computed; unless it says otherwise, what they compute is the same.

    `denoiser: plain` is the definition, `static` the fast path; `graphs` replays the fast path as CUDA graphs; `kv`
    keeps its keys and values in 8 bits, `linears: fp8` multiplies in 8 bits and `attend: fp8` takes queries, keys and
    values of self-attention in 8 bits, which is not exact. `fp8_keep` names linears that stay in `model.dtype`, as
    patterns such as `blocks.*.ffn.2` or `blocks.0.*`. `attend: fp8` keeps keys and values as they are attended, so `kv`
    has to be `model`; a block that sees itself alone is attended in `model.dtype`. `audit` is for finding bugs: it ends
    the denoiser when a pass of the fast path reads a value back or keeps memory. `kernels` says what computes its small
    operations, and on a GPU the VAE decoder's; `compile` has torch.compile make what lies between its attentions.
    `native` compiles the VAE decoder's small operations at start, where it decodes in one thread of a CPU with AVX-512
    and there is a compiler.
    """

    denoiser: Execution = "static"
    graphs: Switch = "auto"
    native: Switch = "auto"
    kv: KVKind = "model"
    linears: LinearKind = "model"
    fp8_keep: tuple[str, ...] = ()
    attend: AttendKind = "model"
    kernels: KernelsKind = "auto"
    compile: bool = False
    audit: bool = False

    @model_validator(mode="after")
    def _plain_is_the_definition(self) -> "ExecutionConfig":
        fast = {
            f"kv: {self.kv}": self.kv != "model",
            f"linears: {self.linears}": self.linears != "model",
            f"attend: {self.attend}": self.attend != "model",
            "kernels: triton": self.kernels == "triton",
            "compile: true": self.compile,
            "audit: true": self.audit,
        }
        wanted = [setting for setting, is_set in fast.items() if is_set]
        if self.denoiser == "plain" and wanted:
            raise ValueError(f"{wanted[0]} needs denoiser: static, found denoiser: plain")
        if self.fp8_keep and self.linears != "fp8":
            raise ValueError(f"fp8_keep needs linears: fp8, found linears: {self.linears}")
        if self.attend == "fp8" and self.kv != "model":
            raise ValueError(
                f"attend: fp8 needs kv: model, found kv: {self.kv}; it keeps keys and values in 8 bits itself"
            )
        return self


class AdaptiveConfig(Part):
    """Presets that the denoiser changes between at block boundaries, the best picture first, the fastest last.

    `target_rtf` is how much faster than real time blocks are made on average, `target_p99_ms` what 99 of 100 may take;
    both null is off. Counted is the denoiser's time for a block, without waits and without blocks that begin with a
    prompt. It changes to the next faster preset when the last `window` blocks miss the target, back when the better
    one is expected to take at most `headroom` of what the target allows, at the earliest `wait` blocks after the last
    change. A way back that did not hold doubles that wait, up to `longest_wait`; after as many blocks without a change
    it forgets how slow the better preset was.
    """

    presets: Annotated[tuple[str, ...], Field(min_length=2)] = ("quality", "balanced", "speed")
    target_rtf: Annotated[float, Field(gt=0)] | None = None
    target_p99_ms: Annotated[float, Field(gt=0)] | None = None
    window: PositiveInt = 8
    headroom: Annotated[float, Field(gt=0, lt=1)] = 0.85
    wait: PositiveInt = 16
    longest_wait: PositiveInt = 512

    @property
    def is_on(self) -> bool:
        return self.target_rtf is not None or self.target_p99_ms is not None

    @model_validator(mode="after")
    def _one_target(self) -> "AdaptiveConfig":
        if self.target_rtf is not None and self.target_p99_ms is not None:
            raise ValueError("found both target_rtf and target_p99_ms, expected one of them")
        if len(set(self.presets)) < len(self.presets):
            raise ValueError(f"presets must differ, found {', '.join(self.presets)}")
        if self.wait > self.longest_wait:
            raise ValueError(f"wait must be at most longest_wait {self.longest_wait}, found {self.wait}")
        return self


class Preset(Part):
    """Changes to a configuration that belong together.

    Attributes:
        about: what it is for, and what it changes.
        exact: whether it computes what the configuration computes without it, up to rounding in the same dtypes.
        changes: keys of `RuntimeConfig`, part by part.
    """

    about: str
    exact: bool
    changes: dict[str, Any]


class RuntimeConfig(Part):
    """A whole run. `preset` names the preset whose changes are in it; where it adapts, the one that it begins with."""

    name: str
    preset: str | None = None
    prompt: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    placement: Literal["process", "thread"] = "process"
    device: Device = "cpu"
    model: ModelConfig
    video: VideoConfig
    stream: StreamConfig = StreamConfig()
    execution: ExecutionConfig = ExecutionConfig()
    adaptive: AdaptiveConfig = AdaptiveConfig()
    stages: StagesConfig = StagesConfig()
    rings: RingsConfig = RingsConfig()
    output: OutputConfig = OutputConfig()
    prompt_cache_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    supervision: SupervisionConfig = SupervisionConfig()

    @model_validator(mode="after")
    def _patterns_fit(self) -> "RuntimeConfig":
        names = self.model.transformer.linears
        for pattern in self.execution.fp8_keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                one_layer = ", ".join(names[: len(LAYER_LINEARS)])
                raise ValueError(
                    f"execution.fp8_keep: found {pattern}, which fits no linear, expected a pattern of names such as"
                    f" {one_layer}, up to {names[-1]}"
                )
        return self

    @model_validator(mode="after")
    def _audit_sees_the_denoiser_alone(self) -> "RuntimeConfig":
        """What torch counts and refuses on a GPU it counts and refuses for a whole process."""
        denoiser = self.stage("denoiser")
        if self.execution.audit and denoiser.device != "cpu" and denoiser.placement == "thread":
            raise ValueError("execution.audit: true on a GPU needs placement: process for denoiser, found thread")
        return self

    def stage(self, name: StageName) -> StageConfig:
        """A model stage's settings with the run's placement and device filled in; `cuda` means the first GPU."""
        own: StageConfig = getattr(self.stages, name)
        device = own.device or self.device
        return StageConfig(
            placement=own.placement or self.placement,
            device="cuda:0" if device == "cuda" else device,
            threads=own.threads,
        )
