"""The VAE's Triton kernels give what their twins in PyTorch give in float32, and with them the decoder its frames.

Under Triton's interpreter, or on a GPU if that is off.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_static_vae import frames_of, plain_decoder
from test_triton_kernels import DEVICE, Drawn
from test_triton_kernels import exact_casts as exact_casts
from test_vae import decode_all, small_config
from torch import Tensor

from configs.load import load_config
from workers.models.checkpoint import load_tiny_vae
from workers.models.static_conv import Work
from workers.models.static_vae import StaticVae
from workers.models.tiny_vae import StaticTinyVae
from workers.models.triton_vae import TRITON
from workers.models.vae_kernels import TORCH

ROOT = Path(__file__).parent.parent
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
drawn = settings(max_examples=8, deadline=None, derandomize=True, database=None)
# More pixels than a program takes, and widths that are no power of two.
sizes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(1, 40) | st.just(96))


def assert_rounds(out: Tensor, exact: Tensor) -> None:
    """Float32 to 1e-5 of the largest value; what has fewer bits to one unit in the last place."""
    assert out.shape == exact.shape
    assert torch.isfinite(out).all()
    if out.dtype == torch.float32:
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        return
    bits = [x.contiguous().view(torch.int16).int() for x in (out, exact.to(out.dtype))]
    # Sign and magnitude to a number that grows with the value.
    first, second = (torch.where(x < 0, torch.iinfo(torch.int16).min - x, x) for x in bits)
    assert (first - second).abs().max() <= 1


def wide(x: Tensor | None) -> Tensor | None:
    """A copy in float32: twins may overwrite what they are given."""
    return None if x is None else x.to(torch.float32, copy=True)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel has to overwrite all of."""
    return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)


@dtypes
@drawn
@given(size=sizes, before=st.integers(0, 2), seed=st.integers(0, 9))
def test_frames_lie_beside_those_before_them(dtype: torch.dtype, size: tuple[int, ...], before: int, seed: int) -> None:
    """In every place where the convolution reads them; the last are kept for the next call, of another length."""
    draw, (most, *picture) = Drawn(seed), size
    past = draw(before, *picture, dtype=dtype)
    exact_past = wide(past)
    for frames, biased, active in ((most, True, True), (1, False, True), (1, True, False), (most, False, False)):
        x = 3 * draw(frames, *picture, dtype=dtype)
        bias, gamma = (draw(size[-1], dtype=dtype) if wanted else None for wanted in (biased, active))
        beside = unwritten(frames, *picture[:2], (before + 1) * picture[-1], dtype=dtype)
        exact = unwritten(*beside.shape)
        TRITON.lay_beside(x, bias, gamma, past, beside)
        TORCH.lay_beside(wide(x), wide(bias), wide(gamma), exact_past, exact)
        assert_rounds(beside, exact)
        if before:
            assert_rounds(past, exact_past)


@dtypes
@drawn
@given(size=sizes, seed=st.integers(0, 9))
def test_a_convolution_and_its_bias_are_added(dtype: torch.dtype, size: tuple[int, ...], seed: int) -> None:
    draw = Drawn(seed)
    x, made, bias = (draw(*shape, dtype=dtype) for shape in (size, size, size[-1:]))
    exact = wide(x)
    TORCH.add(exact, wide(made), wide(bias))
    TRITON.add(x, made, bias)
    assert_rounds(x, exact)


@dtypes
@drawn
@given(size=sizes, seed=st.integers(0, 9))
def test_two_frames_of_each(dtype: torch.dtype, size: tuple[int, ...], seed: int) -> None:
    draw = Drawn(seed)
    made = draw(*size[:3], 2 * size[3], dtype=dtype)
    for bias in (draw(2 * size[3], dtype=dtype), None):
        assert_rounds(TRITON.split(made, bias), TORCH.split(wide(made), wide(bias)))


