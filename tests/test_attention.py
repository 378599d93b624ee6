"""The attention backend is chosen once, checked and said; what is asked for and cannot be is one line."""

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from stream_case import SMALL, embeds, new_rollout, tiny_transformer
from torch import Tensor

from configs.load import load_config
from configs.schema import Execution, StreamConfig
from ipc.errors import ConfigError
from workers.models import attention
from workers.models.attention import (
    TRIED,
    Attend,
    Attention,
    AttentionSize,
    Trial,
    Unavailable,
    attend_math,
    attend_sdpa,
    backend,
    choose_attention,
    cuda_ms,
    fastest,
)
from workers.models.execution import attention_size
from workers.models.noise import DrawnNoise
from workers.models.static import attention as biased_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = AttentionSize(queries=6, keys=24, heads=2, head_dim=16)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5, -1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize(("preference", "name"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("math", "math")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sdpa_and_math_run_everywhere(preference: str, name: str, dtype: torch.dtype) -> None:
    chosen = choose_attention(preference, CPU, dtype, SIZE)  # type: ignore[arg-type]
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 8)
    made = chosen.attend(q.to(dtype), k.to(dtype), v.to(dtype))
    assert made.dtype == dtype
    torch.testing.assert_close(made.float(), written_out(q, k, v), rtol=3e-2, atol=3e-2)
    assert (chosen.name, chosen.note) == (name, f"attention by {name}")


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "flash4"])
def test_what_needs_a_gpu_is_refused_on_a_cpu_in_one_line(name: str) -> None:
    said = rf"model\.attention: {name} needs a CUDA device .* found device cpu, dtype float32; .* model\.attention=auto"
    with pytest.raises(ConfigError, match=said) as caught:
        choose_attention(name, CPU, torch.float32, SIZE)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "flash4"])
def test_sixteen_bits_are_needed_on_a_gpu_too(name: str) -> None:
    with pytest.raises(Unavailable, match="found device cuda, dtype float32"):
        backend(name, CUDA, torch.float32)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """As of flash-attn 2.8."""
    assert (dropout_p, softmax_scale, causal) == (0.0, None, False)
    return written_out(q, k, v)


def flash3_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, return_attn_probs=False):
    """As of FlashAttention-3 since August 2025."""
    assert (softmax_scale, causal, qv, return_attn_probs) == (None, False, None, False)
    return written_out(q, k, v)


def old_flash3_attn_func(q, k, v, softmax_scale=None, causal=False):
    """As of FlashAttention-3 before: also the logarithms of sums."""
    assert (softmax_scale, causal) == (None, False)
    return written_out(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def flash4_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None):
    """As of flash-attn-4."""
    assert (softmax_scale, causal, learnable_sink) == (None, False, None)
    return written_out(q, k, v), None


def importing(modules: Mapping[str, object]) -> Callable[[str], ModuleType]:
    """An importer of stand-ins for packages that need a GPU."""

    def load(name: str) -> ModuleType:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return modules[name]  # type: ignore[return-value]

    return load


STAND_INS = [
    ("flash", "flash_attn", flash_attn_func),
    ("flash3", "flash_attn_interface", flash3_attn_func),
    ("flash3", "flash_attn_interface", old_flash3_attn_func),
    ("flash3", "fa3_fwd_interface", flash3_attn_func),
    ("flash4", "flash_attn.cute", flash4_attn_func),
]


@pytest.mark.parametrize(("name", "module", "function"), STAND_INS, ids=lambda part: getattr(part, "__name__", part))
def test_packages_are_called_as_they_want(name: str, module: str, function: Callable[..., object]) -> None:
    load = importing({module: SimpleNamespace(flash_attn_func=function)})
    attend = backend(name, CUDA, torch.bfloat16, load)
    q, k, v = torch.randn(1, 5, 3, 8), torch.randn(1, 9, 3, 8), torch.randn(1, 9, 3, 8)
    torch.testing.assert_close(attend(q, k, v), written_out(q, k, v))


