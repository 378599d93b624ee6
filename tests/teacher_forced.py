"""What inexact passes make of an exact stream's own context, latents and noise, step by step."""

from collections.abc import Callable
from pathlib import Path

import torch
from golden_cases import Case, relative_error
from stream_case import SMALL, case_rollout

from configs.schema import StreamConfig, VideoConfig
from workers.models.kv_store import KVStore
from workers.models.noise import GivenNoise
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer

MakePasses = Callable[[CausalWanTransformer, StreamConfig, VideoConfig], StaticPasses]


def take_over(mine: KVStore, exact: KVStore) -> None:
    """The same context, in 8 bits where `mine` is."""
    for part, values in zip(mine.layers, exact.layers, strict=True):
        part.fill(*values.read())


def worst_error(case: Case, folder: Path, make: MakePasses) -> float:
    """Of the clean latents of every step of every block of a golden stream, against float32."""
    exact = case_rollout(case, folder, "static")
    assert isinstance(exact.passes, StaticPasses)
    video = SMALL.model_copy(update={"height": 8 * exact.shape[2], "width": 8 * exact.shape[3]})
    mine, other = exact.passes.static, make(exact.model, exact.passes.stream, video)
    noise = GivenNoise(case.tensors["noise"], case.tensors["renoise"], exact.shape, len(exact.schedule.steps))
    prompt = case.tensors["prompt_embeds"][:1]
    exact.switch(prompt)
    other.take_prompt(prompt)
    errors = []
    with torch.inference_mode():
        for block in range(case.config["num_blocks"]):
            plan = exact.layout.denoise(block, exact.anchor)
            shape = exact.passes.fill(plan, block, noise)
            other.fill(plan, block, noise)
            for step in range(len(exact.schedule.steps)):
                take_over(other.static.store, mine.store)
                latents = mine.latents.clone()
                other.static.latents.copy_(latents)
                sigma = mine.sigmas[step]
                flows = [static.flow(step, shape) for static in (other.static, mine)]
                errors.append(relative_error(*(latents - sigma * flow for flow in flows)))
                mine.latents.copy_(latents)
                mine.step(step, shape)
            mine.remember(shape)
    return max(errors)
