"""Attention of one layer: every backend at every length of the window, the recache, the prompt, and in FP8."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu.micro.bench import Bench, off_by
from workers.models.attention import CHECKED_ROWS, TRIED, Attend, Unavailable, backend
from workers.models.fp8_attention import SPLITS, flash3
from workers.models.kernels import E4M3, rounded
from workers.models.static import PADDING_KEYS, TextKV, attention, padding_biases


def run(bench: Bench) -> None:
    """Self-attention, then cross-attention."""
    backends = _installed(bench)
    fp8 = _in_fp8(bench)
    for queries, keys in sizes(bench):
        q, k, v = (_drawn(bench, length) for length in (queries, keys, keys))
        rows = torch.linspace(0, queries - 1, min(CHECKED_ROWS, queries)).long().to(bench.device)
        exact = in_float32(q[0, rows], k[0], v[0])
        flops = 4.0 * queries * keys * q.shape[2] * q.shape[3]
        what = f"{queries:,} queries, {keys:,} keys"
        for name, attend in backends.items():
            call = partial(attend, q, k, v)
            error = partial(_off, call, rows, exact)
            # All logits of `math` lie in memory: a graph would hold them twice.
            bench.measure(f"{name}, {what}", [call], flops=flops, error=error, graph=name != "math")
            bench.give_back()
        for name, attend in fp8.items():
            call = partial(attend, *(rounded(x, E4M3) for x in (q, k, v)))
            error = partial(_off, call, rows, exact)
            bench.measure(f"{name}, {what}", [call], flops=flops, error=error, note="rounding to e4m3 not counted")
    _cross(bench)


def sizes(bench: Bench) -> list[tuple[int, int]]:
    """Queries and keys: a block over a window that fills, and the recache of all blocks but the sink's."""
    stream, block = bench.config.stream, bench.tokens
    recached = (stream.window_blocks - stream.sink_blocks) * block
    return [*((block, block * blocks) for blocks in range(1, stream.window_blocks + 1)), (recached, recached)]


def in_float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with all logits in float32: q [Lq, heads, head_dim], k and v [Lk, ...], bias [1, Lk]."""
    logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits += bias.float()
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.float())


def _installed(bench: Bench) -> dict[str, Attend]:
    """Calls of the backends that are there by name; a row for each that is not."""
    found = {}
    for name in (*TRIED, "math"):
        try:
            found[name] = backend(name, bench.device, bench.dtype)
        except Unavailable as problem:
            bench.add(f"{name}", note=f"not measured: {problem}")
    return found


def _in_fp8(bench: Bench) -> dict[str, Attend]:
    """The ways of the runtime to attend in e4m3, by name; a row where there is none."""
    try:
        return {
            "flash3 in e4m3" + (f", {splits} parts" if splits else ""): flash3(bench.device, bench.dtype, splits=splits)
            for splits in SPLITS
        }
    except Unavailable as problem:
        bench.add("flash3 in e4m3", note=f"not measured: needs FlashAttention-3 on a Hopper GPU, found {problem}")
        return {}


def _cross(bench: Bench) -> None:
    """The prompt's keys with the bias of its padding, at every length that occurs."""
    transformer = bench.config.model.transformer
    heads, text_len = transformer.num_heads, transformer.text_len
    lengths = (*(length for length in TextKV.LENGTHS if length < text_len), text_len)
    rows = torch.linspace(0, bench.tokens - 1, min(CHECKED_ROWS, bench.tokens)).long().to(bench.device)
    for length in lengths:
        q = bench.draw(bench.tokens, heads, transformer.head_dim)
        k, v = (bench.draw(text_len, heads, transformer.head_dim)[:length] for _ in range(2))
        prompt = length - PADDING_KEYS[bench.dtype]
        biases = [0.0] * prompt + padding_biases(text_len - prompt, bench.dtype)
        bias = torch.zeros(1, text_len, device=bench.device, dtype=bench.dtype)
        bias[0, :length] = torch.tensor(biases)
        call = partial(attention, q, k, v, bias[:, :length])
        exact = in_float32(q[rows], k, v, bias[:, :length])
        bench.measure(
            f"cross-attention with bias, {bench.tokens:,} queries, {length} keys",
            [call],
            flops=4.0 * bench.tokens * length * transformer.dim,
            error=lambda call=call, exact=exact: off_by(call()[rows], exact),
        )


def _drawn(bench: Bench, length: int) -> Tensor:
    transformer = bench.config.model.transformer
    return bench.draw(1, length, transformer.num_heads, transformer.head_dim)


def _off(call: Callable[[], Tensor], rows: Tensor, exact: Tensor) -> float:
    return off_by(call()[0, rows], exact)