@pytest.mark.parametrize(("name", "module", "function"), STAND_INS, ids=lambda part: getattr(part, "__name__", part))
def test_what_is_not_installed_is_said(name: str, module: str, function: Callable[..., object]) -> None:
    with pytest.raises(Unavailable, match=rf"needs the package .*, found .*No module named '{module}'.*; install it"):
        backend(name, CUDA, torch.bfloat16, importing({}))
    hollow = importing({module: SimpleNamespace()})  # such as the folder that flash-attn-4 alone leaves
    with pytest.raises(Unavailable, match=f"found .*{module} without flash_attn_func"):
        backend(name, CUDA, torch.bfloat16, hollow)


def test_the_first_of_two_modules_that_works_is_taken() -> None:
    """Upstream's build before the wheel; one that does not load, or is hollow, is passed over."""
    upstream, wheel = SimpleNamespace(flash_attn_func=flash3_attn_func), SimpleNamespace(flash_attn_func=wrong)
    q = torch.randn(1, 5, 3, 8)
    for modules, expected in (
        ({"flash_attn_interface": upstream, "fa3_fwd_interface": wheel}, written_out(q, q, q)),
        ({"flash_attn_interface": SimpleNamespace(), "fa3_fwd_interface": wheel}, wrong(q, q, q)),
        ({"fa3_fwd_interface": wheel}, wrong(q, q, q)),
    ):
        torch.testing.assert_close(backend("flash3", CUDA, torch.bfloat16, importing(modules))(q, q, q), expected)
    named = "found No module named 'flash_attn_interface', No module named 'fa3_fwd_interface'; install it"
    with pytest.raises(Unavailable, match=named):
        backend("flash3", CUDA, torch.bfloat16, importing({}))


@pytest.mark.parametrize(("found", "runs"), [((8, 0), True), ((9, 0), True), ((7, 5), False), ((10, 0), False)])
def test_flash3_is_called_where_its_kernels_run(
    found: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they would end the process, not raise."""
    monkeypatch.setattr(attention, "compute_capability", lambda device: found)
    load = importing({"flash_attn_interface": SimpleNamespace(flash_attn_func=flash3_attn_func)})
    if runs:
        assert backend("flash3", CUDA, torch.bfloat16, load)
    else:
        with pytest.raises(Unavailable, match=rf"needs compute capability 8\.x or 9\.x, found {found[0]}\.{found[1]}"):
            backend("flash3", CUDA, torch.bfloat16, load)


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_math(q, k[:, 1:], v[:, 1:])


def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("head_dim 16 is not supported\nat line 7")


def missing() -> Attend:
    raise Unavailable("needs a package")


def nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.full_like(q, torch.nan)


def leaving_word(attend: Attend, ran: list[Attend]) -> Attend:
    """A backend that says that it ran."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ran.append(run)
        return attend(q, k, v)

    return run


def choose(times: Mapping[str, float], **others: Callable[[], Attend]) -> Attention:
    """The fastest of right backends with given milliseconds, and others."""
    ran: list[Attend] = []
    right = {name: leaving_word(attend_sdpa, ran) for name in times}
    measured = []

    def timer(run: Callable[[], object]) -> float:
        run()
        measured.append(ran[-1])
        return next(times[name] for name, attend in right.items() if attend is ran[-1])

    gets = {name: partial(lambda attend: attend, attend) for name, attend in right.items()}
    chosen = fastest(Trial(CPU, torch.float32, SIZE), gets | others, timer)
    assert measured == list(right.values()), "what is right is measured once each, and nothing else"
    assert chosen.attend is right[chosen.name]
    return chosen


def test_the_fastest_right_backend_is_taken_and_all_are_said() -> None:
    chosen = choose({"cudnn": 0.414, "flash": 0.62, "sdpa": 0.6}, flash3=missing)
    assert chosen.note == "attention by cudnn: 0.41 ms; sdpa 0.60, flash 0.62"
    assert choose({"cudnn": 0.5, "sdpa": 0.25}).note == "attention by sdpa: 0.25 ms; cudnn 0.50"
    assert choose({"sdpa": 1.0}).note == "attention by sdpa: 1.00 ms"
    assert choose({"cudnn": 0.5, "sdpa": 0.5}).name == "cudnn"


def test_what_is_wrong_or_refuses_is_never_taken() -> None:
    """However fast it would be: it is not even measured."""
    note = choose({"sdpa": 9.0}, cudnn=lambda: wrong, flash=lambda: refuses, flash4=lambda: nan).note
    assert note.startswith("attention by sdpa: 9.00 ms; without cudnn, which is 0.")
    assert "without flash, which does not take 6 queries, 24 keys, 2 heads of 16 in float32: head_dim 16 is" in note
    assert "without flash4, which is nan off" in note
    assert "\n" not in note


def test_nothing_right_is_said_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"auto found nothing that is right: without sdpa, .*; set it to math"):
        fastest(Trial(CPU, torch.float32, SIZE), {"sdpa": lambda: wrong, "flash": missing})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_check_allows_rounding_and_nothing_more(dtype: torch.dtype) -> None:
    """Of a size at which wrong tails would show: no multiple of a tile, more queries than are compared."""
    trial = Trial(CPU, dtype, AttentionSize(queries=131, keys=517, heads=2, head_dim=16))
    trial.check(attend_sdpa)
    trial.check(attend_math)

    def tail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend_sdpa(q, k, v).clone()
        out[:, -1] = 0
        return out

    for bad in (wrong, tail):
        with pytest.raises(Unavailable, match="off for 131 queries"):
            trial.check(bad)


