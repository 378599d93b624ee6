"""Damaged weights files: each is refused in one line that names it, and nothing that stands in one is ever run."""

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import (
    BASE,
    CPU,
    INDEX,
    LORA,
    QUERY,
    SINGLE,
    TEXT,
    TOKENIZER,
    VAE,
    WAN,
    changed,
    only,
    tiny_model,
    write,
)

from configs.schema import LoraConfig, ModelConfig
from ipc.errors import CheckpointError
from workers.models.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae_decoder

OWN = f"model.{QUERY}"
LORA_A = "base_model.model.blocks.0.self_attn.q.lora_A.weight"
SHARD = f"{WAN}/diffusion_pytorch_model-00001-of-00002.safetensors"
SHARD_NAME = Path(SHARD).name
MARK = "mark"
"""A file that appears if code in a weights file runs."""


@dataclass(frozen=True)
class Damage:
    """What is done to a good file, and what the error says beside its path."""

    file: str
    do: Callable[[Path], object]
    says: tuple[str, ...]


class Malice:
    """A pickle that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.mark,))


def with_tensor(name: str, value: object) -> Callable[[Path], object]:
    """A tensor replaced, or added."""
    return lambda path: changed(path, lambda tensors: tensors.update({name: value}))


def without(name: str) -> Callable[[Path], object]:
    return lambda path: changed(path, lambda tensors: tensors.pop(name))


def renamed(name: str, new: str) -> Callable[[Path], object]:
    return lambda path: changed(path, lambda tensors: tensors.update({new: tensors.pop(name)}))


def poisoned(name: str, value: float) -> Callable[[Path], object]:
    """One number of a tensor that is none."""
    return lambda path: changed(path, lambda tensors: tensors[name].view(-1)[:1].fill_(value))


def holding(content: object) -> Callable[[Path], object]:
    """A torch file of something else."""
    return lambda path: torch.save(content, path)


def bytes_of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def cut(share: float) -> Callable[[Path], object]:
    """Only the first part of a file, as an interrupted download leaves it."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def compressed(path: Path) -> None:
    """As some tool repacks it; mapped, the packed bytes would be taken for numbers."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def safetensors_with(header: dict[str, object]) -> Callable[[Path], object]:
    """A safetensors file whose header promises more than follows."""
    words = json.dumps(header).encode()
    return bytes_of(len(words).to_bytes(8, "little") + words)


def resaved(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A whole safetensors file with other tensors."""

    def save(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return save


def elsewhere(shard: Callable[[Path], str]) -> Callable[[Path], object]:
    """An index that names a good shard outside its folder: it would load if nobody looked."""

    def point(path: Path) -> None:
        outside = path.parents[1] / "outside.safetensors"
        shutil.copy(path.parent / SHARD_NAME, outside)
        index = json.loads(path.read_text(encoding="utf-8"))
        where = {name: shard(outside) if file == SHARD_NAME else file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps({"weight_map": where}), encoding="utf-8")

    return point


def half_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor[:2].clone() if "lora_A" in name else tensor[:, :2].clone()


DAMAGES = {
    "missing": Damage(VAE, Path.unlink, ("VAE not found", "expected one of", "Wan2.1_VAE.pth")),
    "missing text encoder": Damage(TEXT, Path.unlink, ("text encoder not found",)),
    "missing LoRA": Damage(LORA, Path.unlink, ("LoRA not found",)),
    "empty": Damage(BASE, bytes_of(b""), ("found an empty file", "download")),
    "empty safetensors": Damage(SINGLE, bytes_of(b""), ("found an empty file",)),
    "empty index": Damage(INDEX, bytes_of(b""), ("not a readable index",)),
    "directory": Damage(BASE, as_directory, ("found a directory",)),
    "directory for safetensors": Damage(SINGLE, as_directory, ("found a directory",)),
    "web page": Damage(BASE, bytes_of(b"<!DOCTYPE html><html>404</html>"), ("found a web page",)),
    "web page for safetensors": Damage(SINGLE, bytes_of(b"<!DOCTYPE html><html>404</html>"), ("found a web page",)),
    "Git LFS pointer": Damage(
        SINGLE, bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), ("Git LFS", "git lfs pull")
    ),
    "truncated": Damage(BASE, cut(0.7), ("not a readable torch file", "truncated")),
    "truncated VAE": Damage(VAE, cut(0.5), ("not a readable torch file", "truncated")),
    "truncated text encoder": Damage(TEXT, cut(0.99), ("not a readable torch file", "truncated")),
    "truncated safetensors": Damage(SINGLE, cut(0.6), ("not a readable safetensors file", "truncated")),
    "header longer than the file": Damage(
        SINGLE, bytes_of((2**62).to_bytes(8, "little") + b"{}"), ("not a readable safetensors file",)
    ),
    "header beyond the file's data": Damage(
        SINGLE,
        safetensors_with({QUERY: {"dtype": "F32", "shape": [24, 24], "data_offsets": [0, 24 * 24 * 4]}}),
        ("not a readable safetensors file",),
    ),
    "compressed": Damage(BASE, compressed, ("compressed", "as torch.save leaves it")),
    "code": Damage(
        BASE,
        lambda path: torch.save({"generator": {"x": Malice(path.with_name(MARK))}}, path),
        ("expected nothing but tensors", "nothing of it was run"),
    ),
    "code in a bare pickle": Damage(
        VAE, lambda path: path.write_bytes(pickle.dumps(Malice(path.with_name(MARK)))), ("found a pickle",)
    ),
    "code in a torch file from before 1.6": Damage(
        TEXT,
        lambda path: torch.save({"x": Malice(path.with_name(MARK))}, path, _use_new_zipfile_serialization=False),
        ("found a pickle",),
    ),
    "safetensors under a torch name": Damage(
        VAE, lambda path: save_file({"x": torch.zeros(1)}, path), ("found a safetensors file", "expected a zip file")
    ),
    "torch file under a safetensors name": Damage(
        SINGLE, holding({"x": torch.zeros(1)}), ("found a zip file", "expected a safetensors file")
    ),
    "not a dict": Damage(BASE, holding([torch.zeros(1)]), ("found list", "expected a dict of named tensors")),
    "a tensor alone": Damage(VAE, holding(torch.zeros(1)), ("found Tensor", "expected a dict of named tensors")),
    "an empty dict": Damage(TEXT, holding({}), ("found an empty dict",)),
    "the root is empty": Damage(BASE, holding({"generator": {}}), ("found an empty dict",)),
    "another root": Damage(
        BASE, holding({"critic": {OWN: torch.zeros(1)}}), ("critic: found a dict", "at the top or below generator")
    ),
    "keys that are no names": Damage(VAE, holding({1: torch.zeros(1)}), ("found key 1",)),
    "a number inside": Damage(BASE, with_tensor("model.x", 1), ("model.x: found a int",)),
    "a sparse tensor": Damage(BASE, with_tensor(OWN, torch.eye(24).to_sparse()), (OWN, "layout sparse_coo")),
    "missing tensor": Damage(
        BASE, without(OWN), (f"tensor {QUERY}", "found nothing of that name", "expected [24, 24]")
    ),
    "missing tensor of safetensors": Damage(
        SINGLE, resaved(lambda tensors: tensors.pop(QUERY)), (f"tensor {QUERY}", "expected [24, 24]")
    ),
    "missing tensor of the VAE's encoder": Damage(
        VAE, without("encoder.conv1.weight"), ("tensor encoder.conv1.weight", "expected [8, 3, 3, 3, 3]")
    ),
    "missing tensor of the text encoder": Damage(TEXT, without("norm.weight"), ("tensor norm.weight", "[16]")),
    "missing tensor of the LoRA": Damage(LORA, without(LORA_A), (f"tensor {LORA_A}", "expected [4, 24]")),
    "renamed tensor": Damage(
        BASE, renamed(OWN, "model.query"), (f"tensor {QUERY}", "found query instead", "expected [24, 24]")
    ),
    "extra tensor": Damage(
        BASE, with_tensor("model.extra", torch.zeros(3)), ("tensor extra", "found [3]", "expected none but")
    ),
    "extra tensor of safetensors": Damage(
        SINGLE, resaved(lambda tensors: tensors.update(extra=torch.zeros(3))), ("tensor extra", "found [3]")
    ),
    "tensor twice": Damage(
        BASE, with_tensor(f"model._fsdp_wrapped_module.{QUERY}", torch.zeros(24, 24)), (QUERY, "found it twice")
    ),
    "wrong shape": Damage(
        BASE, with_tensor(OWN, torch.zeros(24, 12)), (f"tensor {QUERY}", "found [24, 12]", "expected [24, 24]")
    ),
    "wrong shape of the same size": Damage(
        BASE, with_tensor("model.patch_embedding.weight", torch.zeros(24, 64)), ("found [24, 64]", "[24, 16, 1, 2, 2]")
    ),
    "wrong shape in the VAE": Damage(
        VAE,
        with_tensor("decoder.head.2.weight", torch.zeros(3, 9, 3, 3, 3)),
        ("tensor decoder.head.2.weight", "found [3, 9, 3, 3, 3]", "expected [3, 8, 3, 3, 3]"),
    ),
    "integers": Damage(
        BASE,
        with_tensor(OWN, torch.zeros(24, 24, dtype=torch.int64)),
        (f"tensor {QUERY}", "found int64", "expected one of float32"),
    ),
    "integers in safetensors": Damage(
        SINGLE,
        resaved(lambda tensors: tensors.update({QUERY: torch.zeros(24, 24, dtype=torch.int8)})),
        (f"tensor {QUERY}", "found I8", "expected one of float32"),
    ),
    "not a number": Damage(BASE, poisoned(OWN, float("nan")), (f"tensor {QUERY}", "found NaN or infinity")),
    "infinity in the text encoder": Damage(TEXT, poisoned("norm.weight", float("inf")), ("tensor norm.weight",)),
    "infinity in the LoRA": Damage(LORA, poisoned(LORA_A, float("inf")), ("lora_A.weight", "found NaN or infinity")),
    "a name with line breaks": Damage(
        BASE, with_tensor("model.x\n\x1b[2Jy\u2028z", torch.zeros(1)), ("x\\n\\x1b[2Jy\\u2028z",)
    ),
    "a name without end": Damage(BASE, with_tensor("x" * 10**5, torch.zeros(1)), ("xxx...",)),
    "LoRA of another rank": Damage(
        LORA,
        lambda path: changed(path, half_rank),
        ("lora_A.weight", "found [2, 24]", "expected [4, 24]", "set model.lora.rank (now 4)"),
    ),
    "index of no JSON": Damage(INDEX, bytes_of(b"{"), ("not a readable index",)),
    "index nested without end": Damage(INDEX, bytes_of(b"[" * 10**5), ("not a readable index",)),
    "index without map": Damage(INDEX, bytes_of(b'{"metadata": {}}'), ("found no weight_map",)),
    "index of numbers": Damage(INDEX, bytes_of(b'{"weight_map": {"x": 1}}'), ("found no weight_map",)),
    "index naming a missing shard": Damage(
        INDEX, lambda path: (path.parent / SHARD_NAME).unlink(), ("weight_map", SHARD_NAME, "is missing")
    ),
    "index leaving its folder": Damage(
        INDEX, elsewhere(lambda outside: f"../{outside.name}"), ("weight_map", "../outside", "plain file name")
    ),
    "index with an absolute path": Damage(INDEX, elsewhere(str), ("weight_map", "plain file name")),
    "index with a zero byte": Damage(INDEX, elsewhere(lambda _: f"{SHARD_NAME}\0"), ("weight_map", "plain file name")),
    "index that disagrees with its shard": Damage(
        SHARD,
        resaved(lambda tensors: tensors.pop(min(tensors))),
        ("found nothing of that name", "model.safetensors.index.json"),
    ),
    "truncated shard": Damage(SHARD, cut(0.5), ("not a readable safetensors file", "truncated")),
    "tokenizer missing": Damage(f"{TOKENIZER}/tokenizer.json", Path.unlink, ("found no tokenizer.json",)),
    "tokenizer of no JSON": Damage(f"{TOKENIZER}/tokenizer.json", bytes_of(b"{"), ("not a readable tokenizer",)),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whole sets of good files, the safetensors one in a piece and in two; not to be changed."""
    return {sharded: write(tmp_path_factory.mktemp("published"), sharded=sharded) for sharded in (False, True)}


def copied(published: dict[bool, Path], folder: Path, file: str) -> Path:
    """A set of its own to be damaged, in which the transformer's file is the one in question."""
    sharded = file in (INDEX, SHARD)
    shutil.copytree(published[sharded], folder)
    return only(folder, INDEX if sharded else SINGLE if file == SINGLE else BASE)


def with_lora(folder: Path) -> ModelConfig:
    return tiny_model(path=folder, lora=LoraConfig(rank=4, alpha=4), random_weights=False)


def load_all(folder: Path) -> None:
    model = with_lora(folder)
    load_transformer(model, CPU)
    load_vae_decoder(model, CPU)
    load_text_encoder(model, CPU)
    load_tokenizer(model)


@pytest.mark.parametrize("file", [BASE, SINGLE, INDEX])
def test_undamaged_files_load(published: dict[bool, Path], tmp_path: Path, file: str) -> None:
    """So that every refusal below is that of its damage."""
    load_all(copied(published, tmp_path / "model", file))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(name: str, published: dict[bool, Path], tmp_path: Path) -> None:
    """It names the file and, where there is one, the tensor, what was found and what was expected; nothing runs."""
    damage = DAMAGES[name]
    folder = copied(published, tmp_path / "model", damage.file)
    damage.do(folder / damage.file)
    with pytest.raises(CheckpointError) as caught:
        load_all(folder)
    line = str(caught.value)
    assert line.splitlines() == [line]
    assert line.isprintable()
    assert len(line) < len(str(folder)) + 600
    assert line.startswith(str(folder))
    assert Path(damage.file).stem in line
    assert all(text in line for text in damage.says), line
    assert not list(folder.rglob(MARK))


def test_the_code_would_run(tmp_path: Path) -> None:
    """The pickles above are live: what reads them carelessly makes the mark."""
    pickle.loads(pickle.dumps(Malice(tmp_path / MARK)))
    assert (tmp_path / MARK).exists()


@pytest.mark.parametrize("file", [BASE, SINGLE])
def test_a_file_cut_anywhere_is_refused(published: dict[bool, Path], tmp_path: Path, file: str) -> None:
    folder = copied(published, tmp_path / "model", file)
    whole = (folder / file).read_bytes()
    for length in [*range(0, 80, 7), *range(80, len(whole), len(whole) // 40), len(whole) - 1]:
        (folder / file).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=file) as caught:
            load_transformer(with_lora(folder), CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Defining your")  # torch of its own, when it refuses a changed pickle
@pytest.mark.parametrize("file", [BASE, SINGLE, INDEX])
def test_changed_bytes_load_or_are_refused(published: dict[bool, Path], tmp_path: Path, file: str) -> None:
    """Where names, shapes and offsets are written, at both ends: never another error, never a crash."""
    folder = copied(published, tmp_path / "model", file)
    whole, chance, refused = (folder / file).read_bytes(), random.Random(0), 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            content[chance.choice((chance.randrange(4000), -1 - chance.randrange(2000)))] = chance.randrange(256)
        (folder / file).write_bytes(content)
        try:
            load_transformer(with_lora(folder), CPU)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: found no such directory, .*set model\.path$"):
        load_transformer(with_lora(tmp_path / "none"), CPU)
