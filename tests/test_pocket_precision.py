"""What eight bits do to the pictures of the shipped weights, each block from the exact stream's context and noise."""

import math
from collections.abc import Iterator

import pytest
import torch
from teacher_forced import take_over
from torch import Tensor

from configs.load import load_config
from configs.schema import RuntimeConfig
from workers.models.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae_decoder
from workers.models.denoise import Rollout
from workers.models.fp8 import Fp8Linears
from workers.models.fp8_attention import widened
from workers.models.noise import DrawnNoise
from workers.models.prompt_text import clean
from workers.models.static_passes import StaticPasses
from workers.models.vae import VaeDecoder

PROMPTS = ("a red circle moving right", "two yellow squares hopping on a checkered background")
BLOCKS = 3
BAR_DB = 30.0
KINDS = ("int8 keys and values", "fp8 keys and values", "fp8 linears", "fp8 attention", "fp8 linears and attention")
Decibels = dict[str, list[tuple[int, float, float]]]
"""By kind, of every block of every prompt: its number, all steps by it, the last step by it alone."""
pytestmark = pytest.mark.timeout(300)


def embeddings(config: RuntimeConfig) -> Iterator[Tensor]:
    tokenizer, encoder = load_tokenizer(config.model), load_text_encoder(config.model, torch.device("cpu"))
    for prompt in PROMPTS:
        yield encoder.encode(torch.tensor(tokenizer.ids(clean(prompt))))[None]


def pixels(decoder: VaeDecoder, latents: Tensor, cache: dict[int, Tensor]) -> Tensor:
    frames = [decoder.decode(latent, cache)[0] for latent in latents.unbind(1)]
    return torch.cat(frames).float().clamp(-1, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in -1 to 1."""
    return float(-10 * torch.log10((one - other).square().mean() / 4))


class Stream:
    """A stream of one prompt, exactly and by others."""

    def __init__(self, exact: StaticPasses, others: dict[str, StaticPasses], video: RuntimeConfig, seed: int) -> None:
        self.exact, self.others = exact, others
        self.rollout = Rollout(exact.model, video.stream, video.video, passes=exact)
        self.noise = DrawnNoise(seed, self.rollout.shape)

    def begin(self, embeds: Tensor) -> None:
        self.rollout.switch(embeds)
        for other in self.others.values():
            other.take_prompt(embeds)

    def block(self) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Clean latents of the next block: exact, and by each of the others with all steps and with the last alone."""
        rollout, mine = self.rollout, self.exact.static
        plan, number = rollout.layout.denoise(rollout.block, rollout.anchor), rollout.block
        shape = self.exact.fill(plan, number, self.noise)
        whole = {}
        for name, other in self.others.items():
            other.fill(plan, number, self.noise)
            take_over(other.static.store, mine.store)
            for step in range(len(mine.sigmas)):
                other.static.step(step, shape)
            whole[name] = other.static.latents.clone()
        for step in range(len(mine.sigmas)):
            latents = mine.latents.clone()
            mine.step(step, shape)
        made = {}
        for name, other in self.others.items():
            other.static.latents.copy_(latents)
            other.static.step(len(mine.sigmas) - 1, shape)
            made[name] = whole[name][None], other.static.latents.clone()[None]
        exact = mine.latents.clone()[None]
        self.exact.remember(plan, exact)
        rollout.block += 1
        return exact, made


@pytest.fixture(scope="module")
def decibels() -> Decibels:
    """All kinds over the same streams."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config, cpu = load_config("pocket"), torch.device("cpu")
    model, decoder = load_transformer(config.model, cpu), load_vae_decoder(config.model, cpu)
    attend_fp8 = widened(model.attention.attend, model.dtype)
    both = {"linear": Fp8Linears(), "attend_fp8": attend_fp8}
    exact, *others = (
        StaticPasses(model, config.stream, config.video, **given)
        for given in ({}, {"kv": "int8"}, {"kv": "fp8"}, {"linear": Fp8Linears()}, {"attend_fp8": attend_fp8}, both)
    )
    out: Decibels = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        for seed, embeds in enumerate(embeddings(config)):
            stream, cache = Stream(exact, dict(zip(KINDS, others, strict=True)), config, seed), decoder.new_cache()
            stream.begin(embeds)
            for block in range(BLOCKS):
                before = {number: past.clone() for number, past in cache.items()}
                latents, made = stream.block()
                picture = pixels(decoder, latents, cache)
                for kind, two in made.items():
                    pasts = [{number: past.clone() for number, past in before.items()} for _ in two]
                    shown = (pixels(decoder, latents, past) for latents, past in zip(two, pasts, strict=True))
                    out[kind].append((block, *(psnr(frames, picture) for frames in shown)))
    torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_block_stay_near(decibels: Decibels, kind: str) -> None:
    """From the exact latents of the last step; 8 bits are really used, so some error there is where there is a past."""
    assert len(decibels[kind]) == len(PROMPTS) * BLOCKS
    assert all(last >= BAR_DB for _, _, last in decibels[kind])
    assert all(math.isfinite(last) for block, _, last in decibels[kind] if block > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_blocks_stay_near(decibels: Decibels, kind: str) -> None:
    """All steps by it."""
    assert min(db for _, db, _ in decibels[kind]) >= BAR_DB
