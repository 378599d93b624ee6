"""The attention backend is chosen once and said; what is asked for and cannot be is one line."""

import importlib.util

import pytest
import torch

from ipc.errors import ConfigError
from workers.models.attention import attend_sdpa, choose_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("preference", ["auto", "sdpa"])
def test_sdpa_runs_everywhere(preference: str) -> None:
    chosen = choose_attention(preference, CPU, torch.float32)
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 9, 3, 8)
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5, -1)
    torch.testing.assert_close(chosen.attend(q, k, k), torch.einsum("bhij,bjhd->bihd", weights, k))
    assert (chosen.name, chosen.attend) == ("sdpa", attend_sdpa)


def test_flash_on_a_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: flash needs .* found .* install") as caught:
        choose_attention("flash", CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_equals_sdpa() -> None:
    chosen = choose_attention("flash", torch.device("cuda"), torch.bfloat16)
    q, k, v = torch.randn(3, 1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(chosen.attend(q, k, v), attend_sdpa(q, k, v), rtol=2e-2, atol=2e-2)