@dtypes
@drawn
@given(size=sizes, seed=st.integers(0, 9))
def test_four_pictures_become_one(dtype: torch.dtype, size: tuple[int, ...], seed: int) -> None:
    draw, (count, height, width, channels) = Drawn(seed), size
    made = draw(count, height + 1, width + 1, 4 * channels, dtype=dtype)
    for bias in (draw(channels, dtype=dtype), None):
        out = unwritten(count, 2 * height, 2 * width, channels, dtype=dtype)
        exact = TORCH.spread(wide(made), wide(bias), unwritten(*out.shape))
        assert_rounds(TRITON.spread(made, bias, out), exact)


def test_the_decoder_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream and the next, the first latent frame of each among them, in memory that never moves."""
    monkeypatch.setattr(Work, "on_cpu", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    decoder = plain_decoder(small_config(base_dim=6, num_res_blocks=1)).to(DEVICE)
    vae = StaticVae(decoder, 3, 2, kernels=TRITON)
    places = [tensor.data_ptr() for tensor in vae.buffers()]
    for count, seed in ((1, 0), (3, 1)):
        latents = Drawn(seed)(1, count, 16, 3, 2)
        assert relative_error(frames_of(vae, latents), decode_all(decoder, latents)) <= 1e-5
    assert [tensor.data_ptr() for tensor in vae.buffers()] == places


def test_the_tiny_decoder_equals_its_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU also cuDNN's convolutions that end with ReLU equal those of a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    made = []
    for device, kernels in ((DEVICE, TRITON), (torch.device("cpu"), TORCH)):
        model = load_config("longlive-1.3b", ["model.random_weights=true"]).model
        model = model.model_copy(update={"decoder": "tiny", "vae_dtype": "float32", "lora": None})
        vae = StaticTinyVae(load_tiny_vae(model, device), 3, 4, kernels)
        latents = torch.randn(4, 16, 3, 4, generator=torch.Generator().manual_seed(0)).to(device)
        made.append([vae.frames(latent, first=index == 0).cpu() for index, latent in enumerate(latents)])
    for mine, plain in zip(*made, strict=True):
        assert relative_error(mine, plain) <= 1e-5


def test_bfloat16_is_as_near_as_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases are added after a rounding, between convolutions there is but one."""
    monkeypatch.setattr(Work, "on_cpu", False)
    config, latents = small_config(base_dim=8, num_res_blocks=1), Drawn(0)(1, 2, 16, 3, 2)
    decoder, exact = (plain_decoder(config, dtype).to(DEVICE) for dtype in (torch.bfloat16, torch.float32))
    frames = decode_all(exact, latents)
    off = relative_error(frames_of(StaticVae(decoder, 3, 2, kernels=TRITON), latents).float(), frames)
    assert off <= 1.2 * relative_error(decode_all(decoder, latents).float(), frames)


FOR_A_GPU = """
import subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.models import triton_vae

def stack(kernel, channels, **sizes):
    names, sizes = kernel.arg_names, {**sizes, **triton_vae._tile(channels)}
    kinds = {"eps": "fp32", "pixels": "i32", "height": "i32", "width": "i32"}
    types = {name: "constexpr" if name in sizes else kinds.get(name, "*bf16") for name in names}
    fixed = {(names.index(name),): size for name, size in sizes.items() if name in names}
    made = triton.compile(ASTSource(kernel, types, fixed), target=GPUTarget("cuda", 90, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [word for word in used.split() if word.startswith(("STACK:", "LOCAL:"))]

for channels in (96, 192, 384):
    print(*stack(triton_vae._lay_kernel, channels, FRAMES=4, TAPS=3))
for kernel in (triton_vae._add_kernel, triton_vae._split_kernel, triton_vae._spread_kernel):
    print(*stack(kernel, 384))
"""


def test_kernels_compile_for_a_gpu_and_spill_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FOR_A_GPU], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["STACK:0 LOCAL:0"] * 6, done.stderr
