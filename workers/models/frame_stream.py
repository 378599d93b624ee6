"""A stream's latent frames to frames of bytes: fills the static buffer, does again what was recorded.

A decoder does two things, for the first latent frame of a stream and for every later one, each always the same to the
same memory. Knows no blocks and no rings.
"""

from typing import Protocol

import torch
from torch import Tensor

from configs.schema import LATENT_CHANNELS, TEMPORAL_STRIDE, VideoConfig
from workers.models.graphs import Recorder, Replay, run_directly
from workers.models.vae import to_rgb8

Past = tuple[bool, list[Tensor]]
"""Whether the next latent frame is a stream's first, and what the decoder's buffers hold."""


class FrameDecoder(Protocol):
    """Decodes one stream, latent frame by latent frame, in memory that never moves."""

    def buffers(self) -> list[Tensor]:
        """All memory that carries a stream from one latent frame to the next."""

    def frames(self, latent: Tensor, *, first: bool) -> Tensor:
        """[16, h, w] float32 -> [F, 3, 8h, 8w] in -1 to 1; `first` forgets what was before, and F is then 1, else 4."""


class FrameStream:
    """A decoder's stream.

    Args:
        device: where the decoder lies.
        record: takes what decoding a latent frame does once, returns how to do it again.
    """

    def __init__(
        self, decoder: FrameDecoder, video: VideoConfig, device: torch.device, record: Recorder = run_directly
    ) -> None:
        self._decoder, self._record = decoder, record
        self.latent = torch.zeros(LATENT_CHANNELS, video.latent_height, video.latent_width, device=device)
        size = (video.height, video.width, 3)
        self._made = {first: _bytes(device, 1 if first else TEMPORAL_STRIDE, *size) for first in (True, False)}
        self._recorded: dict[bool, Replay] = {}
        self._first = True

    @torch.inference_mode()
    def record_all(self) -> None:
        """Records both ways, the larger first; what was decoded before is forgotten."""
        for first in (False, True):
            self._replay(first)
        self.begin()

    def begin(self) -> None:
        """The next latent frame is the first of a stream."""
        self._first = True

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Decodes the next latent frame.

        Args:
            latent: [16, h, w] float32, as the transformer makes it.

        Returns:
            [F, H, W, 3] uint8 where the decoder lies, overwritten by later calls; F is 1 for the first, else 4.
        """
        self.latent.copy_(latent)
        self._replay(self._first)()
        frames = self._made[self._first]
        self._first = False
        return frames

    @torch.inference_mode()
    def past(self) -> Past:
        """A copy of what the stream has seen, to come back to."""
        return self._first, [buffer.clone() for buffer in self._decoder.buffers()]

    @torch.inference_mode()
    def go_back(self, past: Past) -> None:
        """Forgets what was decoded since."""
        self._first, kept = past
        for buffer, values in zip(self._decoder.buffers(), kept, strict=True):
            buffer.copy_(values)

    def _replay(self, first: bool) -> Replay:
        if first not in self._recorded:
            self._recorded[first] = self._record(lambda: self._once(first))
        return self._recorded[first]

    def _once(self, first: bool) -> None:
        self._made[first].copy_(to_rgb8(self._decoder.frames(self.latent, first=first)))


def _bytes(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device=device)
