"""The audit catches what a recorded pass must never do, lets through what passes do, and changes nothing."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from fake_graphs import FakeCuda
from stage_case import DenoiserCase, MadeBlock
from torch import Tensor

from configs.load import load_config
from ipc.errors import AuditFailed, ConfigError, Fatal
from workers.models.audit import Audit, run_watched
from workers.models.graphs import WARM_UPS, CudaGraphs, run_directly
from workers.models.static import StaticTransformer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AUDIT = "execution.audit=true"
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
ropes = pytest.mark.parametrize("rope", ["relative", "absolute"])

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "truth": lambda x: bool(x[0, 0] > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x[0].repeat_interleave(torch.ones_like(x[0], dtype=torch.int64)),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "array": np.asarray,
    "numbers of the host": lambda x: x + torch.tensor([1.0, 2.0]),
    "another device": lambda x: x.to("meta"),
}
WORK: dict[str, Callable[[Tensor], object]] = {
    "matrix product": lambda x: torch.nn.functional.linear(x, x, x[0]),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "rows by number": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "write by number": lambda x: x.index_copy_(0, torch.zeros(1, dtype=torch.int64), x[1:2] * 2),
    "in place": lambda x: x.mul_(2).copy_(x.flip(0)),
    "dtype": lambda x: x.double().to(torch.bfloat16).float(),
    "shape": lambda x: x.unflatten(0, (-1, 2)).flatten(0, 1).chunk(2)[0].unbind(1),
}


@modes
@pytest.mark.parametrize("name", READS)
def test_a_read_is_caught(name: str, mode: Callable[[], object]) -> None:
    x = torch.randn(2, 2)
    with mode(), pytest.raises(AuditFailed, match="inside a pass"):
        run_watched(lambda: READS[name](x), CPU)


@modes
@pytest.mark.parametrize("name", WORK)
def test_work_is_let_through(name: str, mode: Callable[[], object]) -> None:
    x = torch.randn(2, 2)
    with mode():
        assert run_watched(lambda: WORK[name](x), CPU)


class Keeper:
    """Ways to keep memory from one run to the next."""

    def __init__(self) -> None:
        self.x = torch.randn(4)
        self.kept: list[Tensor] = []
        self.last: Tensor | None = None

    def grow_a_list(self) -> None:
        self.kept.append(self.x * 2)

    def keep_a_view(self) -> None:
        self.kept.append((self.x * 2)[:1])

    def replace_the_last(self) -> None:
        """As many bytes as before, but at another address."""
        self.last = self.x + 1

    def grow_in_place(self) -> None:
        self.x.resize_(2 * len(self.x))

    def write_where_it_lies(self) -> None:
        self.x.copy_(self.x * 2 + 1)


@modes
@pytest.mark.parametrize(
    "way",
    [Keeper.grow_a_list, Keeper.keep_a_view, Keeper.replace_the_last, Keeper.grow_in_place],
)
def test_memory_that_is_kept_is_caught(way: Callable[[Keeper], None], mode: Callable[[], object]) -> None:
    with mode(), pytest.raises(AuditFailed, match="a pass kept"):
        run_watched(partial(way, Keeper()), CPU)


def test_memory_that_stays_is_let_through() -> None:
    keeper = Keeper()
    for _ in range(3):
        run_watched(keeper.write_where_it_lies, CPU)


def blocks(*overrides: str) -> list[MadeBlock]:
    """A stream of the stage: a filling window, a sliding one, switches in both."""
    case = DenoiserCase(*overrides)
    made = []
    for block in range(8):
        if block in (0, 2, 6):
            case.prompt(block)
        made.append(case.block())
    return made


@pytest.mark.parametrize(
    "change", [(), ("execution.kv=int8",), ("execution.attend=fp8",), ("stream.recache=blend(1.5)",)], ids=str
)
@ropes
def test_the_fast_path_passes_and_gives_the_same(rope: str, change: tuple[str, ...]) -> None:
    """To the bit; warm-up included."""
    common = (f"stream.rope={rope}", *change)
    DenoiserCase(*common, AUDIT).stage.warm_up()
    plain, audited = blocks(*common), blocks(*common, AUDIT)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, audited, strict=True))


def read_it(static: StaticTransformer, kept: list[Tensor]) -> None:
    static.latents[0, 0, 0, 0].item()


def keep_it(static: StaticTransformer, kept: list[Tensor]) -> None:
    kept.append(static.latents.clone())


@pytest.mark.parametrize(
    ("slip", "cause"), [(read_it, "item.* inside a pass"), (keep_it, "a pass kept .* bytes in 1 tensors")]
)
@pytest.mark.parametrize("where", ["step", "remember"])
@ropes
def test_a_broken_block_ends_the_stage(
    rope: str, where: str, slip: Callable[[StaticTransformer, list[Tensor]], None], cause: str, monkeypatch
) -> None:
    """With the audit alone: nobody would notice else. The cause is one line, and the worker does not survive it."""
    right, kept = getattr(StaticTransformer, where), []

    def broken(self: StaticTransformer, *arguments: object) -> None:
        right(self, *arguments)
        slip(self, kept)

    monkeypatch.setattr(StaticTransformer, where, broken)
    assert len(blocks(f"stream.rope={rope}")) == 8
    with pytest.raises(Fatal, match=cause) as caught:
        blocks(f"stream.rope={rope}", AUDIT)
    assert isinstance(caught.value, AuditFailed)
    assert len(str(caught.value).splitlines()) == 1


def on_gpu(function: Callable[[FakeCuda], None], *, graphs: bool) -> tuple[FakeCuda, Callable[[], None]]:
    """What the audit makes of a function on a GPU that is a fake."""
    cuda = FakeCuda()
    record = CudaGraphs(CPU, cuda) if graphs else run_directly
    return cuda, Audit(record, GPU, cuda)(lambda: function(cuda))


def with_room(cuda: FakeCuda) -> None:
    """Needs memory while it runs."""
    cuda.allocate(8)
    cuda.free(8)


def test_on_a_gpu_waiting_is_refused_after_the_first_run() -> None:
    cuda, run = on_gpu(FakeCuda.wait, graphs=False)
    run()
    with pytest.raises(AuditFailed, match="waited for the GPU"):
        run()
    assert cuda.mode == 0, "refused in passes alone"
    with pytest.raises(AuditFailed, match="waited for the GPU"):
        on_gpu(FakeCuda.wait, graphs=True)


def test_on_a_gpu_another_error_is_not_the_audits() -> None:
    def fails(cuda: FakeCuda) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    cuda, run = on_gpu(fails, graphs=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run()
    assert cuda.mode == 0


def test_on_a_gpu_memory_must_be_given_back() -> None:
    _, run = on_gpu(with_room, graphs=False)
    for _ in range(3):
        run()
    _, run = on_gpu(lambda cuda: cuda.allocate(8), graphs=False)
    run()
    with pytest.raises(AuditFailed, match=r"found .*16.*, expected .*8"):
        run()


def test_on_a_gpu_a_replay_allocates_nothing() -> None:
    """Its memory was set aside at the capture; even memory that is given back would be a sign of something else."""
    cuda, run = on_gpu(with_room, graphs=True)
    assert cuda.stats["allocation.all.allocated"] == WARM_UPS + 1
    run()
    cuda.on_replay = partial(with_room, cuda)
    with pytest.raises(AuditFailed, match=r"allocation\.all\.allocated"):
        run()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["execution.denoiser=plain"], "audit: true needs denoiser: static, found denoiser: plain"),
        (["device=cuda", "placement=thread"], "needs placement: process for denoiser, found thread"),
    ],
)
def test_what_cannot_be_audited_is_refused(overrides: list[str], expected: str) -> None:
    load_config("pocket", overrides)
    with pytest.raises(ConfigError, match=expected):
        load_config("pocket", [*overrides, AUDIT])
    for others in (["placement=thread"], ["device=cuda"], ["device=cuda", "stages.vae_decoder.placement=thread"]):
        load_config("pocket", [*others, AUDIT])
