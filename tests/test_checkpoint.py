"""Weights files: every published form loads to the same weights, and every damaged one is one clear line."""

import json
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.load import load_config
from configs.schema import LoraConfig, ModelConfig
from ipc.errors import CheckpointError, ConfigError
from workers.models.checkpoint import (
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae_decoder,
    load_vae_encoder,
)

CPU = torch.device("cpu")
SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "write_checkpoint.py"))
BASE = "longlive_models/models/longlive_base.pt"
LORA = "longlive_models/models/lora.pt"
WAN = "Wan2.1-T2V-1.3B"
SINGLE = f"{WAN}/diffusion_pytorch_model.safetensors"
INDEX = f"{WAN}/diffusion_pytorch_model.safetensors.index.json"
VAE = f"{WAN}/Wan2.1_VAE.pth"
TEXT = f"{WAN}/models_t5_umt5-xxl-enc-bf16.pth"
QUERY = "blocks.0.self_attn.q.weight"


def tiny_model() -> ModelConfig:
    """Pocket's architecture, narrower, so that files are small."""
    overrides = {
        "dim": 24,
        "ffn_dim": 32,
        "freq_dim": 16,
        "text_dim": 16,
        "num_heads": 2,
        "num_layers": 2,
    }
    settings = [f"model.transformer.{key}={value}" for key, value in overrides.items()]
    settings += ["model.text_encoder.dim=16", "model.text_encoder.dim_attn=16", "model.text_encoder.dim_ffn=16"]
    settings += ["model.text_encoder.num_layers=1", "model.vae_dtype=float32"]
    return load_config("pocket", settings).model


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set of good files."""
    folder = tmp_path_factory.mktemp("published")
    SCRIPT["write"](tiny_model(), folder, seed=0, rank=4, dtype=torch.float32, sharded=False)
    return folder


@pytest.fixture
def files(published: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def model_at(folder: Path, **changes: object) -> ModelConfig:
    return tiny_model().model_copy(update={"path": folder, **changes})


def weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    return load_transformer(model, CPU).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def only(folder: Path, kept: str) -> Path:
    """Leaves one of the transformer's files."""
    for name in (BASE, SINGLE, INDEX):
        if name != kept:
            (folder / name).unlink(missing_ok=True)
    return folder


def test_every_published_form_gives_the_same_weights(files: Path, tmp_path: Path) -> None:
    """generator, generator_ema with its wrappers, bare, safetensors whole and sharded."""
    expected = weights(model_at(files))
    assert equal(weights(model_at(files, generator="generator_ema")), expected)
    generator = torch.load(files / BASE, weights_only=True)["generator"]
    torch.save(generator, files / BASE)
    assert equal(weights(model_at(files)), expected)
    assert equal(weights(model_at(only(files, SINGLE))), expected)
    shards = tmp_path / "shards"
    SCRIPT["write"](tiny_model(), shards, seed=0, rank=4, dtype=torch.float32, sharded=True)
    assert equal(weights(model_at(only(shards, INDEX))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_floating_dtypes_are_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    SCRIPT["write"](tiny_model(), tmp_path, seed=0, rank=4, dtype=dtype, sharded=False)
    model = model_at(tmp_path)
    stored = torch.load(tmp_path / BASE, weights_only=True)["generator"]
    for name, tensor in weights(model).items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, stored[f"model.{name}"].float())
    assert load_vae_decoder(model, CPU).conv2.weight.dtype is torch.float32
    assert next(load_text_encoder(model, CPU).parameters()).dtype is torch.float32


def test_all_parts_load(files: Path) -> None:
    model = model_at(files)
    decoder = load_vae_decoder(model, CPU)
    pixels = decoder.decode(torch.zeros(1, 16, 4, 4), decoder.new_cache())
    assert pixels.shape == (1, 1, 3, 32, 32)
    assert load_vae_encoder(model, CPU).encode(torch.zeros(1, 5, 3, 32, 32)).shape == (1, 2, 16, 4, 4)
    ids = load_tokenizer(model).ids("a red circle")
    assert load_text_encoder(model, CPU).encode(torch.tensor(ids)).shape == (len(ids), 16)


def test_lora_is_merged_into_plain_linears(files: Path) -> None:
    """W + alpha / rank * B @ A, and nothing of PEFT is left in the module tree."""
    base = weights(model_at(files))
    merged = load_transformer(model_at(files, lora=LoraConfig(rank=4, alpha=8)), CPU)
    adapter = torch.load(files / LORA, weights_only=True)["generator_lora"]
    prefix = f"base_model.model.{QUERY.removesuffix('.weight')}"
    update = 2.0 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
    torch.testing.assert_close(merged.state_dict()[QUERY], base[QUERY] + update)
    assert merged.state_dict().keys() == base.keys()
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} <= {"torch", "workers"}


def test_bare_lora_is_read_like_the_wrapped_one(files: Path) -> None:
    model = model_at(files, lora=LoraConfig(rank=4, alpha=8))
    expected = weights(model)
    torch.save(torch.load(files / LORA, weights_only=True)["generator_lora"], files / LORA)
    assert equal(weights(model), expected)


def test_weights_are_held_once(files: Path) -> None:
    """Loading takes one tensor more than the model at most: files are mapped, the model is built without memory."""
    made: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu" and "copy" in str(func):
                made.append(out.nbytes)
            return out

    with Counting():
        transformer = load_transformer(model_at(files), CPU)
    whole = sum(p.nbytes for p in transformer.parameters())
    assert sum(made) <= whole


def test_random_weights_are_the_same_every_time() -> None:
    model = tiny_model()
    assert equal(weights(model), weights(model))
    other = model.model_copy(update={"random_weights_seed": 1})
    assert not equal(weights(model), weights(other))


