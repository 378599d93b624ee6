"""Self-attention in e4m3: how much it errs, what is attended in it and what is not, what it weighs, who computes it."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from golden_cases import cases, load, relative_error
from stage_case import tiny_config
from stream_case import CPU, SMALL, TINY, embeds, tiny_transformer
from teacher_forced import worst_error
from torch import Tensor

from configs.load import load_config
from configs.schema import StreamConfig
from ipc.errors import ConfigError
from workers.models import attention, execution, fp8_attention
from workers.models.attention import Attention, AttentionSize, Trial, Unavailable, attend_math, attend_sdpa, cuda_ms
from workers.models.audit import run_watched
from workers.models.denoise import Rollout
from workers.models.execution import choose_passes
from workers.models.fp8 import Fp8Linears, plain_linear
from workers.models.fp8_attention import choose_fp8_attention, flash3, widened
from workers.models.kernels import E4M3, rounded, turned
from workers.models.kv_store import QuantisedKVStore, RoundedKVStore, new_store
from workers.models.noise import DrawnNoise
from workers.models.passes import Passes, PlainPasses, hand_over
from workers.models.rope import Rotation
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer

STREAMS = cases("stream")
CUDA = torch.device("cuda")
SIZE = AttentionSize(queries=6, keys=24, heads=2, head_dim=16)
FULL = AttentionSize(queries=4680, keys=18720, heads=12, head_dim=128)
ATTEND = "execution.attend=fp8"
WIDENED = widened(attend_sdpa, torch.float32)
BARS = {"model": 2e-2, "fp8": 8e-2}
"""By `execution.linears`."""
on_a_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def in_fp8(model: CausalWanTransformer, *parts: Any, **given: Any) -> StaticPasses:
    return StaticPasses(model, *parts, attend_fp8=widened(model.attention.attend, model.dtype), **given)


def stream(passes: Passes, blocks: int, switches: tuple[int, ...] = (0,), model: Any = None) -> list[Tensor]:
    """Clean latents of a stream's first blocks."""
    model = model or tiny_transformer()
    rollout = Rollout(model, StreamConfig(), SMALL, passes=passes)
    noise, made = DrawnNoise(0, rollout.shape), []
    for block in range(blocks):
        if block in switches:
            rollout.switch(embeds(block))
        made.append(rollout.denoise_block(noise))
    return made


# How much it errs


@pytest.mark.parametrize("linears", BARS)
@pytest.mark.parametrize("path", STREAMS, ids=lambda path: f"golden-{path.name}-static")
def test_attention_in_fp8_stays_near_float32(path: Path, linears: str, tmp_path: Path) -> None:
    """Teacher-forced, alone and with linears in fp8; and it is really used, so some error there is."""

    def made(*parts: Any) -> StaticPasses:
        return in_fp8(*parts, linear=Fp8Linears() if linears == "fp8" else plain_linear)

    assert 1e-3 < worst_error(load(path), tmp_path / "model", made) <= BARS[linears]


def test_a_first_block_is_that_of_the_models_dtype() -> None:
    """To the bit, and what it leaves of itself is the exact keys and values, rounded once; later blocks are off."""
    model = tiny_transformer()
    exact, coded = StaticPasses(model, StreamConfig(), SMALL), in_fp8(model, StreamConfig(), SMALL)
    [first], [mine] = stream(exact, 1, model=model), stream(coded, 1, model=model)
    assert torch.equal(mine, first)
    for part, other in zip(coded.layers, exact.layers, strict=True):
        assert torch.equal(part.k[0].float(), rounded(other.k[0], E4M3).float())
        assert torch.equal(part.v[0].float(), rounded(other.v[0], E4M3).float())
        assert torch.equal(part.sink_k, other.sink_k)
    assert 1e-4 < relative_error(stream(coded, 2, model=model)[1], stream(exact, 2, model=model)[1]) < 0.1


