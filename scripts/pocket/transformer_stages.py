"""The stages of the transformer: teacher forcing, self-forcing, adapter; each from files to files in one folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from pocket.charts import save_sheet
from pocket.clips import SLID
from pocket.forcing import Batch, SelfForcing, opening_loss, teacher_forcing_loss
from pocket.latents import pool
from pocket.masters import Masters
from pocket.networks import Networks
from pocket.recipe import Phase
from pocket.training import Training, steps
from workers.models.schedule import Schedule

RANK = 8


def train_teacher(run: Training, begin: Path | None = None) -> None:
    """Flow matching under teacher forcing; writes teacher.safetensors."""
    phase, recipe = run.recipe.teacher, run.recipe
    networks = Networks.build(run, begin, run.compile)
    clips, openings = pool(run, "short"), pool(run, "openings")
    schedule = Schedule.from_config(run.config.stream)
    masters = Masters(
        {"transformer": networks.transformer, "text": networks.text_encoder.model}, phase.rate, warm_up=200
    )
    generator = torch.Generator().manual_seed(run.seed + 2)
    torch.manual_seed(run.seed + 3)
    for step, progress in steps(run, "teacher", phase, masters):
        chosen = clips.chosen(phase.batch, generator)
        batch = clips.batch(chosen).cut(recipe.teacher_blocks * run.config.stream.frames_per_block)
        text = networks.plain.text(networks.embeds(batch.second))
        error = teacher_forcing_loss(networks.fast, schedule, batch, clips.block[chosen], text, 0.15)
        loss = error.sum() / (error > 0).sum()
        loss.backward()
        first = openings.batch(openings.chosen(recipe.opening_batch, generator))
        opening = opening_loss(networks.plain, first, networks.plain.text(networks.embeds(first.second)))
        opening.backward()
        norm = masters.step(progress)
        if step % (max(1, recipe.look // 4)) == 0:
            numbers = {"loss": float(loss.detach()), "opening": float(opening.detach()), "norm": float(norm)}
            run.log("teacher", step=step, **numbers)
        if step % recipe.look == 0 and step:
            _look(run, "teacher", networks, masters, schedule)
    _look(run, "teacher", networks, masters, schedule)
    masters.show_average()
    networks.save(run.file("teacher.safetensors"))


def train_self_forcing(run: Training, begin: Path | None = None) -> None:
    """Few steps on its own rollouts; writes self_forcing.safetensors."""
    networks = Networks.build(run, begin or run.file("teacher.safetensors"), run.compile)
    masters = Masters(
        {"transformer": networks.transformer, "text": networks.text_encoder.model}, run.recipe.self_forcing.rate
    )
    _roll(run, "self_forcing", run.recipe.self_forcing, networks, masters, "short")
    networks.save(run.file("self_forcing.safetensors"))


def train_adapter(run: Training, begin: Path | None = None) -> None:
    """A LoRA on long rollouts with prompt switches; writes adapter.safetensors."""
    networks = Networks.build(run, begin or run.file("self_forcing.safetensors"))
    networks.transformer.requires_grad_(False)
    networks.text_encoder.requires_grad_(False)
    targets = sorted({n for n, m in networks.transformer.blocks[0].named_modules() if isinstance(m, nn.Linear)})
    for layer in networks.transformer.blocks:
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), layer)
    networks.transformer.to(run.device, torch.bfloat16)
    masters = Masters({"transformer": networks.transformer}, run.recipe.adapter.rate, weight_decay=0.0)
    _roll(run, "adapter", run.recipe.adapter, networks, masters, "long")
    state = networks.transformer.state_dict()
    adapter = {
        f"base_model.model.{name.replace('.default', '')}": tensor.contiguous().cpu()
        for name, tensor in state.items()
        if "lora_" in name
    }
    save_file(adapter, run.file("adapter.safetensors"))


def _roll(run: Training, stage: str, phase: Phase, networks: Networks, masters: Masters, clips_of: str) -> None:
    clips = pool(run, clips_of)
    schedule = Schedule.from_config(run.config.stream)
    forcing = SelfForcing(networks.plain, run.config.stream, schedule, fast=networks.fast)
    generator = torch.Generator().manual_seed(run.seed + 4)
    torch.manual_seed(run.seed + 5)
    blocks = torch.unique(clips.block).tolist()
    for step, progress in steps(run, stage, phase, masters):
        likely = torch.tensor([4.0 if block == 0 else 1.0 if block < SLID else 2.5 for block in blocks])
        block = blocks[int(torch.multinomial(likely, 1, generator=generator))]
        batch = clips.batch(clips.chosen(phase.batch, generator, block), block)
        losses = _learn(networks, forcing, batch, _given(batch, networks, generator) if step % 2 else 0)
        norm = masters.step(progress)
        if step % max(1, run.recipe.look // 8) == 0:
            run.log(stage, step=step, loss=float(sum(losses) / len(losses)), block=block, norm=float(norm))
        if step % run.recipe.look == 0 and step:
            _look(run, stage, networks, masters, schedule)
    _look(run, stage, networks, masters, schedule)
    masters.show_average()


def _given(batch: Batch, networks: Networks, generator: torch.Generator) -> int:
    """How many blocks a rollout is given: what was before a change of scene, or any number."""
    blocks = batch.latents.shape[1] // networks.plain.per_block
    return batch.block or int(torch.randint(blocks - 1, (), generator=generator))


def _learn(networks: Networks, forcing: SelfForcing, batch: Batch, given: int) -> list[Tensor]:
    """Gradients of one rollout, block by block; those of the text encoder last."""
    embeds = [networks.embeds(ids) for ids in (batch.first, batch.second)]
    leaves = [e.detach().requires_grad_(e.requires_grad) for e in embeds]
    losses: list[Tensor] = []
    count = batch.latents.shape[1] // networks.plain.per_block - given

    def learn(loss: Tensor) -> None:
        (loss / count).backward()
        losses.append(loss.detach())

    forcing.rollout(batch, lambda after: networks.plain.text(leaves[int(after)]), learn, given)
    for made, leaf in zip(embeds, leaves, strict=True):
        if leaf.grad is not None:
            made.backward(leaf.grad)
    return losses


@torch.no_grad()
def _look(run: Training, stage: str, networks: Networks, masters: Masters, schedule: Schedule) -> None:
    """Rollouts of held-out stories under the averaged weights: their error by block, and a sheet of frames."""
    masters.show_average()
    networks.save(run.file(f"{stage}_so_far.safetensors"))
    clips = pool(run, "held_out")
    count = min(64, len(clips.block))
    batch = clips.batch(torch.arange(count, device=run.device))
    embeds = networks.embeds(batch.second)
    text = networks.plain.text(embeds)
    forcing = SelfForcing(networks.plain, run.config.stream, schedule, draw=_same_noise(run))
    lesson = forcing.rollout(batch, lambda after: text)
    errors = [float(e.mean()) for e in lesson.errors]
    run.log(f"{stage}_look", step=masters.steps, **{f"block{i}": e for i, e in enumerate(errors)})
    masters.show_masters()
    save_sheet(run, stage, lesson.latents[:8], batch.latents[:8])


def _same_noise(run: Training) -> Callable[[Tensor], Tensor]:
    """Noise that is the same in every look: looks differ by the weights alone."""
    generator = torch.Generator().manual_seed(run.seed + 6)
    return lambda like: torch.randn(like.shape, generator=generator).to(like)
