"""One prompt turning into another over blocks: which embeddings are in force at a block on the way.

Pure: the same switches at the same blocks give the same embeddings. Knows no cache, no seconds and no clock.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """The way from one prompt to the next.

    Attributes:
        old: embeddings [1, m, text_dim] in force before block `first`; None where none were.
        new: [1, n, text_dim], alone in force from the last block of the way on.
        first: the block at which it begins.
        blocks: its length; 1 for a switch at once.
    """

    old: Tensor | None
    new: Tensor
    first: int
    blocks: int

    def at(self, block: int) -> Tensor | None:
        """The embeddings at a block: `old` before the way, `new` after it, [1, max(m, n), text_dim] on it.

        Block i of N, counted from 1, is the part i / N of the way.
        """
        done = block + 1 - self.first
        if done <= 0:
            return self.old
        if self.old is None or done >= self.blocks:
            return self.new
        return between(self.old, self.new, done / self.blocks)

    def goes_on_at(self, block: int) -> bool:
        """Whether a block that is not the first has other embeddings than the block before it."""
        return self.old is not None and 0 < block - self.first < self.blocks


def between(old: Tensor, new: Tensor, part: float) -> Tensor:
    """(1 - part) * old + part * new, where the shorter of the two ends in zeros, as all prompts do."""
    tokens = max(old.shape[1], new.shape[1])
    old, new = (F.pad(embeds, (0, 0, 0, tokens - embeds.shape[1])) for embeds in (old, new))
    return (1 - part) * old + part * new