def test_only_a_block_alone_is_attended_in_the_models_dtype() -> None:
    """By lengths of queries and keys; its clean pass too, and a recache before block 1."""
    model, calls = tiny_transformer(), []

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.dtype, k.dtype, v.dtype, q.shape[1] // block, k.shape[1] // block))
        return attend_sdpa(*(part.float() for part in (q, k, v)))

    model.attention = Attention("sdpa", noted)
    block = StreamConfig().frames_per_block * SMALL.frame_tokens
    passes = StaticPasses(model, StreamConfig(), SMALL, attend_fp8=noted)
    stream(passes, 6, switches=(0, 1, 2, 5), model=model)
    wide, codes = ({call[3:] for call in calls if set(call[:3]) == {dtype}} for dtype in (torch.float32, E4M3))
    assert wide == {(1, 1)}
    assert codes == {(1, 2), (2, 2), (1, 3), (1, 4), (3, 4)}
    assert len(calls) == sum(set(call[:3]) in ({torch.float32}, {E4M3}) for call in calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_e4m3_does_not_hold_is_the_largest_it_does(dtype: torch.dtype) -> None:
    """Some versions of torch make it NaN, which would spread to every block that follows; others clamp."""
    x = torch.tensor([1e4, -1e4, 464.0, 448.0, -(2.0**-6), 0.0]).to(dtype)
    assert rounded(x, E4M3).tolist() == [448.0, -448.0, 448.0, 448.0, -(2.0**-6), 0.0]
    assert torch.equal(rounded(x, dtype), x)
    with torch.inference_mode():
        assert run_watched(lambda: rounded(x, E4M3), CPU)[0] == "aten.clamp.default"
    sizes = {"layers": 1, "heads": 1, "head_dim": 6, "frame_tokens": 1, "device": CPU}
    one = StreamConfig(frames_per_block=1, window=2, sink=1)
    store = new_store("attended", one, dtype, **sizes)  # type: ignore[arg-type]
    for part in (store.layers[0], store.at_work(1, 1)[0]):
        part.write(torch.tensor([0]), x[None, None], x[None, None])
        part.keep_sink(torch.tensor([0]), x[None, None])
        assert torch.equal(store.k[0, 0].float(), rounded(x, E4M3).float()[None, None])
    assert torch.equal(store.sink_k[0, 0], x[None, None])
    store.move_sink(Rotation(torch.ones(1, 3), torch.zeros(1, 3)))
    assert torch.equal(store.k[0, 0].float(), rounded(x, E4M3).float()[None, None])
    store.layers[0].fill(store.k[0].float() * 1e3, store.v[0].float() * 1e3, store.sink_k[0])
    assert torch.isfinite(store.k.float()).all() and float(store.k.float().max()) == 448


def test_a_sink_is_turned_from_keys_that_were_never_rounded() -> None:
    """However often it moves: it is the exact stream's rotation, rounded once."""
    model = tiny_transformer()
    coded, plan = in_fp8(model, StreamConfig(), SMALL), StreamConfig()
    stream(coded, 20, model=model)
    static, slots = coded.static, plan.sink_blocks
    for part in coded.layers:
        there = turned(part.sink_k.flatten(0, 1), static.sink_turn)
        assert torch.equal(part.k[:slots].flatten(0, 1).float(), rounded(there, E4M3).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_goes_with_any_dtype_and_weighs_half(dtype: torch.dtype) -> None:
    """Keys and values take one byte each; the sink's before rotation, and one block of one layer, the dtype's."""
    model = tiny_transformer().to(dtype)
    exact = StaticPasses(model, StreamConfig(), SMALL)
    coded = in_fp8(model, StreamConfig(), SMALL, linear=Fp8Linears())
    assert isinstance(coded.static.store, RoundedKVStore) and coded.static.store.sink_k.dtype == dtype
    size, layers = dtype.itemsize, model.config.num_layers
    blocks = StreamConfig().window_blocks
    expected = (2 * blocks + size + 2 * size / layers) / ((2 * blocks + 1) * size)
    assert coded.nbytes / exact.nbytes == pytest.approx(expected)
    rollout = Rollout(model, StreamConfig(), SMALL, passes=coded)
    noise = DrawnNoise(0, rollout.shape)
    rollout.switch(embeds(0).to(dtype))
    for block in range(24):
        if block == 12:
            rollout.switch(embeds(1).to(dtype))
        latents = rollout.denoise_block(noise)
    assert torch.isfinite(latents).all() and 0.01 < float(latents.std()) < 100


# What is recorded and what is handed over


@torch.no_grad()
def test_every_block_does_the_same_and_reads_and_keeps_nothing() -> None:
    model = tiny_transformer()
    passes = in_fp8(model, StreamConfig(), SMALL)
    before = [tensor.data_ptr() for tensor in passes.static.buffers()]
    done: list[list[str]] = []
    passes.record = lambda once: lambda: done.append(run_watched(once, CPU))
    stream(passes, 7, switches=(0, 2, 5), model=model)
    assert len(done) > 5 * 7
    steps = len(passes.static.sigmas)
    assert done[-steps - 1 : -1] == done[-2 * steps - 3 : -steps - 3], "steps of the last two blocks"
    assert [tensor.data_ptr() for tensor in passes.static.buffers()] == before


WAYS: dict[str, Callable[..., Passes]] = {
    "plain": PlainPasses,
    "model": StaticPasses,
    "int8": lambda *parts: StaticPasses(*parts, kv="int8"),
    "fp8": lambda *parts: StaticPasses(*parts, kv="fp8"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_is_handed_over_to_other_kinds_and_back(way: str) -> None:
    """As near as 8 bits are; the sink's keys before rotation as they are where the other kind keeps them so."""
    model, parts = tiny_transformer(), (StreamConfig(), SMALL)
    exact, coded, other = StaticPasses(model, *parts), in_fp8(model, *parts), WAYS[way](model, *parts)
    exact_blocks = stream(exact, 6, model=model)
    hand_over(exact, coded)
    hand_over(coded, other)
    again = in_fp8(model, *parts)
    hand_over(other, again)
    assert again.sink_at == exact.sink_at is not None
    for mine, theirs in zip(again.layers, exact.layers, strict=True):
        for new, old in zip(mine.read(), theirs.read(), strict=True):
            assert new.dtype == old.dtype
            assert relative_error(new, old) <= 0.06
        if way in ("plain", "model"):
            assert torch.equal(mine.sink_k, theirs.sink_k)
            assert torch.equal(mine.k.float(), rounded(theirs.k, E4M3).float())
    assert len(exact_blocks) == 6


def test_only_passes_of_its_kind_share_its_memory() -> None:
    model = tiny_transformer()
    first = choose_passes(tiny_config(ATTEND), model)
    same = choose_passes(tiny_config(ATTEND, "execution.linears=fp8"), model, beside=[first])
    other = choose_passes(tiny_config(), model, beside=[first, same])
    codes = choose_passes(tiny_config("execution.kv=fp8"), model, beside=[first, same, other])
    addresses = [passes.layers[0].k.data_ptr() for passes in (first, same, other, codes)]
    assert addresses[0] == addresses[1] and len(set(addresses)) == 3
    assert isinstance(codes, StaticPasses) and isinstance(codes.static.store, QuantisedKVStore)


# Who computes it


def flash3_attn_func(q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None):
    """As of FlashAttention-3: weights up to 256 are rounded to e4m3 before they meet the values; gives bfloat16."""
    assert {part.dtype for part in (q, k, v)} == {E4M3}
    assert (softmax_scale, causal, q_descale, k_descale, v_descale) == (None, False, None, None, None)
    logits = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) / q.shape[-1] ** 0.5
    weights = 256 * torch.exp(logits - logits.amax(-1, keepdim=True))
    out = torch.einsum("bhij,bjhd->bihd", weights.to(E4M3).float(), v.float())
    return (out / weights.sum(-1).transpose(1, 2)[..., None]).to(torch.bfloat16)


def old_flash3_attn_func(q, k, v, softmax_scale=None, causal=False):
    """As before August 2025: also the logarithms of sums."""
    return flash3_attn_func(q, k, v, softmax_scale, causal), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def not_built(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("This flash attention build does not support FP8.\nat line 7")


def one_key_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash3_attn_func(q, k[:, 1:], v[:, 1:])


def importing(**modules: Callable[..., object]) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace(flash_attn_func=modules[name])  # type: ignore[return-value]

    return load


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of a device, it is a Hopper GPU."""
    for module in (fp8_attention, attention):
        monkeypatch.setattr(module, "compute_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("function", [flash3_attn_func, old_flash3_attn_func], ids=lambda f: f.__name__)
@pytest.mark.parametrize("module", ["flash_attn_interface", "fa3_fwd_interface"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_either_module_is_called_as_it_wants(dtype: torch.dtype, module: str, function: Callable[..., object]) -> None:
    """Its result is in the model's dtype, and as far off as weights in e4m3 are: near 2.6e-2 where none stands out."""
    attend = flash3(CUDA, dtype, importing(**{module: function}))
    trial = Trial(CPU, E4M3, AttentionSize(131, 2000, 2, 64))
    trial.check(attend)
    made, exact = attend(*trial.qkv), attend_math(*(part.float() for part in trial.qkv))
    assert made.dtype == dtype
    assert 1e-2 < relative_error(made.float(), exact) < 4e-2


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("modules", "lack"),
    [
        ({}, "No module named 'flash_attn_interface', No module named 'fa3_fwd_interface'"),
        ({"fa3_fwd_interface": not_built}, "one that does not take 6 queries, 24 keys, 2 heads of 16 in float8_e4m3fn"),
        ({"flash_attn_interface": one_key_short}, "one that is 0."),
    ],
    ids=["missing", "refuses", "wrong"],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_missing_or_wrong_is_said_and_not_taken(
    device: str, modules: dict[str, Callable[..., object]], lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is left, as widening would be slower than `attend: model`; on a CPU the definition computes it."""
    monkeypatch.setattr(fp8_attention, "Trial", lambda device, *given: Trial(CPU, *given))
    monkeypatch.setattr(fp8_attention, "backend", lambda name, device, *given: attention.backend(name, CUDA, *given))
    chosen = choose_fp8_attention(attend_sdpa, torch.device(device), torch.float32, SIZE, importing(**modules))
    assert chosen.lack is not None and chosen.lack.startswith(lack) and "\n" not in chosen.lack
    assert (chosen.attend is None) == (device == "cuda")
    if chosen.attend is not None:
        q, k, v = Trial(CPU, E4M3, SIZE).qkv
        assert torch.equal(chosen.attend(q, k, v), attend_sdpa(q.float(), k.float(), v.float()))


@pytest.mark.usefixtures("hopper")
def test_what_is_right_is_taken_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_attention, "Trial", lambda device, *given: Trial(CPU, *given))
    load = importing(fa3_fwd_interface=flash3_attn_func)
    chosen = choose_fp8_attention(attend_sdpa, CUDA, torch.bfloat16, SIZE, load, lambda run: float(run() is None) + 0.5)
    assert (chosen.lack, chosen.note) == (None, "self-attention in fp8 by flash3: 0.50 ms")
    assert chosen.attend is not None and chosen.attend(*Trial(CPU, E4M3, SIZE).qkv).dtype == torch.bfloat16


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("ms", "said"), [((0.7, 0.6), "flash3 in 2 parts: 0.60 ms"), ((0.6, 0.7), "flash3: 0.60 ms")])
def test_keys_are_attended_in_as_many_parts_as_is_fastest(
    ms: tuple[float, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the package knows parts: older ones refuse to be asked."""
    monkeypatch.setattr(fp8_attention, "Trial", lambda device, *given: Trial(CPU, *given))
    asked, times = [], iter(ms)

    def in_parts(q: Tensor, k: Tensor, v: Tensor, num_splits: int = 1) -> Tensor:
        asked.append(num_splits)
        return flash3_attn_func(q, k, v)

    load = importing(flash_attn_interface=in_parts)
    chosen = choose_fp8_attention(attend_sdpa, CUDA, torch.bfloat16, SIZE, load, lambda run: next(times))
    assert chosen.note == f"self-attention in fp8 by {said}"
    assert chosen.attend is not None
    asked.clear()
    chosen.attend(*Trial(CPU, E4M3, SIZE).qkv)
    assert asked == [1 if ms[0] < ms[1] else 2]


@pytest.mark.parametrize("found", [(8, 9), (10, 0), (12, 0)])
def test_other_gpus_are_not_even_tried(found: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """There its kernels would end the process."""
    monkeypatch.setattr(fp8_attention, "compute_capability", lambda device: found)
    chosen = choose_fp8_attention(attend_sdpa, CUDA, torch.bfloat16, SIZE, importing(fa3_fwd_interface=not_built))
    assert (chosen.attend, chosen.lack) == (None, f"compute capability {found[0]}.{found[1]}")


def test_a_lack_is_one_warning_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is left, keys and values are kept as with `attend: model`, in memory that such passes share."""
    said: list[str] = []
    model = tiny_transformer()
    passes = choose_passes(tiny_config(ATTEND), model, warn=said.append)
    needs = "execution.attend: fp8 needs FlashAttention-3 (flash_attn_interface or fa3-fwd) on a GPU of compute"
    instead = "used instead: values of e4m3 attended by sdpa, as inexact and not faster"
    assert said == [f"{needs} capability 9.x, found cpu; {instead}"]
    assert isinstance(passes, StaticPasses) and isinstance(passes.static.store, RoundedKVStore)
    left = fp8_attention.Fp8Attention(None, "compute capability 8.9", "self-attention not in fp8")
    monkeypatch.setattr(execution, "choose_fp8_attention", lambda *given: left)
    exact, said[:] = choose_passes(tiny_config(), model), []
    passes = choose_passes(tiny_config(ATTEND), model, warn=said.append, beside=[exact])
    assert said == [f"{needs} capability 9.x, found compute capability 8.9; used instead: attend: model"]
    assert passes.layers[0].k.data_ptr() == exact.layers[0].k.data_ptr()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["execution.denoiser=plain"], "attend: fp8 needs denoiser: static, found denoiser: plain"),
        (["execution.kv=int8"], "attend: fp8 needs kv: model, found kv: int8; it keeps keys and values in 8 bits"),
        (["execution.kv=fp8"], "attend: fp8 needs kv: model, found kv: fp8; it keeps keys and values in 8 bits"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config("pocket", [ATTEND, *settings])
    assert "\n" not in str(caught.value)


# On a GPU


@on_a_hopper
def test_flash3_in_fp8_is_right_on_a_gpu() -> None:
    """At full size, over each length that a window has; skipped where it is not installed."""
    for blocks in (1, 2, 3, 4):
        size = FULL._replace(keys=blocks * FULL.queries)
        chosen = choose_fp8_attention(attend_sdpa, CUDA, torch.bfloat16, size)
        if chosen.lack is not None and chosen.lack.startswith("No module named"):
            pytest.skip(chosen.lack)
        assert chosen.lack is None
        assert chosen.note.startswith("self-attention in fp8 by flash3: ")


@on_a_hopper
def test_flash3_in_fp8_is_faster_than_sixteen_bits_on_a_gpu() -> None:
    chosen = choose_fp8_attention(attend_sdpa, CUDA, torch.bfloat16, FULL)
    if chosen.attend is None or chosen.lack is not None:
        pytest.skip(str(chosen.lack))
    wide = attention.choose_attention("auto", CUDA, torch.bfloat16, FULL)
    codes, tensors = Trial(CUDA, E4M3, FULL), Trial(CUDA, torch.bfloat16, FULL)
    assert cuda_ms(codes.run(chosen.attend)) < cuda_ms(tensors.run(wide.attend))


@on_a_hopper
def test_flash3_in_fp8_is_recorded_on_a_gpu() -> None:
    """A replay gives what a call gives, of what lies in the same memory then."""
    chosen = choose_fp8_attention(attend_sdpa, CUDA, torch.bfloat16, FULL)
    if chosen.attend is None or chosen.lack is not None:
        pytest.skip(str(chosen.lack))
    q, k, v = Trial(CUDA, E4M3, FULL).qkv
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = chosen.attend(q, k, v)
    v.view(torch.uint8).copy_(v.view(torch.uint8).flip(1))
    graph.replay()
    with torch.inference_mode():
        assert torch.equal(out, chosen.attend(q, k, v))


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=on_a_hopper)], ids=str)
def test_passes_by_flash3_are_near_the_definition(device: torch.device) -> None:
    """One step from the same past; on a CPU by a stand-in. A first block is that of `attend: model`, to the bit."""
    try:
        attend = flash3_attn_func if device == CPU else flash3(device, torch.bfloat16)
    except Unavailable as problem:
        pytest.skip(str(problem))
    model = tiny_transformer(TINY.model_copy(update={"dim": 128, "ffn_dim": 256})).to(device, torch.bfloat16)
    wide, defined = StaticPasses(model, StreamConfig(), SMALL), in_fp8(model, StreamConfig(), SMALL)
    fast = StaticPasses(model, StreamConfig(), SMALL, attend_fp8=attend)
    rollout = Rollout(model, StreamConfig(), SMALL, passes=defined)
    noise, prompt = DrawnNoise(0, rollout.shape), embeds(0).to(device, torch.bfloat16)
    rollout.switch(prompt)
    with torch.inference_mode():
        for passes in (wide, fast):
            passes.take_prompt(prompt)
        for block in range(7):
            plan, flows = rollout.layout.denoise(block, rollout.anchor), []
            hand_over(defined, fast)
            hand_over(defined, wide)
            for passes in (wide, defined, fast):
                flows.append(passes.static.flow(0, passes.fill(plan, block, noise)))
            if block == 0:
                assert torch.equal(flows[0], flows[1]) and torch.equal(flows[0], flows[2])
            else:
                assert 0 < relative_error(flows[2], flows[1]) < 5e-2
                assert 0 < relative_error(flows[2], flows[0]) < 5e-2
            rollout.denoise_block(noise)
