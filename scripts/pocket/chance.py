"""Where a stream's first object starts, read off the first block's noise: the one chance there is.

Of the tokens that touch no edge, the one with the largest mean noise in the first channel has the start inside; the
means of its second and third channel say where in it. So from noise and prompt there is one right first block, squared
error does not blur it, and another seed is another start. Knows no network.
"""

import torch
from torch import Tensor

from pocket.world import HEIGHT, WIDTH

TOKEN = 16
"""Pixels a side of what one token shows."""
PATCH = 2
"""Latent cells a side of a token."""
EDGE = 1e-3
"""Nearest to a token's edge that a start is, as a share of the token."""


def place(noise: Tensor) -> Tensor:
    """The start that noise of a first block [B, F, 16, h, w] says: [B, 2], x and y in pixels, uniform."""
    token, means, columns = _loudest(noise)
    inside = torch.special.ndtr(means)
    corner = torch.stack([token % columns, token.div(columns, rounding_mode="floor")], dim=1) + 1
    return (corner + inside) * TOKEN


def coupled(noise: Tensor, start: Tensor) -> Tensor:
    """The same noise [B, F, 16, h, w], changed so that it says the starts [B, 2].

    Tokens trade places in the first channel, and two means are replaced: over uniform starts this is free noise again.

    Raises:
        ValueError: a start lies in a token that touches an edge.
    """
    cells = noise.shape[1] * PATCH**2
    token, _, columns = _loudest(noise)
    at = start / TOKEN - 1
    if bool((at < 0).any()) or bool((at >= at.new_tensor([WIDTH / TOKEN - 2, HEIGHT / TOKEN - 2])).any()):
        raise ValueError(f"starts lie {TOKEN} pixels or more from every edge")
    wanted = at[:, 1].long() * columns + at[:, 0].long()
    tokens = _tokens(noise)
    out, rows = tokens.clone(), torch.arange(len(noise), device=noise.device)
    out[rows, wanted, 0], out[rows, token, 0] = tokens[rows, token, 0], tokens[rows, wanted, 0]
    means = torch.special.ndtri(at.frac().clamp(EDGE, 1 - EDGE)) / cells**0.5
    pair = out[rows, wanted, 1:3]
    out[rows, wanted, 1:3] = pair - pair.mean(dim=2, keepdim=True) + means.to(pair)[:, :, None]
    return _untokens(out, noise)


def _loudest(noise: Tensor) -> tuple[Tensor, Tensor, int]:
    """The loudest token inside the edges [B], its two means in deviations [B, 2], and tokens in a row of these."""
    tokens = _tokens(noise)
    means = tokens[:, :, :3].mean(dim=3) * tokens.shape[3] ** 0.5
    token = means[:, :, 0].argmax(dim=1)
    return token, means[torch.arange(len(noise), device=noise.device), token, 1:], noise.shape[4] // PATCH - 2


def _tokens(noise: Tensor) -> Tensor:
    """[B, F, C, h, w] -> [B, tokens inside the edges, C, cells]."""
    patches = noise.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))[:, :, :, 1:-1, :, 1:-1]
    return patches.permute(0, 3, 5, 2, 1, 4, 6).flatten(4).flatten(1, 2)


def _untokens(tokens: Tensor, noise: Tensor) -> Tensor:
    """The reverse of `_tokens`, around it what `noise` has."""
    frames, _, height, width = noise.shape[1:]
    rows, columns = height // PATCH - 2, width // PATCH - 2
    patches = tokens.unflatten(3, (frames, PATCH, PATCH)).unflatten(1, (rows, columns)).permute(0, 4, 3, 1, 5, 2, 6)
    out = noise.clone()
    out[:, :, :, PATCH:-PATCH, PATCH:-PATCH] = patches.flatten(5).flatten(3, 4)
    return out
