"""The denoiser: owns the transformer and its KV cache, makes one block after another, switches prompts between them.

It knows nothing of frames per second, sinks or users: a credit says that a block may begin, a free slot that its
latents have a place.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import RuntimeConfig, StageName
from ipc.errors import InputError
from ipc.messages import (
    Begin,
    BlockDone,
    Credit,
    Drain,
    EmbedsReady,
    EndOfStream,
    ExpectPrompt,
    LatentsReady,
    Message,
    PromptApplied,
    PromptDropped,
)
from ipc.tensor_ring import Slots
from workers.adaptive import AdaptivePresets
from workers.device_timer import device_timer, wait
from workers.inputs import noise_source
from workers.models.checkpoint import load_transformer
from workers.models.denoise import LatentHistory, Rollout
from workers.models.execution import choose_passes
from workers.models.graphs import give_back_unused
from workers.models.noise import DrawnNoise, NoiseSource
from workers.ports import RingReader, RingWriter, Send
from workers.prompt_queue import Apply, Keep, PromptQueue, Wait
from workers.stage import IDLE_WAIT_S

SAY_AGAIN_NS = 500_000_000
"""How often the end of the stream is repeated."""


class DenoiserStage:
    """The `denoiser` stage.

    Args:
        embeds: ring of prompts' embeddings, [text_len, text_dim] float32 a slot.
        latents: ring to the VAE decoder, [F, 16, h, w] float32 a slot.
        history: [window blocks, F, 16, h, w] float32, retained clean latents; it outlives this process.
        blocks: how many blocks to make; None for ever.
        inputs: file with noise to use instead of drawn noise.
        dump: file that receives all clean latents when the stream ends.
        on_pass: called after every transformer pass.
        clock: nanoseconds, rising.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        *,
        embeds: RingReader[EmbedsReady],
        embeds_slots: Slots,
        latents: RingWriter,
        latents_slots: Slots,
        history: Tensor,
        to_daemon: Send,
        blocks: int | None = None,
        inputs: Path | None = None,
        dump: Path | None = None,
        on_pass: Callable[[], None] = lambda: None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name: StageName = "denoiser"
        self.note: str | None = None
        self.warnings: list[str] = []
        self._config = config
        self._device = torch.device(config.stage("denoiser").device or "cpu")
        self._embeds, self._embeds_slots = embeds, embeds_slots
        self._latents, self._latents_slots = latents, latents_slots
        self._history = history
        self._to_daemon = to_daemon
        self._blocks, self._inputs, self._dump = blocks, inputs, dump
        self._on_pass, self._clock = on_pass, clock
        self._timer = device_timer(self._device)
        self._prompts = PromptQueue()
        self._dumped: list[Tensor] = []
        self._credit = -1
        self._begin: Begin | None = None
        self._fresh = True
        self._may_abort = False
        self._draining = False
        self._end_at: int | None = None
        self._end_said_ns = 0
        self._adaptive: AdaptivePresets | None = None

    def load(self) -> None:
        """Weights onto the device, and the noise. Raises UserError."""
        config = self._config
        notes: list[str] = []
        say, warn = notes.append, self.warnings.append
        transformer = load_transformer(config.model, self._device)
        if config.adaptive.is_on:
            self._adaptive = AdaptivePresets(config, transformer, self._after_pass, say, warn)
            passes = self._adaptive.passes
        else:
            passes = choose_passes(config, transformer, self._after_pass, say, own=True, warn=warn)
        self.note = "; ".join(notes)
        self._rollout = Rollout(transformer, config.stream, config.video, LatentHistory(self._history), passes)
        self._noise: NoiseSource = noise_source(self._config, self._rollout.shape, self._inputs, self._blocks)
        self._check_length()

    def _check_length(self) -> None:
        most = self._config.stream.most_blocks
        if most is not None and self._blocks is not None and self._blocks > most:
            raise InputError(
                f"stream.rope: absolute positions end after {most} blocks, {self._blocks} were asked for; set"
                " stream.rope=relative"
            )

    def warm_up(self) -> float:
        """Milliseconds of a block with a full window, on scratch state that is dropped afterwards."""
        if self._adaptive is None:
            block_ms = self._warm_up_passes()
        else:
            block_ms = self._adaptive.warm_up(self._rollout, self._warm_up_passes, self._also_note)
        give_back_unused(self._device)
        return block_ms

    def _also_note(self, line: str) -> None:
        self.note = f"{self.note}; {line}"

    def _warm_up_passes(self) -> float:
        rollout = self._rollout
        rollout.begin(LatentHistory(torch.zeros_like(self._history)))
        rollout.passes.record_all()
        rollout.switch(torch.zeros(1, 1, rollout.model.config.text_dim))
        noise = DrawnNoise(0, rollout.shape)
        rollout.block = self._config.stream.window_blocks
        rollout.denoise_block(noise)
        wait(self._device)  # its clean pass does not belong to the next block's time
        began = self._clock()
        rollout.denoise_block(noise).cpu()
        elapsed_ms = (self._clock() - began) / 1e6
        rollout.begin(LatentHistory(self._history))
        return elapsed_ms

    def receive(self, message: Message) -> None:
        """Credits, prompts that are to be waited for, begin and drain; other messages only wake."""
        match message:
            case Begin():
                self._begin = message
                if self._adaptive is not None and message.preset is not None:
                    self._adaptive.begin_at(message.preset)
            case Credit():
                self._credit = max(self._credit, message.block)
            case ExpectPrompt():
                self._prompts.expect(message.version, message.at)
            case PromptDropped():
                self._prompts.drop(message.version)
            case Drain():
                self._draining = True

    def process(self) -> bool:
        """Makes the next block if it may begin; False if it must wait."""
        took = self._take_embeds()
        if self._end_at is not None:
            self._say_the_end(self._end_at)
        if self._begin is None or self._end_at is not None:
            return took
        block = max(self._rollout.block, self._begin.block)
        if self._draining or block == self._last_block():
            self._end(block)
            return True
        decision = self._prompts.decide(block)
        if block > self._credit or isinstance(decision, Wait):
            return took
        slot = self._latents.acquire()
        if slot is None:
            return took
        if self._adaptive is not None and (changed := self._adaptive.before_block(block, self._rollout)):
            self._to_daemon(changed)
        began, version = self._clock(), self._prompts.version
        self._timer.begin()
        if isinstance(decision, Apply):
            self._put_in_force(decision, block)
        # A block that begins with a prompt is not aborted: every version that was applied is seen.
        may_abort = self._config.stream.switch == "abort" and isinstance(decision, Keep)
        self._hand_over(slot, block, self._denoise(block, may_abort), began)
        self._rollout.remember()
        self._rollout.expect_noise(self._noise)
        took_ms = self._say_done(block, began)
        if self._adaptive is not None and self._prompts.version == version:
            self._adaptive.after_block(block, took_ms)
        return True

    def wait_s(self) -> float:
        return IDLE_WAIT_S

    def close(self) -> None:
        self._dumped.clear()

    def _last_block(self) -> int | None:
        """The block at which the stream must end, if it must: asked for, or the end of absolute positions."""
        ends = [blocks for blocks in (self._blocks, self._config.stream.most_blocks) if blocks is not None]
        return min(ends, default=None)

    def _take_embeds(self) -> bool:
        took = self._embeds.take()
        if took is None:
            return False
        taken, message = took
        embeds = self._embeds_slots.tensor(taken.slot)[: message.tokens].clone()
        self._embeds.release(taken)
        self._prompts.arrive(message.version, message.at, embeds[None])
        return True

    def _put_in_force(self, decision: Apply, block: int) -> None:
        assert self._begin is not None
        began = self._clock()
        if self._rollout.block < self._begin.block:
            self._rollout.resume(self._begin.block, decision.embeds)
            self._fresh = True
        else:
            self._rollout.switch(decision.embeds)
        self._prompts.applied(decision.version, block)
        wait(self._device)
        ended = self._clock()
        self._to_daemon(PromptApplied(version=decision.version, block=block, began_ns=began, ended_ns=ended))

    def _denoise(self, block: int, may_abort: bool) -> Tensor:
        """A block's clean latents; aborted by a prompt that comes meanwhile, it is begun anew under it, once."""
        self._may_abort = may_abort
        latents = self._rollout.denoise(self._noise)
        self._may_abort = False
        if latents is None:
            decision = self._prompts.decide(block)
            assert isinstance(decision, Apply)
            self._put_in_force(decision, block)
            latents = self._rollout.denoise(self._noise)
        assert latents is not None
        return latents

    def _after_pass(self) -> bool:
        """Whether a prompt has come that aborts the block at work."""
        self._on_pass()
        if not self._may_abort:
            return False
        wait(self._device)  # the host, which is ahead, would ask before the step has run
        while self._take_embeds():
            pass
        return isinstance(self._prompts.decide(self._rollout.block), Apply)

    def _hand_over(self, slot: int, block: int, latents: Tensor, began: int) -> None:
        """Before the clean pass, so that decoding begins beside it."""
        version = self._prompts.version
        assert version is not None
        self._latents_slots.tensor(slot).copy_(latents[0], non_blocking=True)
        if self._dump is not None:
            self._dumped.append(latents.cpu())
        self._latents.publish(
            slot,
            LatentsReady(
                ring="latents",
                epoch=self._latents.epoch,
                slot=slot,
                block=block,
                version=version,
                fresh=self._fresh,
                began_ns=began,
                sent_ns=self._clock(),
            ),
        )
        self._fresh = False

    def _say_done(self, block: int, began: int) -> float:
        """After the last work on a block; the milliseconds it took."""
        version = self._prompts.version
        assert version is not None
        device_ms = self._timer.end()
        ended = self._clock()
        times = {"began_ns": began, "ended_ns": ended, "device_ms": device_ms}
        self._to_daemon(BlockDone(stage="denoiser", block=block, version=version, **times))
        return (ended - began) / 1e6

    def _end(self, block: int) -> None:
        if self._dump is not None:
            self._write_dump(self._dump)
        self._end_at = block
        self._say_the_end(block)

    def _say_the_end(self, block: int) -> None:
        """Now and again, because a decoder that is started anew does not know of it."""
        now = self._clock()
        if now - self._end_said_ns >= SAY_AGAIN_NS:
            self._end_said_ns = now
            self._latents.send_last(EndOfStream(blocks=block))

    def _write_dump(self, path: Path) -> None:
        if not self._dumped:
            return
        partial = path.with_name(f".{path.name}.part")
        try:
            save_file({"latents": torch.cat(self._dumped, dim=1).contiguous()}, partial)
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot write the latents: {error.strerror or error}") from error
