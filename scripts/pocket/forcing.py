"""What the transformer learns from: clean pasts first (teacher forcing), then its own rollouts (self-forcing).

The first block's noise says where objects start (`pocket.chance`), so that from noise, prompt and past there is one
right answer, and few steps can be sharp.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.schema import StreamConfig
from pocket.chance import coupled
from pocket.network import Kept, Text, TrainedTransformer
from workers.models.rope import rotate
from workers.models.schedule import Schedule

TRUSTED_ERROR = 0.6
"""Squared error of a block from which on the right answer for the next says little: it has another past."""
ANSWER_BLOCKS = 2
"""Blocks from a change of scene on that count twice: what it answers to is new there."""


@dataclass(frozen=True)
class Batch:
    """Clips of which all change scene at the same block, or none.

    Attributes:
        latents: [B, T, 16, h, w] float32, the right answer.
        weight: [B, T, 1, h, w], what an error there counts; objects are small.
        start: [B, 2] pixels, where the first object is in the first frame.
        block: where the scene changes; 0 for never.
        first, second: token ids of the captions before and after, [B, n], 0 after their end.
    """

    latents: Tensor
    weight: Tensor
    start: Tensor
    block: int
    first: Tensor
    second: Tensor

    def cut(self, frames: int) -> "Batch":
        """The same clips, their first latent frames only."""
        return replace(self, latents=self.latents[:, :frames], weight=self.weight[:, :frames])


def weighed(off: Tensor, weight: Tensor) -> Tensor:
    """Mean square of off [..., F, 16, h, w] under weight [..., F, 1, h, w], [...]."""
    squares = (weight * off.square()).mean(dim=-3)
    return squares.sum(dim=(-3, -2, -1)) / weight.sum(dim=(-4, -3, -2, -1))


def teacher_forcing_loss(
    network: TrainedTransformer, schedule: Schedule, batch: Batch, from_block: Tensor, text: Text, corruption: float
) -> Tensor:
    """Squared error of the flow, given clean pasts, [B, blocks].

    Args:
        from_block: [B] the first block that `text` describes; earlier ones do not count.
        corruption: largest deviation of noise added to the past, as the model's own errors will be.
    """
    clean, device = batch.latents, batch.latents.device
    size = network.per_block
    count, blocks = len(clean), clean.shape[1] // size
    levels = torch.tensor([schedule.sigma_at(t) for t in schedule.steps], device=device)
    sigma = torch.where(
        torch.rand(count, blocks, device=device) < 0.6,
        levels[torch.randint(len(levels), (count, blocks), device=device)],
        torch.rand(count, blocks, device=device).clamp(min=0.02),
    )
    sigma[:, 0] = torch.where(torch.rand(count, device=device) < 0.7, 1.0, sigma[:, 0])
    noise = torch.randn_like(clean)
    pure = sigma[:, 0] == 1.0
    noise[:, :size] = torch.where(
        pure[:, None, None, None, None], coupled(noise[:, :size], batch.start), noise[:, :size]
    )
    level = sigma.repeat_interleave(size, dim=1)[..., None, None, None]
    noisy = (1 - level) * clean + level * noise
    past = clean + corruption * torch.rand(count, 1, 1, 1, 1, device=device) * torch.randn_like(clean)
    flow = network.teacher_forced(past, noisy, sigma * 1000, text)
    off = flow - (noise - clean)
    error = weighed(off.unflatten(1, (blocks, size)), batch.weight.unflatten(1, (blocks, size)))
    return error * (torch.arange(blocks, device=device) >= from_block[:, None])


def opening_loss(network: TrainedTransformer, batch: Batch, text: Text) -> Tensor:
    """Squared error of the flow of first blocks from noise alone, which says where the first object is."""
    clean = batch.latents
    noise = coupled(torch.randn_like(clean), batch.start)
    flow, _ = network.pass_over(noise, 1000.0, 0, text, ())
    return weighed(flow - (noise - clean), batch.weight).mean()


@dataclass
class Lesson:
    """What a rollout gave, without gradients: weighed squared error of each block's latents [B], and all latents."""

    errors: list[Tensor]
    latents: Tensor