@pytest.mark.parametrize("execution", ["plain", "static"])
def test_passes_attend_by_what_was_chosen(execution: Execution) -> None:
    """Both ways through the one call, whatever it is; the static way's attention to the prompt is SDPA's."""
    model, calls = tiny_transformer(), []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.shape[0], q.shape[1], k.shape[1]))
        return attend_math(q, k, v)

    model.attention = Attention("math", counted)
    rollout = new_rollout(model, StreamConfig(), SMALL, execution=execution)
    rollout.switch(embeds(0))
    rollout.denoise(DrawnNoise(0, rollout.shape))
    block = StreamConfig().frames_per_block * SMALL.frame_tokens
    steps, layers = len(StreamConfig().steps), model.config.num_layers
    assert calls.count((1, block, block)) == steps * layers
    assert len(calls) == steps * layers * (2 if execution == "plain" else 1)


def test_what_is_measured_is_a_block_over_a_full_window() -> None:
    config = load_config("longlive-1.3b", ["model.path=null", "model.random_weights=true"])
    assert attention_size(config, config.model.transformer) == AttentionSize(4680, 18720, 12, 128)


@on_a_gpu
@pytest.mark.parametrize("name", TRIED)
def test_backends_on_a_gpu_equal_sdpa(name: str) -> None:
    try:
        attend = backend(name, CUDA, torch.bfloat16)
    except Unavailable as problem:
        pytest.skip(str(problem))
    trial = Trial(CUDA, torch.bfloat16, AttentionSize(4680, 18720, 12, 128))
    trial.check(attend)
    assert cuda_ms(trial.run(attend)) > 0


@on_a_gpu
def test_auto_on_a_gpu_measures() -> None:
    chosen = choose_attention("auto", CUDA, torch.bfloat16, AttentionSize(4680, 18720, 12, 128))
    assert chosen.note.startswith(f"attention by {chosen.name}: ")


@on_a_gpu
@pytest.mark.parametrize("keys", [32, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_on_a_gpu_is_read_as_it_is(dtype: torch.dtype, keys: int) -> None:
    """Whichever kernel SDPA takes for it: a slice of a longer row, with minus infinity at its end."""
    q, k, v = (torch.randn(length, 12, 128, device=CUDA, dtype=dtype) for length in (4680, keys, keys))
    row = torch.zeros(1, 512, device=CUDA, dtype=dtype)
    row[:, 20] = 6.1875
    row[:, 23:] = -torch.inf
    logits = torch.einsum("ihd,jhd->hij", q.float(), k.float()) / 128**0.5 + row[:, :keys].float()
    expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v.float())
    made = biased_attention(q, k, v, row[:, :keys])
    torch.testing.assert_close(made.float(), expected, rtol=3e-2, atol=3e-2)
