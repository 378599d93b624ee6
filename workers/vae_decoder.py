"""The VAE decoder stage: owns the decoder and its stream; turns a block's latents into frames.

A latent frame at a time, so that the first frames of a block leave before the block is done. It knows nothing of
prompts, steps or playout; a free slot says that pixels have a place.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.schema import LATENT_CHANNELS, TEMPORAL_STRIDE, RuntimeConfig, StageName
from ipc.messages import BlockDone, EndOfStream, FramesReady, LatentsReady, Message, RingExported
from ipc.tensor_ring import Slots
from workers.device_timer import device_timer, wait
from workers.latents_source import LatentsSource
from workers.models.execution import choose_frame_stream
from workers.models.graphs import give_back_unused
from workers.ports import RingReader, RingWriter, Send
from workers.stage import IDLE_WAIT_S


@dataclass(frozen=True)
class BlockInWork:
    """A block of which `index` latent frames are decoded; `latents` [F, 16, h, w] are our own copy."""

    message: LatentsReady
    latents: Tensor
    index: int
    began_ns: int


class VaeDecoderStage:
    """The `vae_decoder` stage.

    Args:
        latents: ring from the denoiser.
        latents_source: its slots, [F, 16, h, w] float32 each.
        frames: ring to the output, [4, H, W, 3] uint8 a slot.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        *,
        latents: RingReader[LatentsReady],
        latents_source: LatentsSource,
        frames: RingWriter,
        frames_slots: Slots,
        to_daemon: Send,
    ) -> None:
        self.name: StageName = "vae_decoder"
        self.note: str | None = None
        self.warnings: list[str] = []
        self._config = config
        self._device = torch.device(config.stage("vae_decoder").device or "cpu")
        self._latents, self._source = latents, latents_source
        self._frames, self._frames_slots = frames, frames_slots
        self._to_daemon = to_daemon
        self._timer = device_timer(self._device)
        self._work: BlockInWork | None = None
        self._last: EndOfStream | None = None

    def load(self) -> None:
        """The decoder onto its device. Raises UserError."""
        notes: list[str] = []
        self._stream = choose_frame_stream(self._config, self._device, notes.append, self.warnings.append)
        self.note = "; ".join(notes) or None

    def warm_up(self) -> float:
        """Milliseconds of a block that is not the first; the stream begins afresh afterwards."""
        video, per_block = self._config.video, self._config.stream.frames_per_block
        latent = torch.zeros(LATENT_CHANNELS, video.latent_height, video.latent_width, device=self._device)
        self._stream.record_all()
        self._stream.decode(latent)
        self._stream.decode(latent).cpu()
        began = time.monotonic_ns()
        for _ in range(per_block):
            self._stream.decode(latent).cpu()
        elapsed_ms = (time.monotonic_ns() - began) / 1e6
        self._stream.begin()
        give_back_unused(self._device)
        return elapsed_ms

    def receive(self, message: Message) -> None:
        """Opens exported memory and notes the end of the stream; other messages only wake."""
        match message:
            case RingExported():
                self._source.opened(message)
            case EndOfStream():
                self._last = message

    def process(self) -> bool:
        """Decodes one latent frame if there is one and it has a place."""
        if self._work is None:
            self._work = self._next_work()
        if self._work is None:
            self._pass_on_the_end()
            return False
        slot = self._frames.acquire()
        if slot is None:
            return False
        self._decode(slot, self._work)
        return True

    def wait_s(self) -> float:
        return IDLE_WAIT_S

    def close(self) -> None:
        self._work = None

    def _next_work(self) -> BlockInWork | None:
        """Copies the next block's latents out of their slot, which is free again at once."""
        took = self._latents.take() if self._source.is_open else None
        if took is None:
            return None
        taken, message = took
        began = time.monotonic_ns()
        self._timer.begin()
        own = self._source.tensor(taken.slot).to(self._device, copy=True)
        wait(self._device)
        self._latents.release(taken)
        if message.fresh:
            self._stream.begin()
        return BlockInWork(message, own, index=0, began_ns=began)

    def _decode(self, slot: int, work: BlockInWork) -> None:
        message, index = work.message, work.index
        pixels = self._stream.decode(work.latents[index])
        count = len(pixels)
        self._frames_slots.tensor(slot)[:count].copy_(pixels, non_blocking=True)
        self._frames.publish(
            slot,
            FramesReady(
                ring="frames",
                epoch=self._frames.epoch,
                slot=slot,
                block=message.block,
                version=message.version,
                first_frame=self._last_frame(message.block, index) + 1 - count,
                count=count,
                sent_ns=time.monotonic_ns(),
            ),
        )
        self._advance(work)

    def _advance(self, work: BlockInWork) -> None:
        per_block = self._config.stream.frames_per_block
        if work.index + 1 < per_block:
            self._work = replace(work, index=work.index + 1)
            return
        self._work = None
        device_ms = self._timer.end()
        self._to_daemon(
            BlockDone(
                stage="vae_decoder",
                block=work.message.block,
                version=work.message.version,
                began_ns=work.began_ns,
                ended_ns=time.monotonic_ns(),
                device_ms=device_ms,
            )
        )

    def _last_frame(self, block: int, index: int) -> int:
        """Number of the last frame a latent frame decodes to; where its past is lost, the only one."""
        return (block * self._config.stream.frames_per_block + index) * TEMPORAL_STRIDE

    def _pass_on_the_end(self) -> None:
        """The end comes after the last published block, so with nothing left to decode it is the output's turn."""
        if self._last is not None:
            self._frames.send_last(self._last)
            self._last = None