def test_no_path_and_no_random_weights_is_said() -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_transformer(tiny_model().model_copy(update={"random_weights": False}), CPU)


class Malice:
    """A pickle that would make a file if it were executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.mark,))


def changed(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrites the tensors of a torch file."""
    held = torch.load(path, weights_only=True)
    tensors = next((held[key] for key in ("generator", "generator_lora") if key in held), held)
    change(tensors)
    torch.save(held, path)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def shard_index(folder: Path, shard: str) -> None:
    names = load_transformer(model_at(folder), CPU).state_dict()
    only(folder, INDEX)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}), encoding="utf-8")


def header_bomb(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def wrong_offsets(path: Path) -> None:
    header = json.dumps({QUERY: {"dtype": "F32", "shape": [24, 24], "data_offsets": [0, 10**9]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "empty": (BASE, lambda p: p.write_bytes(b""), ("not a readable torch file",)),
    "truncated": (BASE, lambda p: cut(p, 0.7), ("not a readable torch file",)),
    "text": (BASE, lambda p: p.write_text("<html>404</html>"), ()),
    "directory": (BASE, as_directory, ("found a directory",)),
    "malicious": (BASE, lambda p: torch.save({"generator": {"x": Malice(p.with_name("mark"))}}, p), ("other than",)),
    "bare pickle": (BASE, lambda p: p.write_bytes(pickle.dumps(Malice(p.with_name("mark")))), ()),
    "a list": (BASE, lambda p: torch.save([torch.zeros(1)], p), ("found list", "expected a dict")),
    "a number inside": (BASE, lambda p: changed(p, lambda t: t.update({"model.x": 1})), ("model.x", "found int")),
    "missing tensor": (BASE, lambda p: changed(p, lambda t: t.pop(f"model.{QUERY}")), (QUERY, "expected [24, 24]")),
    "renamed tensor": (
        BASE,
        lambda p: changed(p, lambda t: t.update({"model.renamed": t.pop(f"model.{QUERY}")})),
        (QUERY, "expected [24, 24]"),
    ),
    "further tensor": (
        BASE,
        lambda p: changed(p, lambda t: t.update({"model.further": torch.zeros(3)})),
        ("further", "found [3]"),
    ),
    "other shape": (
        BASE,
        lambda p: changed(p, lambda t: t.update({f"model.{QUERY}": torch.zeros(24, 12)})),
        (QUERY, "found [24, 12]", "expected [24, 24]"),
    ),
    "integers": (
        BASE,
        lambda p: changed(p, lambda t: t.update({f"model.{QUERY}": torch.zeros(24, 24, dtype=torch.int64)})),
        (QUERY, "found int64", "expected float32"),
    ),
    "VAE truncated": (VAE, lambda p: cut(p, 0.5), ("not a readable torch file",)),
    "VAE of other width": (
        VAE,
        lambda p: changed(p, lambda t: t.update({"decoder.head.2.weight": torch.zeros(3, 9, 3, 3, 3)})),
        ("decoder.head.2.weight", "found [3, 9, 3, 3, 3]", "expected [3, 8, 3, 3, 3]"),
    ),
    "VAE encoder missing": (
        VAE,
        lambda p: changed(p, lambda t: t.pop("encoder.conv1.weight")),
        ("encoder.conv1.weight",),
    ),
    "text encoder without norm": (TEXT, lambda p: changed(p, lambda t: t.pop("norm.weight")), ("norm.weight",)),
    "text encoder gone": (TEXT, lambda p: p.unlink(), ("text encoder not found",)),
    "LoRA of other rank": (
        LORA,
        lambda p: changed(p, halve_rank),
        ("lora_A.weight", "found [2, 24]", "expected [4, 24]"),
    ),
    "LoRA gone": (LORA, lambda p: p.unlink(), ("LoRA not found",)),
    "safetensors truncated": (SINGLE, lambda p: cut(p, 0.6), ("not a readable safetensors file",)),
    "safetensors header bomb": (SINGLE, header_bomb, ("not a readable safetensors file",)),
    "safetensors offsets": (SINGLE, wrong_offsets, ("not a readable safetensors file",)),
    "safetensors of another": (SINGLE, lambda p: save_file({"a": torch.zeros(1)}, p), ("expected",)),
    "tokenizer empty": (
        f"{WAN}/google/umt5-xxl/tokenizer.json",
        lambda p: p.write_text("{"),
        ("umt5-xxl", "not a readable tokenizer"),
    ),
}


def halve_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor[:2].clone() if "lora_A" in name else tensor[:, :2].clone()


def load_all(model: ModelConfig) -> None:
    load_transformer(model, CPU)
    load_vae_decoder(model, CPU)
    load_text_encoder(model, CPU)
    load_tokenizer(model)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_is_one_clear_line(name: str, files: Path) -> None:
    """It names the file and, where there is one, the tensor, what was found and what was expected; nothing runs."""
    where, damage, says = DAMAGES[name]
    path = files / where
    if where == SINGLE:
        only(files, SINGLE)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        load_all(model_at(files, lora=LoraConfig(rank=4, alpha=4)))
    line = str(caught.value)
    assert "\n" not in line
    assert str(files) in line
    assert all(text in line for text in says), line
    assert not path.with_name("mark").exists()


@pytest.mark.parametrize(
    ("shard", "says"), [("gone.safetensors", "is missing"), ("../up.safetensors", "plain file name")]
)
def test_bad_index_is_one_clear_line(files: Path, shard: str, says: str) -> None:
    shard_index(files, shard)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_transformer(model_at(files), CPU)
    assert INDEX.split("/")[-1] in str(caught.value)


def test_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_transformer(model_at(tmp_path / "none"), CPU)
