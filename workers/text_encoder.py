"""The text encoder: owns UMT5, the tokenizer and the prompt cache; turns prompts into embeddings.

It knows nothing of blocks or streams; a prompt's block is passed on, not understood. Of several prompts without a
block only the latest is worth encoding: it supersedes the others before they could be applied.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import RuntimeConfig, StageName
from ipc.errors import InputError
from ipc.messages import EmbedsReady, EncodePrompt, Message, PromptDropped, PromptEncoded, PromptRefused
from ipc.tensor_ring import Slots
from workers.inputs import given_embeds
from workers.models.checkpoint import load_text_encoder, load_tokenizer
from workers.models.graphs import give_back_unused
from workers.models.prompt_text import clean
from workers.ports import RingWriter, Send
from workers.prompt_cache import PromptCache
from workers.stage import IDLE_WAIT_S


class TextEncoderStage:
    """The `text_encoder` stage.

    Args:
        embeds: ring to the denoiser.
        slots: its slots, [text_len, text_dim] float32 each.
        inputs: file whose `prompt_embeds` rows are used instead of encoding a text.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        *,
        embeds: RingWriter,
        slots: Slots,
        to_daemon: Send,
        to_denoiser: Send,
        inputs: Path | None = None,
    ) -> None:
        self.name: StageName = "text_encoder"
        self.note: str | None = None
        self.warnings: list[str] = []
        self._config = config
        self._device = torch.device(config.stage("text_encoder").device or "cpu")
        self._limit = config.model.transformer.text_len
        self._embeds, self._slots = embeds, slots
        self._to_daemon, self._to_denoiser = to_daemon, to_denoiser
        self._inputs = inputs
        self._cache = PromptCache(config.prompt_cache_bytes)
        self._pending: list[tuple[EncodePrompt, str, list[int]]] = []

    def load(self) -> None:
        """Tokenizer and encoder. Raises UserError."""
        self._given = given_embeds(self._config, self._inputs)
        self._tokenizer = load_tokenizer(self._config.model)
        self._encoder = load_text_encoder(self._config.model, self._device)

    def warm_up(self) -> None:
        """Encodes a few tokens once; a block costs this stage nothing."""
        self._encode([0, 1, 2, 3])
        give_back_unused(self._device)

    def receive(self, message: Message) -> None:
        """Checks a prompt at once, so that one that cannot be used never supersedes another."""
        if not isinstance(message, EncodePrompt):
            return
        if message.given is not None and self._given is not None:
            self._take_given(message, message.given, self._given)
            return
        text = clean(message.text)
        ids = self._tokenizer.ids(text)
        if not text:
            self._refuse(message, "empty", "prompt: found no text, expected some words")
        elif len(ids) > self._limit:
            self._refuse(
                message,
                "too_long",
                f"prompt: found {len(ids)} tokens, at most {self._limit} are taken; shorten it",
            )
        else:
            self._enqueue(message, text, ids)

    def process(self) -> bool:
        """Encodes the prompt whose block comes first; False if there is none or no slot is free."""
        if not self._pending:
            return False
        slot = self._embeds.acquire()
        if slot is None:
            return False
        prompt, text, ids = self._pending.pop(0)
        began = time.monotonic_ns()
        embeds, cached = self._embeds_of(prompt, text, ids)
        tokens = len(embeds)
        self._slots.tensor(slot)[:tokens].copy_(embeds)
        sent = time.monotonic_ns()
        self._embeds.publish(
            slot,
            EmbedsReady(
                ring="embeds",
                epoch=self._embeds.epoch,
                slot=slot,
                version=prompt.version,
                tokens=tokens,
                at=prompt.at,
                sent_ns=sent,
            ),
        )
        ms = (sent - began) / 1e6
        self._to_daemon(PromptEncoded(version=prompt.version, tokens=tokens, cached=cached, ms=ms, sent_ns=sent))
        return True

    def wait_s(self) -> float:
        return IDLE_WAIT_S

    def close(self) -> None:
        self._pending.clear()

    def _take_given(self, message: EncodePrompt, row: int, given: Tensor) -> None:
        if row >= len(given):
            raise InputError(f"prompt_embeds: holds {len(given)} prompts, prompt {row} was asked for")
        self._enqueue(message, "", [])

    def _enqueue(self, message: EncodePrompt, text: str, ids: list[int]) -> None:
        if message.at is None:
            self._pending = [entry for entry in self._pending if entry[0].at is not None]
        self._pending.append((message, text, ids))
        self._pending.sort(key=lambda entry: (entry[0].at is not None, entry[0].at or 0, entry[0].version))

    def _refuse(self, message: EncodePrompt, code: str, text: str) -> None:
        self._to_denoiser(PromptDropped(version=message.version))
        self._to_daemon(PromptRefused(version=message.version, code=code, text=text))

    def _embeds_of(self, prompt: EncodePrompt, text: str, ids: list[int]) -> tuple[Tensor, bool]:
        """[n, text_dim] float32 on the CPU, and whether they came from the cache."""
        if prompt.given is not None and self._given is not None:
            return self._given[prompt.given], False
        embeds = self._cache.get(text)
        if embeds is not None:
            return embeds, True
        embeds = self._encode(ids)
        self._cache.put(text, embeds)
        return embeds, False

    @torch.inference_mode()
    def _encode(self, ids: list[int]) -> Tensor:
        return self._encoder.encode(torch.tensor(ids)).float().cpu()
