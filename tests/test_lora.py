"""A LoRA is merged into plain linears: the reference's stream comes out, and nothing of PEFT is left behind."""

from pathlib import Path

import pytest
import torch
from golden_cases import cases, load, relative_error
from stream_case import case_rollout
from tiny_files import CPU, LORA, QUERY, changed, equal, tiny_model, weights, write

from configs.schema import LoraConfig
from ipc.errors import CheckpointError
from workers.models.checkpoint import load_transformer
from workers.models.kv_cache import CachePlan

ADAPTED = [path for path in cases("stream") if load(path).config["lora"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"))


def case_id(path: Path) -> str:
    return f"golden-{path.name}-plain"


@pytest.mark.parametrize("path", ADAPTED, ids=case_id)
@torch.inference_mode()
def test_one_pass_equals_the_reference(path: Path, tmp_path: Path) -> None:
    """The flow of the first block's noise, the LoRA read from its file and merged."""
    case = load(path)
    rollout = case_rollout(case, tmp_path / "model")
    model, expected = rollout.model, case.tensors["single/flow"]
    prompt = model.prompt_kv(case.tensors["prompt_embeds"][:1])
    noise = case.tensors["noise"][:, : expected.shape[1]]
    timestep = case.tensors["single/timestep"].flatten()[0].item()
    plan = CachePlan((0,), 1, tuple(range(expected.shape[1])), None)
    flow = model(noise, timestep, prompt, rollout.passes.cache, plan)
    assert relative_error(flow, expected) <= 1e-4


def update(files: Path, name: str, scale: float) -> torch.Tensor:
    """scale * B @ A in float64, from the file itself."""
    adapter = torch.load(files / LORA, weights_only=True)["generator_lora"]
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    return scale * adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()


def test_update_is_alpha_over_rank_times_the_product(files: Path) -> None:
    base = weights(tiny_model(path=files))
    merged = weights(tiny_model(path=files, lora=LoraConfig(rank=4, alpha=6)))
    linears = [name for name in base if name.startswith("blocks.") and base[name].ndim == 2]
    assert len(linears) == 10 * 2
    for name, tensor in base.items():
        expected = tensor.double() + (update(files, name, 1.5) if name in linears else 0.0)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_sum_is_rounded_once(files: Path) -> None:
    """In bfloat16 the weights are those of the float32 merge, rounded; not a sum of two rounded parts."""
    lora = LoraConfig(rank=4, alpha=4)
    full = weights(tiny_model(path=files, lora=lora))
    half = weights(tiny_model(path=files, lora=lora, dtype="bfloat16"))
    assert equal({name: tensor.bfloat16() for name, tensor in full.items()}, half)


def test_nothing_of_peft_is_left(files: Path) -> None:
    """Graphs and compilers see the same modules as without a LoRA."""
    model = tiny_model(path=files)
    plain = load_transformer(model, CPU)
    merged = load_transformer(model.model_copy(update={"lora": LoraConfig(rank=4, alpha=4)}), CPU)
    for (name, one), (other_name, other) in zip(plain.named_modules(), merged.named_modules(), strict=True):
        assert (name, type(one), vars(one).keys()) == (other_name, type(other), vars(other).keys())
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_bare_lora_is_read_like_the_wrapped_one(files: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=8)
    bare = write(tmp_path, bare=True)
    assert equal(weights(tiny_model(path=bare, lora=lora)), weights(tiny_model(path=files, lora=lora)))


def test_without_a_lora_no_file_is_looked_for(tmp_path: Path) -> None:
    model = tiny_model(path=write(tmp_path))
    expected = weights(model)
    (tmp_path / LORA).write_bytes(b"damaged")
    assert equal(weights(model), expected)
    (tmp_path / LORA).unlink()
    assert equal(weights(model), expected)
    with pytest.raises(CheckpointError, match="LoRA not found"):
        weights(model.model_copy(update={"lora": LoraConfig(rank=4, alpha=4)}))


@pytest.mark.parametrize("rank", [2, 8])
def test_another_rank_is_one_clear_line(files: Path, rank: int) -> None:
    with pytest.raises(CheckpointError, match=rf"lora_A\.weight: found \[4, 24\], expected \[{rank}, 24\]") as caught:
        weights(tiny_model(path=files, lora=LoraConfig(rank=rank, alpha=4)))
    assert f"set model.lora.rank (now {rank}) and model.lora.alpha" in str(caught.value)


def test_an_alpha_in_the_file_is_not_ignored(tmp_path: Path) -> None:
    """LongLive's files hold none; one that does was trained by other rules, and a wrong scale shows nowhere else."""
    write(tmp_path)
    changed(tmp_path / LORA, lambda tensors: tensors.update({"base_model.model.blocks.0.alpha": torch.tensor(2.0)}))
    with pytest.raises(CheckpointError, match=r"tensor base_model\.model\.blocks\.0\.alpha: found \[\], expected none"):
        weights(tiny_model(path=tmp_path, lora=LoraConfig(rank=4, alpha=4)))


def test_the_base_is_not_changed_on_disk(files: Path) -> None:
    """Files are mapped into memory: merging must not write through to them."""
    before = weights(tiny_model(path=files))[QUERY].clone()
    weights(tiny_model(path=files, lora=LoraConfig(rank=4, alpha=4)))
    assert torch.equal(weights(tiny_model(path=files))[QUERY], before)
