"""A denoiser stage for tests, with a tiny model and its rings in this process's memory; the test is its neighbours."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_files import TINY
from torch import Tensor

from configs.load import load_config
from configs.rings import RingSpec, history_shape, ring_specs
from configs.schema import RuntimeConfig
from ipc.messages import Begin, Credit, EmbedsReady, LatentsReady, Message, PromptApplied
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import Consumer, Producer, SlotRing, State, header_nbytes
from ipc.tensor_ring import HostSlots, ImmediateCompletion, TensorSpec
from workers.denoiser import DenoiserStage
from workers.ports import RingReader, RingWriter, Send

PLENTY = 10**6
"""Of credit: the output never holds a block up."""


def tiny_config(*overrides: str) -> RuntimeConfig:
    """Pocket with networks as small as they come, drawn from a seed, and a picture of 32x32."""
    return load_config("pocket", [*TINY, "video.height=32", "video.width=32", "model.vae.base_dim=8", *overrides])


class MemoryRing:
    """A ring with both of its ends here."""

    def __init__(self, spec: RingSpec) -> None:
        header = SlotRing(SharedMemory.create("header", header_nbytes(spec.slots)), spec.slots)
        header.initialise()
        self.name, self._header = spec.name, header
        memory = SharedMemory.create("slots", spec.slots * spec.slot_nbytes)
        self.slots = HostSlots(memory, spec.slots, TensorSpec(spec.shape, getattr(torch, spec.dtype)))

    @property
    def has_free(self) -> bool:
        return bool(self._header.find(State.FREE))

    def writer(self, wake: Send) -> RingWriter:
        return RingWriter(Producer(self._header), ImmediateCompletion().after, wake)

    def reader(self, kind: type[Message]) -> RingReader:
        return RingReader(self.name, Consumer(self._header), kind, wake=ignore)


def ignore(message: Message) -> None:
    """Wakes nobody, where nobody sleeps."""


@dataclass(frozen=True)
class MadeBlock:
    """What the VAE decoder would get."""

    block: int
    version: int
    fresh: bool
    latents: Tensor


class DenoiserCase:
    """A loaded denoiser that may begin.

    Args:
        on_pass: called after every transformer pass, as progress is.
        begin: the block at which the denoiser goes on after a restart.
        to_decoder: wakes the VAE decoder.
        clock: nanoseconds, rising.

    Attributes:
        passes: how many there were.
        said: messages to the daemon.
    """

    def __init__(
        self,
        *overrides: str,
        on_pass: Callable[[], object] = lambda: None,
        begin: int = 0,
        to_decoder: Send = ignore,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.config = tiny_config(*overrides)
        rings = ring_specs(self.config)
        self._embeds, self.latents = MemoryRing(rings["embeds"]), MemoryRing(rings["latents"])
        self._text_encoder = self._embeds.writer(ignore)
        self.decoder = self.latents.reader(LatentsReady)
        self.said: list[Message] = []
        self.passes = 0
        self._then = on_pass
        self.history = torch.zeros(history_shape(self.config))
        self.stage = DenoiserStage(
            self.config,
            embeds=self._embeds.reader(EmbedsReady),
            embeds_slots=self._embeds.slots,
            latents=self.latents.writer(to_decoder),
            latents_slots=self.latents.slots,
            history=self.history,
            to_daemon=self.said.append,
            on_pass=self._count,
            clock=clock,
        )
        self.stage.load()
        self.stage.receive(Begin(block=begin))
        self.stage.receive(Credit(block=PLENTY))

    def _count(self) -> None:
        self.passes += 1
        self._then()

    @property
    def takes_prompt(self) -> bool:
        """Whether the text encoder has a free slot."""
        return self._embeds.has_free

    def prompt(self, version: int, at: int | None = None, tokens: int = 4) -> None:
        """A prompt's embeddings come out of the text encoder; they are the version's alone."""
        slot = self._text_encoder.acquire()
        assert slot is not None
        self._embeds.slots.tensor(slot)[:tokens] = self.embeds(version, tokens)
        self._text_encoder.publish(
            slot,
            EmbedsReady(
                ring="embeds",
                epoch=self._text_encoder.epoch,
                slot=slot,
                version=version,
                tokens=tokens,
                at=at,
                sent_ns=0,
            ),
        )

    def embeds(self, version: int, tokens: int = 4) -> Tensor:
        """[tokens, text_dim]."""
        generator = torch.Generator().manual_seed(version)
        return torch.randn(tokens, self.config.model.transformer.text_dim, generator=generator)

    def block(self) -> MadeBlock:
        """Lets the stage work until it has made a block."""
        while True:
            assert self.stage.process(), "it waits"
            if (made := self.take()) is not None:
                return made

    def take(self) -> MadeBlock | None:
        """The oldest block that was handed over and not yet taken."""
        took = self.decoder.take()
        if took is None:
            return None
        taken, message = took
        latents = self.latents.slots.tensor(taken.slot).clone()
        self.decoder.release(taken)
        return MadeBlock(message.block, message.version, message.fresh, latents)

    @property
    def applied(self) -> list[tuple[int, int]]:
        """Versions and the blocks at which they were said to be applied."""
        return [(m.version, m.block) for m in self.said if isinstance(m, PromptApplied)]
