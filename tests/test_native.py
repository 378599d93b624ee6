"""The compiled operations give what PyTorch's give; without a compiler there are none."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative_error
from test_static_vae import drawn, frames_of, plain_decoder
from test_vae import decode_all, small_config
from torch import Tensor

from configs.load import load_config
from workers.models import native as native_module
from workers.models.execution import choose_native
from workers.models.native import Native, NotCompiled, compiled
from workers.models.static_vae import StaticVae
from workers.models.winograd import NativeWinogradConv, WinogradConv

CPU = torch.device("cpu")
SIZES = [(16, 5), (32, 3), (3, 7), (20, 4), (1, 1)]
"""Channels, and side of the picture: whole vectors, parts of them, and pixels that are no multiple of sixteen."""
close = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(scope="module")
def native() -> Native:
    try:
        return compiled()
    except NotCompiled as lack:
        pytest.skip(str(lack))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activated(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.rms_norm(x.double(), (len(gamma),), gamma.double(), 1e-24)).float()


@pytest.mark.parametrize(("width", "side"), SIZES)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_silu(native: Native, width: int, side: int, read: torch.dtype, held: torch.dtype) -> None:
    x, gamma = numbers(2, side, side + 1, width).to(read), numbers(width, seed=1)
    out = torch.full(x.shape, 7.0, dtype=held)
    native.activate(x, gamma, out)
    assert relative_error(out.float(), activated(x, gamma)) <= close[held]


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e4])
def test_any_size_of_input(native: Native, scale: float) -> None:
    """Whatever the norm is given, SiLU far below and above zero included."""
    x, gamma = scale * numbers(1, 4, 4, 16), 200 * numbers(16, seed=1)
    out = torch.empty_like(x)
    native.activate(x, gamma, out)
    torch.testing.assert_close(out, activated(x, gamma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "side"), SIZES)
@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_short_filters(native: Native, width: int, side: int, frames: int, dtype: torch.dtype, add: bool) -> None:
    """Twice, for what the first call leaves as past."""
    weight, bias = numbers(width + 1, width, 3, 3, 3, seed=1).to(dtype), numbers(width + 1, seed=2).to(dtype)
    shape, gamma = (side, side + 1), numbers(width, seed=3)
    past = [numbers(2, *shape, width, seed=4) for _ in range(2)]
    narrow, room = torch.zeros(6 * side * (side + 1) * width, dtype=dtype), torch.zeros(8 * side * (side + 1) * 34)
    new = torch.zeros(frames, *shape, width)
    fast = NativeWinogradConv(native, weight, bias, past[0], frames, narrow)
    known = WinogradConv(weight, bias, past[1], new, narrow.clone(), room)
    made, expected = (numbers(frames, *shape, width + 1, seed=5) for _ in range(2))
    for seed in (6, 7):
        x = numbers(frames, *shape, width, seed=seed)
        fast.take(x, gamma)
        fast.write(made, add=add)
        new.copy_(activated(x, gamma))
        known.write(expected, add=add)
    assert relative_error(past[0], past[1]) <= 1e-6
    assert relative_error(made, expected) <= 2 * close[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"base_dim": 6}, {"temporal_downsample": (True, True, False)}], ids=str)
def test_the_decoder_with_them_equals_plain(native: Native, dtype: torch.dtype, changes: dict) -> None:
    decoder, exact = plain_decoder(small_config(**changes), dtype), plain_decoder(small_config(**changes))
    off = relative_error(frames_of(StaticVae(decoder, 4, 6, native), drawn(4)).float(), decode_all(exact, drawn(4)))
    plain = relative_error(decode_all(decoder, drawn(4)).float(), decode_all(exact, drawn(4)))
    assert off <= max(1e-4, 1.2 * plain)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module.shutil, "which", lambda name: None)


def no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "SOURCE", Path("no such file.cpp"))


def no_wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(native_module.subprocess, "run", run)


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        (no_compiler, r"needs a compiler \(g\+\+ or c\+\+\), found none"),
        (no_source, "found .*no such file.cpp"),
        (no_wide_vectors, "needs a CPU with AVX-512, found AVX2"),
        (no_patience, "found nothing after 1 s"),
    ],
)
def test_without_what_it_needs_there_is_none(
    lack: Callable[[pytest.MonkeyPatch], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in one line that says why."""
    if lack is not no_wide_vectors:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    lack(monkeypatch)
    with pytest.raises(NotCompiled, match=said) as caught:
        compiled()
    assert "\n" not in str(caught.value)


def test_it_is_for_one_thread_of_a_cpu_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.models.execution.compiled", lambda: "compiled")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert choose_native(load_config("pocket"), CPU) == "compiled"
        assert choose_native(load_config("pocket"), torch.device("cuda:0")) is None
        assert choose_native(load_config("pocket", ["execution.native=false"]), CPU) is None
        torch.set_num_threads(2)
        assert choose_native(load_config("pocket"), CPU) is None
    finally:
        torch.set_num_threads(threads)