class SelfForcing:
    """Rollouts as the runtime makes them, with gradients through one step of every block.

    Args:
        draw: normal noise of a tensor's shape.
        fast: the same network for passes over one block, whose shapes stay.
    """

    def __init__(
        self,
        network: TrainedTransformer,
        stream: StreamConfig,
        schedule: Schedule,
        draw: Callable[[Tensor], Tensor] = torch.randn_like,
        fast: TrainedTransformer | None = None,
    ) -> None:
        self.network, self.stream, self.schedule, self.draw = network, stream, schedule, draw
        self.fast = fast or network
        self.sigmas = [schedule.sigma_at(step) for step in schedule.steps]

    def rollout(
        self,
        batch: Batch,
        text_of: Callable[[bool], Text],
        learn: Callable[[Tensor], None] | None = None,
        given: int = 0,
    ) -> Lesson:
        """One rollout over all blocks of the clips.

        Args:
            text_of: the text before (False) or after (True) the change; called anew wherever gradients are to flow.
            learn: takes the loss of a block, for its backward pass; None to only look.
            given: blocks at the beginning that are the right answer and not made.
        """
        size, kept, made, errors = self.network.per_block, {}, [], []
        with torch.no_grad():
            text = text_of(batch.block == 0)
        trust = torch.ones(len(batch.latents), device=batch.latents.device)
        for block in range(batch.latents.shape[1] // size):
            if block and block == batch.block:
                with torch.no_grad():
                    text = text_of(True)
                    self.recache(kept, block, text, made)
            here = slice(block * size, (block + 1) * size)
            target, weight = batch.latents[:, here], batch.weight[:, here]
            context = self.network.context(kept, block)
            if block < given:
                clean = target
            else:
                noise = self.draw(target)
                if block == 0:
                    noise = coupled(noise, batch.start)
                with torch.no_grad():
                    inputs, clean = self.steps(noise, block, text, context)
                if learn is not None:
                    step = int(torch.randint(len(inputs), ()))
                    again = text_of(batch.block == 0 or block >= batch.block)
                    predicted = self.predict(inputs[step], step, block, again, context)
                    error = weighed(predicted - target, weight)
                    answers = batch.block and batch.block <= block < batch.block + ANSWER_BLOCKS
                    learn((1 + bool(answers)) * (trust * error).sum() / trust.sum() / self.sigmas[step])
            with torch.no_grad():
                first = block * size
                _, kept[block] = self.fast.pass_over(clean, self.stream.context_noise, first, text, context)
            made.append(clean)
            errors.append(weighed(clean - target, weight))
            trust = 1 / (1 + (errors[-1] / TRUSTED_ERROR) ** 2)
        return Lesson(errors, torch.cat(made, dim=1))

    def steps(
        self, x: Tensor, block: int, text: Text, context: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """All steps of a block: what each step begins with, and the clean latents at the end."""
        inputs = []
        for step in range(len(self.sigmas)):
            inputs.append(x)
            clean = self.predict(x, step, block, text, context)
            if step + 1 < len(self.sigmas):
                sigma = self.sigmas[step + 1]
                x = (1 - sigma) * clean + sigma * self.draw(clean)
        return inputs, clean

    def predict(self, x: Tensor, step: int, block: int, text: Text, context: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Clean latents as seen from one step."""
        first = block * self.network.per_block
        flow, _ = self.fast.pass_over(x, self.schedule.steps[step], first, text, context)
        return x - self.sigmas[step] * flow

    def recache(self, kept: dict[int, Kept], block: int, text: Text, made: list[Tensor]) -> None:
        """Recomputes what earlier blocks left, under another text, as `CacheLayout.recache` plans it."""
        window, sink = self.stream.window_blocks, self.stream.sink_blocks
        size = self.network.per_block
        blocks = range(block) if block <= window else range(block - (window - sink), block)
        context = []
        if block > window and sink:
            turn = self.network.turn(range((blocks.start - sink) * size, blocks.start * size))
            for layer in range(len(self.network.model.blocks)):
                raw = torch.cat([kept[b].raw[layer] for b in range(sink)], dim=1)
                context.append((rotate(raw, turn), torch.cat([kept[b].v[layer] for b in range(sink)], dim=1)))
        latents = torch.cat([made[b] for b in blocks], dim=1)
        _, left = self.network.pass_over(latents, self.stream.context_noise, blocks.start * size, text, context)
        tokens = size * self.network.patches
        for i, b in enumerate(blocks):
            cut = slice(i * tokens, (i + 1) * tokens)
            kept[b] = Kept(*([t[:, cut] for t in part] for part in (left.raw, left.turned, left.v)))
