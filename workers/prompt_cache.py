"""Least-recently-used cache of prompts' embeddings, bounded by bytes. Knows no encoder and no version."""

from collections import OrderedDict

from torch import Tensor


class PromptCache:
    """Embeddings by cleaned text.

    Args:
        max_bytes: what all entries together may take; an entry larger than that is not kept.

    Attributes:
        hits, misses: of `get`.
        nbytes: what the entries take now.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self.hits = 0
        self.misses = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, text: str) -> Tensor | None:
        """The embeddings [n, text_dim] of a text, now the most recently used, or None."""
        embeds = self._entries.get(text)
        if embeds is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(text)
        return embeds

    def put(self, text: str, embeds: Tensor) -> None:
        """Keeps a text's embeddings; the least recently used ones make room."""
        if embeds.nbytes > self._max_bytes:
            return
        old = self._entries.pop(text, None)
        self.nbytes += embeds.nbytes - (0 if old is None else old.nbytes)
        self._entries[text] = embeds
        while self.nbytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.nbytes -= dropped.nbytes
