"""The three rings between stages, as plain data: who fills them, who empties them, and what one slot holds.

Derived from the configuration alone, so that the daemon, which owns the memory, and the stages, which use it, agree
without asking each other. Knows no memory and no tensor.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from configs.schema import LATENT_CHANNELS, TEMPORAL_STRIDE, RuntimeConfig, StageName

RingName = Literal["embeds", "latents", "frames"]
RING_NAMES: tuple[RingName, ...] = ("embeds", "latents", "frames")
ITEM_BYTES = {"float32": 4, "uint8": 1}


@dataclass(frozen=True)
class RingSpec:
    """One ring.

    Attributes:
        shape: of what one slot holds at most.
        dtype: `float32` or `uint8`.
        on_device: whether slots lie in CUDA memory of the producer instead of host memory of the daemon.
    """

    name: RingName
    producer: StageName
    consumer: StageName
    slots: int
    shape: tuple[int, ...]
    dtype: Literal["float32", "uint8"]
    on_device: bool = False

    @property
    def slot_nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def ring_specs(config: RuntimeConfig) -> dict[RingName, RingSpec]:
    """The rings of a run.

    Embeddings [text_len, text_dim] and frames [4, H, W, 3] (the pixels of one latent frame) lie in host memory; a
    block's latents [F, 16, h, w] stay on the GPU where both of their stages have one, unless told otherwise.
    """
    video, stream, text = config.video, config.stream, config.model.transformer
    denoiser, vae = config.stage("denoiser").device or "cpu", config.stage("vae_decoder").device or "cpu"
    latents = (stream.frames_per_block, LATENT_CHANNELS, video.latent_height, video.latent_width)
    pixels = (TEMPORAL_STRIDE, video.height, video.width, 3)
    return {
        "embeds": RingSpec(
            "embeds", "text_encoder", "denoiser", config.rings.embeds, (text.text_len, text.text_dim), "float32"
        ),
        "latents": RingSpec(
            "latents",
            "denoiser",
            "vae_decoder",
            config.rings.latents,
            latents,
            "float32",
            on_device=config.rings.latents_memory == "auto" and denoiser.startswith("cuda") and vae.startswith("cuda"),
        ),
        "frames": RingSpec("frames", "vae_decoder", "output", config.rings.frames, pixels, "uint8"),
    }


def history_shape(config: RuntimeConfig) -> tuple[int, ...]:
    """Shape of the retained clean latents, float32: [window blocks, F, 16, h, w]."""
    return (config.stream.window_blocks, *ring_specs(config)["latents"].shape)
