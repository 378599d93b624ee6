"""One configuration's streams, by the runtime's model classes in this process: alone, or taught by another's latents.

Latents and frames are those that the runtime gives for the same seed and prompts. Knows nothing of a comparison.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.schema import RuntimeConfig
from ipc.errors import InputError
from workers.models.checkpoint import load_text_encoder, load_tokenizer, load_transformer
from workers.models.denoise import LatentHistory, Rollout
from workers.models.execution import choose_frame_stream, choose_passes
from workers.models.noise import DrawnNoise
from workers.models.prompt_text import clean
from workers.quality.job import Story

Embeddings = Mapping[str, Tensor]
"""By prompt, [1, n, text_dim] float32 on the CPU."""


@dataclass(frozen=True)
class Made:
    """A block.

    Attributes:
        latents: clean, [1, F, 16, h, w] float32 on the CPU.
        frames: [n, H, W, 3] uint8.
    """

    block: int
    latents: Tensor
    frames: np.ndarray


@torch.inference_mode()
def encoded(config: RuntimeConfig, texts: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings of prompts; the encoder is dropped again. Raises InputError for a text of too many tokens."""
    settings = config.stage("text_encoder")
    device, limit = torch.device(settings.device or "cpu"), config.model.transformer.text_len
    tokenizer = load_tokenizer(config.model)
    ids = {text: tokenizer.ids(clean(text)) for text in texts}
    for text, own in ids.items():
        if len(own) > limit:
            raise InputError(f"prompt {text[:40]!r}...: found {len(own)} tokens, at most {limit} are taken; shorten it")
    torch.set_num_threads(settings.threads)
    encoder = load_text_encoder(config.model, device)
    return {text: encoder.encode(torch.tensor(own, device=device))[None].float().cpu() for text, own in ids.items()}


class Streams:
    """A configuration's transformer and decoder, for one stream after the other.

    Args:
        embeddings: of all prompts that will be asked for, by this configuration's own encoder.

    Attributes:
        notes: what was chosen to compute the transformer.

    Raises:
        UserError: weights or devices are not what the configuration says.
    """

    def __init__(self, config: RuntimeConfig, embeddings: Embeddings) -> None:
        self.config, self._embeddings = config, embeddings
        self.notes: list[str] = []
        self._threads(denoising=True)
        device = torch.device(config.stage("denoiser").device or "cpu")
        model = load_transformer(config.model, device)
        passes = choose_passes(config, model, say=self.notes.append, own=True)
        passes.record_all()
        self._rollout = Rollout(model, config.stream, config.video, passes=passes)
        self._threads(denoising=False)
        self._decoder = choose_frame_stream(config, torch.device(config.stage("vae_decoder").device or "cpu"))
        self._decoder.record_all()

    def alone(self, story: Story, blocks: int) -> Iterator[Made]:
        """The blocks of a story as the runtime makes them."""
        for block, latents in self._denoised(story, blocks):
            made = Made(block, latents.cpu(), self._decoded(latents))
            self._rollout.remember()
            yield made

    def taught(self, story: Story, teacher: Sequence[Tensor]) -> Iterator[Made]:
        """The same with the past replaced: a block's own latents are dropped once they are decoded.

        Args:
            teacher: clean latents of every block, [1, F, 16, h, w]. What the cache holds of them, and what the decoder
                has seen of them, is computed here, by this configuration's own rules and numbers.
        """
        for block, latents in self._denoised(story, len(teacher)):
            past = self._decoder.past()
            made = Made(block, latents.cpu(), self._decoded(latents))
            self._decoder.go_back(past)
            self._decoded(teacher[block])
            self._rollout.remember(teacher[block])
            yield made

    def _denoised(self, story: Story, blocks: int) -> Iterator[tuple[int, Tensor]]:
        rollout = self._rollout
        rollout.begin(LatentHistory(torch.zeros(self.config.stream.window_blocks, *rollout.shape)))
        self._decoder.begin()
        noise = DrawnNoise(story.seed, rollout.shape)
        prompts = {scene.block: scene.text for scene in story.prompts}
        for block in range(blocks):
            self._threads(denoising=True)
            if block in prompts:
                rollout.switch(self._embeddings[prompts[block]])
            latents = rollout.denoise(noise)
            assert latents is not None, "nobody ended it"
            yield block, latents

    def _decoded(self, latents: Tensor) -> np.ndarray:
        self._threads(denoising=False)
        frames = [self._decoder.decode(latent).cpu().numpy().copy() for latent in latents[0]]
        self._threads(denoising=True)
        return np.concatenate(frames)

    def _threads(self, *, denoising: bool) -> None:
        torch.set_num_threads(self.config.stage("denoiser" if denoising else "vae_decoder").threads)
