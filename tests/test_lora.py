"""A LoRA is summed into the weights it was trained on, and what runs afterwards is plain linears."""

from pathlib import Path

import pytest
import torch
from golden_cases import Case, cases, load, relative_error
from stream_case import case_rollout, play
from tiny_files import CPU, LORA, QUERY, equal, tiny_model, weights, write

from configs.schema import LoraConfig
from workers.models.checkpoint import load_transformer
from workers.models.lora import PREFIX
from workers.models.transformer import CausalWanTransformer

WITH_LORA = [path for path in cases("stream") if load(path).config["lora"]]


def case_id(path: Path) -> str:
    return f"golden-{path.name}-plain"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set of good files, its LoRA of rank 4; not to be changed."""
    return write(tmp_path_factory.mktemp("published"))


def held(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of the published file."""
    return torch.load(folder / LORA, weights_only=True)["generator_lora"]


def update(adapter: dict[str, torch.Tensor], name: str, scale: float) -> torch.Tensor | float:
    """scale * B @ A for a weight in float64, 0 for one that no LoRA goes with."""
    stem = PREFIX + name.removesuffix(".weight")
    if not name.endswith(".weight") or f"{stem}.lora_A.weight" not in adapter:
        return 0.0
    return scale * adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()


def linears(model: CausalWanTransformer) -> set[str]:
    """The weights that the published LoRA goes with: of every linear inside a layer."""
    return {f"{n}.weight" for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, torch.nn.Linear)}


def golden_adapter(case: Case) -> dict[str, torch.Tensor]:
    return {name.removeprefix("lora/"): t for name, t in case.tensors.items() if name.startswith("lora/")}


@pytest.mark.parametrize("path", WITH_LORA, ids=case_id)
def test_merged_weights_make_the_reference_stream(path: Path, tmp_path: Path) -> None:
    """The reference ran with PEFT's modules in place; the stream with everything merged is the same."""
    case = load(path)
    rollout = case_rollout(case, tmp_path / "model")
    assert relative_error(play(case, rollout), case.tensors["latents"]) <= 1e-4


@pytest.mark.parametrize("path", WITH_LORA, ids=case_id)
def test_every_reference_weight_is_the_sum(path: Path, tmp_path: Path) -> None:
    case = load(path)
    adapter, lora = golden_adapter(case), case.config["lora"]
    model = case_rollout(case, tmp_path / "model").model
    for name, merged in model.state_dict().items():
        base = case.tensors[f"weights/model.{name}"]
        expected = base.double() + update(adapter, name, lora["alpha"] / lora["rank"])
        assert relative_error(merged, expected) <= 1e-6, name


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 8.0), (2, 3.0), (1, 0.5), (4, 0.0)])
def test_merge_adds_the_scaled_product(tmp_path: Path, rank: int, alpha: float) -> None:
    """W + alpha / rank * B @ A in every linear of every layer, and in nothing else."""
    folder = write(tmp_path, rank=rank)
    base = weights(tiny_model(path=folder))
    merged = load_transformer(tiny_model(path=folder, lora=LoraConfig(rank=rank, alpha=alpha)), CPU)
    adapter, changed = held(folder), set()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight.double(), base[name].double() + update(adapter, name, alpha / rank))
        if not torch.equal(weight, base[name]):
            changed.add(name)
    assert changed == (linears(merged) if alpha else set())


def test_nothing_of_peft_is_left(files: Path) -> None:
    """Names, classes and attributes are those of a model that never had a LoRA: no module adds anything at run time."""
    plain = load_transformer(tiny_model(path=files), CPU)
    merged = load_transformer(tiny_model(path=files, lora=LoraConfig(rank=4, alpha=8)), CPU)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert modules(merged) == modules(plain)
    assert [name for name, _ in merged.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert not any(module.training for module in merged.modules())


def modules(model: CausalWanTransformer) -> dict[str, tuple[type, set[str], bool]]:
    """Class, attributes and hooks of every module."""
    return {
        name: (type(module), set(vars(module)), bool(module._forward_hooks or module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_rounded_once(files: Path, dtype: torch.dtype) -> None:
    """Base and update are added in float32: a small update is not lost beside a large weight that was rounded first."""
    word = str(dtype).removeprefix("torch.")
    lora = LoraConfig(rank=4, alpha=4)
    exact = weights(tiny_model(path=files, lora=lora))
    rounded = weights(tiny_model(path=files, lora=lora, dtype=word))
    assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)


def test_wrapped_and_bare_files_are_the_same_lora(files: Path, tmp_path: Path) -> None:
    """As published below `generator_lora`, and as PEFT itself saves it."""
    lora = LoraConfig(rank=4, alpha=8)
    bare = write(tmp_path, bare=True)
    assert PREFIX + QUERY.replace("weight", "lora_A.weight") in torch.load(bare / LORA, weights_only=True)
    assert equal(weights(tiny_model(path=bare, lora=lora)), weights(tiny_model(path=files, lora=lora)))


def test_alpha_is_the_configuration_s(files: Path) -> None:
    """The file states no alpha, so that another one is another model, silently; it must at least be heeded."""
    one, other = (weights(tiny_model(path=files, lora=LoraConfig(rank=4, alpha=alpha))) for alpha in (4, 8))
    assert not torch.equal(one[QUERY], other[QUERY])


def test_without_lora_its_file_is_not_read(files: Path, tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / LORA).write_bytes(b"not looked at")
    assert equal(weights(tiny_model(path=folder)), weights(tiny_model(path=files)))
