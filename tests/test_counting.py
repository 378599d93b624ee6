"""What `scripts/counting.py` counts, beside counts by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from counting import AttentionCounted, Counted
from torch import Tensor


def counted(work: Callable[[], object]) -> Counted:
    tally = Counted(flops_per_s=1e9, bytes_per_s=1e9)
    with torch.inference_mode(), AttentionCounted(tally), tally:
        work()
    return tally


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("keys", [96, 33])
def test_attention_is_one_kernel_without_logits_in_memory(device: str, keys: int) -> None:
    batch, heads, queries, dim = 1, 4, 24, 16
    q = torch.zeros(batch, heads, queries, dim, device=device)
    k, v = (torch.zeros(batch, heads, keys, dim, device=device) for _ in range(2))
    tally = counted(lambda: F.scaled_dot_product_attention(q, k, v))
    assert tally.kernels == 1
    assert tally.flops == 4 * batch * heads * queries * keys * dim
    assert tally.bytes == 2 * q.nbytes + k.nbytes + v.nbytes


def test_attention_of_tokens_before_heads_leaves_tokens_before_heads() -> None:
    """As fused kernels lay it out, so that heads are joined without a copy, on the meta device as on any."""
    q = torch.zeros(24, 4, 16, device="meta")

    def work() -> Tensor:
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, q, q)))
        return out[0].transpose(0, 1).flatten(-2)

    assert counted(work).kernels == 1


def test_a_linear_is_its_product() -> None:
    x, weight, bias = torch.zeros(10, 32), torch.zeros(64, 32), torch.zeros(64)
    tally = counted(lambda: F.linear(x, weight, bias))
    assert tally.flops == 2 * 10 * 32 * 64
    assert tally.bytes == 4 * (10 * 32 + 64 * 32 + 64 + 10 * 64)


def test_a_change_of_dtype_is_a_copy_and_none_is_none() -> None:
    x = torch.zeros(100)
    assert counted(lambda: x.bfloat16()).bytes == 100 * (4 + 2)
    assert counted(lambda: x.float()).kernels == 0


def test_a_view_is_nothing_and_flattening_what_is_not_contiguous_a_copy() -> None:
    x = torch.zeros(8, 6, 4)
    assert counted(lambda: x.flatten(1)[2:].transpose(0, 1)).kernels == 0
    assert counted(lambda: x.transpose(0, 1).flatten(1)).bytes == 2 * x.nbytes


def test_rows_put_into_a_cache_count_alone() -> None:
    cache, rows, at = torch.zeros(1000, 8), torch.ones(3, 8), torch.tensor([1, 5, 7])
    assert counted(lambda: cache.index_copy_(0, at, rows)).bytes == 2 * rows.nbytes


def test_memory_that_is_only_allocated_is_nothing() -> None:
    assert counted(lambda: torch.empty(1000)).bytes == 0


def test_what_is_fused_is_one_kernel_of_its_ends() -> None:
    x = torch.zeros(100)
    tally = Counted(1e9, 1e9)
    with tally:
        tally.fused(lambda x: (x * 2 + 1).exp())(x)
    assert (tally.kernels, tally.bytes) == (1, 2 * x.nbytes)


def test_what_can_be_fused_into_products_is_told_apart() -> None:
    x, weight = torch.zeros(10, 32), torch.zeros(64, 32)
    tally = counted(lambda: F.silu(F.linear(x, weight)) + 1)
    product = 4 * (10 * 32 + 64 * 32 + 10 * 64)
    assert tally.product_bytes == product < tally.bytes
    assert tally.product_seconds == pytest.approx(2 * 10 * 32 * 64 / 1e9)
    assert tally.product_seconds < tally.seconds


def test_the_time_of_a_kernel_is_the_longer_of_its_two() -> None:
    tally = Counted(flops_per_s=10.0, bytes_per_s=100.0)
    tally.add(20.0, 100.0)
    tally.add(1.0, 300.0)
    assert tally.seconds == 2.0 + 3.0
