"""Every damaged, foreign or hostile weights file is one clear line, and nothing of it is ever run."""

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import BASE, CPU, INDEX, LORA, QUERY, SINGLE, TEXT, TOKENIZER, VAE, changed, only, tiny_model, write

from configs.schema import LoraConfig, ModelConfig
from ipc.errors import CheckpointError
from workers.models.checkpoint import (
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae_decoder,
    load_vae_encoder,
)

Damage = Callable[[Path], object]
MARK = "it-ran"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set of good files."""
    return write(tmp_path_factory.mktemp("published"))


@pytest.fixture
def files(published: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def load_all(folder: Path, **changes: object) -> None:
    model: ModelConfig = tiny_model(path=folder, random_weights=False, lora=LoraConfig(rank=4, alpha=4))
    model = model.model_copy(update=changes)
    load_transformer(model, CPU)
    load_vae_decoder(model, CPU)
    load_vae_encoder(model, CPU)
    load_text_encoder(model, CPU)
    load_tokenizer(model)


class Malice:
    """A pickle that makes a file when it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.mark,))


def mark(path: Path) -> Malice:
    return Malice(path.with_name(MARK))


def cut(keep: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def content(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def tensor(name: str, make: Callable[[], object]) -> Damage:
    """One tensor of a torch file is another; made when it is needed, not when tests are collected."""
    return lambda path: changed(path, lambda tensors: tensors.update({name: make()}))


def without(name: str) -> Damage:
    return lambda path: changed(path, lambda tensors: tensors.pop(name))


def renamed(name: str, new: str) -> Damage:
    return lambda path: changed(path, lambda tensors: tensors.update({new: tensors.pop(name)}))


def compressed(path: Path) -> None:
    """The same zip file, as a packer would make it; mapped into memory its tensors would be noise."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


def halved_rank(path: Path) -> None:
    changed(
        path,
        lambda tensors: tensors.update(
            {name: (t[:2] if "lora_A" in name else t[:, :2]).clone() for name, t in tensors.items()}
        ),
    )


def long_offsets(path: Path) -> None:
    header = json.dumps({QUERY: {"dtype": "F32", "shape": [24, 24], "data_offsets": [0, 10**9]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def safetensor(name: str, make: Callable[[], torch.Tensor]) -> Damage:
    return lambda path: save_file(load_file(path) | {name: make()}, path)


def shard(name: str) -> Damage:
    """An index that says so for every tensor."""

    def damage(path: Path) -> None:
        names = load_file(path.parent / Path(SINGLE).name)
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}), encoding="utf-8")

    return damage


def another_tensor_in_index(path: Path) -> None:
    whole = Path(SINGLE).name
    names = [*load_file(path.parent / whole), "blocks.9.more"]
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, whole)}), encoding="utf-8")


def tokenizer_without_end(path: Path) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(held | {"post_processor": None}), encoding="utf-8")


PREFIXED = f"model.{QUERY}"
LORA_A = "base_model.model.blocks.0.self_attn.q.lora_A.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5676070424\n"

DAMAGES: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "empty": (BASE, content(b""), ("found an empty file", "expected a zip file of torch.save", "download")),
    "truncated at its end": (BASE, cut(0.99), ("not a readable torch file", "truncated", "download")),
    "truncated at its start": (BASE, cut(0.01), ("not a readable torch file", "truncated")),
    "a web page": (BASE, content(b"<!doctype html><p>404"), ("found a web page", "download it again")),
    "a Git LFS pointer": (BASE, content(LFS), ("found a Git LFS pointer", "git lfs pull")),
    "a directory": (BASE, as_directory, ("found a directory", "expected a weights file")),
    "code in a tensor's place": (BASE, lambda p: torch.save({"generator": {"x": mark(p)}}, p), ("found code",)),
    "code in a LoRA": (
        LORA,
        lambda p: torch.save({"generator_lora": mark(p)}, p),
        ("found code", "nothing but tensors"),
    ),
    "code in the VAE": (VAE, lambda p: torch.save(mark(p), p), ("found code", "nothing of it was run")),
    "a bare pickle": (BASE, lambda p: p.write_bytes(pickle.dumps(mark(p))), ("found a pickle",)),
    "torch's old form": (
        VAE,
        lambda p: torch.save({"a": torch.zeros(1)}, p, _use_new_zipfile_serialization=False),
        ("found a pickle, or a torch file from before 1.6",),
    ),
    "another zip file": (BASE, foreign_zip, ("not a readable torch file",)),
    "packed again": (VAE, compressed, ("found compressed entries", "expected a file as torch.save leaves it")),
    "safetensors by a torch name": (
        VAE,
        lambda p: save_file({"a": torch.zeros(1)}, p),
        ("found a safetensors file", "expected a zip file of torch.save"),
    ),
    "a list": (BASE, lambda p: torch.save([torch.zeros(1)], p), ("found list", "expected a dict of named tensors")),
    "an empty dict": (BASE, lambda p: torch.save({}, p), ("found an empty dict",)),
    "another root": (
        BASE,
        lambda p: torch.save({"critic": {"a": torch.zeros(1)}}, p),
        ("critic: found a dict", "at the top or below generator"),
    ),
    "keys that are numbers": (BASE, lambda p: torch.save({1: torch.zeros(1)}, p), ("found key 1",)),
    "a number in a tensor's place": (BASE, tensor(PREFIXED, lambda: 1.5), (QUERY, "found a float")),
    "a sparse tensor": (BASE, tensor(PREFIXED, lambda: torch.zeros(24, 24).to_sparse()), (QUERY, "layout sparse_coo")),
    "a tensor without data": (
        BASE,
        tensor(PREFIXED, lambda: torch.zeros(24, 24, device="meta")),
        (QUERY, "without data"),
    ),
    "a tensor missing": (BASE, without(PREFIXED), (QUERY, "found nothing of that name", "expected [24, 24]")),
    "a tensor renamed": (BASE, renamed(PREFIXED, "model.x\n\x1b[31m"), (QUERY, r"found x\n\x1b[31m instead")),
    "a tensor twice": (BASE, tensor(QUERY, lambda: torch.zeros(24, 24)), (QUERY, "found it twice", "expected it once")),
    "a further tensor": (
        BASE,
        tensor("model.further", lambda: torch.zeros(3)),
        ("tensor further", "found [3]", "expected none"),
    ),
    "another shape": (
        BASE,
        tensor(PREFIXED, lambda: torch.zeros(24, 12)),
        (QUERY, "found [24, 12]", "expected [24, 24]"),
    ),
    "no dimensions": (BASE, tensor(PREFIXED, lambda: torch.tensor(1.0)), (QUERY, "found []", "expected [24, 24]")),
    "integers": (
        BASE,
        tensor(PREFIXED, lambda: torch.ones(24, 24, dtype=torch.int8)),
        (QUERY, "found int8", "float32, bfloat16"),
    ),
    "float64": (BASE, tensor(PREFIXED, lambda: torch.ones(24, 24, dtype=torch.float64)), (QUERY, "found float64")),
    "complex": (BASE, tensor(PREFIXED, lambda: torch.ones(24, 24, dtype=torch.complex64)), (QUERY, "found complex64")),
    "NaN": (
        BASE,
        tensor(PREFIXED, lambda: torch.full((24, 24), torch.nan)),
        (QUERY, "found NaN or infinity", "finite"),
    ),
    "infinity in the VAE": (
        VAE,
        tensor("conv2.bias", lambda: torch.full((16,), -torch.inf)),
        ("conv2.bias", "infinity"),
    ),
    "VAE truncated": (VAE, cut(0.5), ("not a readable torch file", "truncated")),
    "VAE of another width": (
        VAE,
        tensor("decoder.head.2.weight", lambda: torch.zeros(3, 9, 3, 3, 3)),
        ("decoder.head.2.weight", "found [3, 9, 3, 3, 3]", "expected [3, 16, 3, 3, 3]"),
    ),
    "VAE without an encoder": (
        VAE,
        without("encoder.conv1.weight"),
        ("encoder.conv1.weight", "expected [16, 3, 3, 3, 3]"),
    ),
    "text encoder without a norm": (TEXT, without("norm.weight"), ("tensor norm.weight", "expected [16]")),
    "text encoder of another vocabulary": (
        TEXT,
        tensor("token_embedding.weight", lambda: torch.zeros(999, 16)),
        ("token_embedding.weight", "found [999, 16]", "expected [1000, 16]"),
    ),
    "text encoder gone": (TEXT, Path.unlink, ("text encoder not found", TEXT)),
    "LoRA of another rank": (
        LORA,
        halved_rank,
        (LORA_A, "found [2, 24]", "expected [4, 24]", "model.lora.rank (now 4)"),
    ),
    "LoRA with a half": (LORA, without(LORA_A), (LORA_A, "expected [4, 24]")),
    "LoRA with NaN": (LORA, tensor(LORA_A, lambda: torch.full((4, 24), torch.nan)), (LORA_A, "found NaN")),
    "LoRA gone": (LORA, Path.unlink, ("LoRA not found", LORA)),
    "safetensors empty": (SINGLE, content(b""), ("found an empty file", "expected a safetensors file")),
    "safetensors truncated": (SINGLE, cut(0.6), ("not a readable safetensors file", "truncated")),
    "safetensors without end of header": (SINGLE, content((2**62).to_bytes(8, "little") + b"{}"), ("not a readable",)),
    "safetensors beyond its end": (SINGLE, long_offsets, ("not a readable safetensors file",)),
    "a torch file by a safetensors name": (
        SINGLE,
        lambda p: torch.save({"a": torch.zeros(1)}, p),
        ("found a zip file", "expected a safetensors file"),
    ),
    "safetensors of integers": (
        SINGLE,
        safetensor(QUERY, lambda: torch.ones(24, 24, dtype=torch.int64)),
        (QUERY, "found I64"),
    ),
    "safetensors of another shape": (
        SINGLE,
        safetensor(QUERY, lambda: torch.zeros(12, 24)),
        (QUERY, "found [12, 24]", "expected [24, 24]"),
    ),
    "index that is no JSON": (INDEX, content(b"{"), ("not a readable index",)),
    "index nested without end": (INDEX, content(b"[" * 100_000), ("not a readable index", "recursion")),
    "index without a map": (INDEX, content(b"[]"), ("found no weight_map",)),
    "index to a shard that is gone": (INDEX, shard("gone.safetensors"), ("shard gone.safetensors is missing",)),
    "index out of the folder": (INDEX, shard("../up.safetensors"), ("../up.safetensors", "expected a plain file name")),
    "index to the root": (INDEX, shard("/etc/passwd"), ("/etc/passwd", "expected a plain file name")),
    "index to the folder above": (INDEX, shard(".."), ("shard .. is missing",)),
    "index to a name with a line break": (INDEX, shard("a\nb"), (r"shard a\nb is missing",)),
    "index to a name with a NUL": (INDEX, shard("a\0b"), (r"a\x00b", "expected a plain file name")),
    "index to a tensor that is gone": (
        INDEX,
        another_tensor_in_index,
        ("tensor blocks.9.more", "found nothing of that name", "index.json"),
    ),
    "index to what is no shard": (INDEX, shard("Wan2.1_VAE.pth"), ("Wan2.1_VAE.pth", "found a zip file")),
    "tokenizer cut": (f"{TOKENIZER}/tokenizer.json", cut(0.5), ("tokenizer.json", "not a readable tokenizer")),
    "tokenizer of another kind": (f"{TOKENIZER}/tokenizer.json", content(b'{"version": "1.0"}'), ("not a readable",)),
    "tokenizer without an end": (f"{TOKENIZER}/tokenizer.json", tokenizer_without_end, ("expected UMT5's tokenizer",)),
    "tokenizer gone": (f"{TOKENIZER}/tokenizer.json", Path.unlink, ("found no tokenizer.json",)),
}


def prepare(files: Path, where: str) -> None:
    """Leaves the transformer in the form that is to be damaged; an index is written by its damage."""
    if where == SINGLE:
        only(files, SINGLE)
    if where == INDEX:
        (files / BASE).unlink()


def candidates(where: str) -> dict[str, object]:
    """Changes of the configuration that read an index although the file it could name lies there too."""
    files = tiny_model().files
    return {"files": files.model_copy(update={"transformer": (INDEX,)})} if where == INDEX else {}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_is_one_clear_line(name: str, files: Path) -> None:
    """It names the file and, where there is one, the tensor, what was found and what was expected; nothing runs."""
    where, damage, says = DAMAGES[name]
    prepare(files, where)
    damage(files / where)
    with pytest.raises(CheckpointError) as caught:
        load_all(files, **candidates(where))
    line = str(caught.value)
    assert line.startswith(str(files))
    assert line.isprintable()
    assert len(line) < len(str(files)) + 500
    assert all(text in line for text in says), line
    assert not list(files.rglob(MARK))


def test_the_undamaged_files_load(files: Path) -> None:
    """What the table damages is good before."""
    load_all(files)


def test_a_value_beyond_the_models_dtype_is_named(files: Path) -> None:
    """70000 is a float32, but as float16 it is infinity: every frame would be black."""
    changed(files / BASE, lambda tensors: tensors[PREFIXED].fill_(70000.0))
    load_all(files)
    for lora in (None, LoraConfig(rank=4, alpha=4)):
        with pytest.raises(CheckpointError, match=r"found NaN or infinity as float16") as caught:
            load_all(files, dtype="float16", lora=lora)
        assert QUERY in str(caught.value)


def test_a_folder_of_no_model_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="no such directory") as caught:
            load_all(path)
        assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match=r"transformer not found, expected one of .*longlive_base\.pt"):
        load_all(tmp_path)


LOADERS: dict[str, Callable[[ModelConfig], object]] = {
    BASE: lambda model: load_transformer(model, CPU),
    LORA: lambda model: load_transformer(model, CPU),
    SINGLE: lambda model: load_transformer(model, CPU),
    INDEX: lambda model: load_transformer(model, CPU),
    VAE: lambda model: load_vae_decoder(model, CPU),
    TEXT: lambda model: load_text_encoder(model, CPU),
    f"{TOKENIZER}/tokenizer.json": load_tokenizer,
}


@pytest.mark.parametrize("where", LOADERS)
def test_any_byte_may_be_wrong(files: Path, where: str) -> None:
    """Loads all the same, or is one line: never another error, never a crash."""
    if where == INDEX:
        shard(Path(SINGLE).name)(files / INDEX)
    prepare(files, where)
    model = tiny_model(path=files, random_weights=False, lora=LoraConfig(rank=4, alpha=4))
    model = model.model_copy(update=candidates(where))
    good = (files / where).read_bytes()
    source = random.Random(where)
    for _ in range(40):
        data = bytearray(good)
        for _ in range(source.choice((1, 8))):
            places = (source.randrange(len(data)), source.randrange(min(9000, len(data))), -1 - source.randrange(900))
            data[source.choice(places)] = source.randrange(256)
        (files / where).unlink()  # what is mapped keeps its bytes
        (files / where).write_bytes(data)
        try:
            LOADERS[where](model)
        except CheckpointError as error:
            assert str(error).isprintable()
