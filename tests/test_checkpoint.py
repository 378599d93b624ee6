"""Weights files: every published form loads to the same weights, held once, and files that are missing are named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_files import (
    BASE,
    CPU,
    INDEX,
    LORA,
    RANDOM,
    SCRIPT,
    SINGLE,
    TEXT,
    TINY,
    TOKENIZER,
    VAE,
    equal,
    only,
    tiny_model,
    weights,
    write,
)

from configs.load import load_config
from configs.schema import LoraConfig, RuntimeConfig
from ipc.errors import CheckpointError, ConfigError
from workers.models import random_weights
from workers.models.checkpoint import (
    check_files,
    load_text_encoder,
    load_tiny_vae,
    load_tokenizer,
    load_transformer,
    load_vae_decoder,
    load_vae_encoder,
    vae_dtype,
)
from workers.models.denoise import Rollout
from workers.models.noise import DrawnNoise


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set of good files, not to be changed."""
    return write(tmp_path_factory.mktemp("published"))


def test_every_published_form_gives_the_same_weights(files: Path, tmp_path: Path) -> None:
    """generator, generator_ema with its wrappers, bare, safetensors whole and sharded."""
    expected = weights(tiny_model(path=files))
    assert equal(weights(tiny_model(path=files, generator="generator_ema")), expected)
    assert equal(weights(tiny_model(path=write(tmp_path / "bare", bare=True))), expected)
    single = only(shutil.copytree(files, tmp_path / "single"), SINGLE)
    assert equal(weights(tiny_model(path=single)), expected)
    shards = only(write(tmp_path / "shards", sharded=True), INDEX)
    assert equal(weights(tiny_model(path=shards)), expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_other_floating_dtypes_are_cast(tmp_path: Path, stored: torch.dtype) -> None:
    model = tiny_model(path=write(tmp_path, dtype=stored))
    held = torch.load(tmp_path / BASE, weights_only=True)["generator"]
    for name, tensor in weights(model).items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, held[f"model.{name}"].float())
    assert load_vae_decoder(model, CPU).conv2.weight.dtype is torch.float32
    assert next(load_text_encoder(model, CPU).parameters()).dtype is torch.float32


def test_each_network_has_its_own_dtype(files: Path) -> None:
    model = tiny_model(path=files, dtype="float16", vae_dtype="float32", text_dtype="bfloat16")
    networks = load_transformer(model, CPU), load_vae_encoder(model, CPU), load_text_encoder(model, CPU)
    dtypes = [{p.dtype for p in network.parameters()} for network in networks]
    assert dtypes == [{torch.float16}, {torch.float32}, {torch.bfloat16}]
    assert not any(p.requires_grad or network.training for network in networks for p in network.parameters())


def test_all_parts_load_and_run(files: Path) -> None:
    model = tiny_model(path=files)
    decoder = load_vae_decoder(model, CPU)
    pixels = decoder.decode(torch.zeros(1, 16, 4, 4), decoder.new_cache())
    assert pixels.shape == (1, 1, 3, 32, 32)
    assert load_vae_encoder(model, CPU).encode(torch.zeros(1, 5, 3, 32, 32)).shape == (1, 2, 16, 4, 4)
    ids = load_tokenizer(model).ids("a red circle")
    assert load_text_encoder(model, CPU).encode(torch.tensor(ids)).shape == (len(ids), 16)


def test_files_come_before_random_weights(tmp_path: Path) -> None:
    """`--config pocket --set model.path=DIR`: the folder is read although pocket says random_weights."""
    write(tmp_path, seed=7)
    config = load_config("pocket", [*TINY, f"model.path={tmp_path}"])
    assert config.model.random_weights
    assert equal(weights(config.model), weights(tiny_model(random_weights_seed=7)))
    assert not equal(weights(config.model), weights(tiny_model()))


def test_files_hold_what_the_same_seed_draws(files: Path) -> None:
    """Under the published names of all three networks, so that files and random weights can stand for each other."""
    for load in (load_transformer, load_vae_decoder, load_vae_encoder, load_text_encoder):
        assert equal(load(tiny_model(path=files), CPU).state_dict(), load(tiny_model(), CPU).state_dict())


LOADING = """
import json, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from configs.load import load_config
from configs.schema import LoraConfig
from tiny_files import BASE, CPU, LORA, SCRIPT, SINGLE, TINY
from workers.models.checkpoint import load_transformer

def private_bytes():
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024

class Peak(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.before = self.most = private_bytes()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, private_bytes())
        return out

folder = Path(sys.argv[1])
wide = [f"model.transformer.{key}" for key in ("dim=512", "ffn_dim=2048", "num_layers=3")]
model = load_config("pocket", [*TINY, *wide]).model.model_copy(update={"path": folder})
lora = LoraConfig(rank=4, alpha=4)
SCRIPT["write"](model, folder)
load_transformer(model.model_copy(update={"lora": lora}), CPU)  # imports what loading imports
for source in (BASE, SINGLE):
    files = model.files.model_copy(update={"transformer": (source,)})
    for adapter in (None, lora):
        for dtype in ("float32", "bfloat16"):
            case = model.model_copy(update={"files": files, "lora": adapter, "dtype": dtype})
            with Peak() as peak:
                transformer = load_transformer(case, CPU)
            whole = sum(parameter.nbytes for parameter in transformer.parameters())
            layer = sum(parameter.numel() * 4 for parameter in transformer.blocks[0].parameters())
            print(json.dumps([source, adapter is not None, dtype, whole, layer, peak.most - peak.before]))
            del transformer
"""


def test_weights_are_held_once(tmp_path: Path) -> None:
    """The most that loading holds, mapped files aside, is the model and, for a LoRA, one layer in float32.

    In a process of its own whose allocator gives freed tensors back at once: else what was freed before would hide
    what is taken now.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    cases = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(cases) == 8
    for source, adapted, dtype, whole, layer, most in cases:
        assert whole > 25e6
        allowed = whole + layer * (1.25 if adapted else 0.25)
        assert most < allowed, f"{source} LoRA={adapted} {dtype}: {most / 1e6:.0f} MB, model {whole / 1e6:.0f} MB"


DIGEST = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from configs.load import load_config
from workers.models.checkpoint import load_transformer, load_vae_decoder
model = load_config("pocket", sys.argv[2:]).model
digest = hashlib.sha256()
for load in (load_transformer, load_vae_decoder):
    for name, tensor in sorted(load(model, torch.device("cpu")).state_dict().items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
print(torch.get_num_threads(), digest.hexdigest())
"""


def test_random_weights_are_the_same_in_every_process() -> None:
    """Whatever the number of threads and the order of sets: a worker that restarts goes on with the same model."""
    digests = []
    for threads in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", DIGEST, threads, *RANDOM]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        count, digest = ran.stdout.split()
        assert count == threads
        digests.append(digest)
    assert digests[0] == digests[1]


def test_random_weights_differ_by_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, other = weights(tiny_model()), weights(tiny_model(random_weights_seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_large_random_matrix_takes_few_draws_and_no_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """UMT5-XXL's 5.7 billion numbers would be minutes of one core; what is drawn fits the matrix's fan-in all the same.

    In the dtype asked for it is the rounded float32 one, as a worker on another device would have it.
    """
    drawn: list[int] = []
    randn = torch.randn

    def counted(shape: torch.Size, **more: object) -> torch.Tensor:
        drawn.append(shape.numel())
        return randn(shape, **more)

    monkeypatch.setattr(torch, "randn", counted)
    shape = torch.Size((1536, 4096))
    large = random_weights.draw("ffn.weight", shape, 0)
    assert sum(drawn) <= random_weights.DISTINCT < shape.numel() / 5
    assert large.shape == shape
    assert large.std().item() == pytest.approx(4096**-0.5, rel=0.01)
    assert len(torch.unique(large, dim=0)) == 1536
    assert torch.equal(random_weights.draw("ffn.weight", shape, 0, CPU, torch.bfloat16), large.bfloat16())
    assert not torch.equal(random_weights.draw("ffn.weight", shape, 1), large)
    assert not torch.equal(random_weights.draw("other.weight", shape, 0), large)
    assert random_weights.draw("text_embedding.2.weight", shape, 0).std() > 17 * large.std()


def test_the_text_encoder_with_random_weights_is_held_once_in_its_dtype() -> None:
    """The token embeddings too, which are by far the largest: one tensor, bfloat16, where the encoder is."""
    encoder = load_text_encoder(tiny_model(text_dtype="bfloat16"), CPU)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert {parameter.device for parameter in encoder.parameters()} == {CPU}
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


@torch.inference_mode()
def test_random_weights_make_a_picture_and_prompts_change_it() -> None:
    """Pocket shows something without trained weights: contrast, motion, and another picture for another prompt."""
    config = load_config("pocket", ["video.height=64", "video.width=96", "model.vae.base_dim=8", *RANDOM])
    red, blue = (picture(config, prompt) for prompt in ("a red circle moving right", "a blue square"))
    assert red.isfinite().all()
    assert red.std() > 0.25
    assert (red[1:] - red[:-1]).abs().mean() > 0.05
    assert (red - blue).abs().mean() > 0.15


def picture(config: RuntimeConfig, prompt: str) -> torch.Tensor:
    """Two blocks' frames as they are shown, [F, 3, H, W] in -1 to 1."""
    model = config.model
    ids = load_tokenizer(model).ids(prompt)
    rollout = Rollout(load_transformer(model, CPU), config.stream, config.video)
    rollout.switch(load_text_encoder(model, CPU).encode(torch.tensor(ids))[None])
    noise = DrawnNoise(0, rollout.shape)
    latents = torch.cat([rollout.denoise_block(noise) for _ in range(2)], 1)
    decoder = load_vae_decoder(model, CPU)
    cache = decoder.new_cache()
    frames = [decoder.decode(latent, cache)[0].float() for latent in latents.unbind(1)]
    return torch.cat(frames).clamp(-1, 1)


def test_no_path_and_no_random_weights_is_said() -> None:
    model = tiny_model(random_weights=False)
    for load in (load_transformer, load_vae_decoder, load_vae_encoder, load_text_encoder):
        with pytest.raises(ConfigError, match=r"^model\.path: .*set model\.path=DIR$"):
            load(model, CPU)
    with pytest.raises(ConfigError, match=r"model\.path"):
        check_files(model)


@pytest.mark.parametrize("gone", [BASE, LORA, VAE, TEXT, TOKENIZER])
def test_check_files_names_what_is_missing(files: Path, tmp_path: Path, gone: str) -> None:
    folder = only(shutil.copytree(files, tmp_path / "model"), BASE)
    model = tiny_model(path=folder, lora=LoraConfig(rank=4, alpha=4), random_weights=False)
    check_files(model)
    (folder / gone).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=re.escape(gone)) as caught:
        check_files(model)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_files_looks_for_no_lora_without_one(files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(files, tmp_path / "model")
    (folder / LORA).unlink()
    check_files(tiny_model(path=folder))
    check_files(tiny_model())


def test_pocket_needs_no_tokenizer_beside_its_files(files: Path, tmp_path: Path) -> None:
    """The embedded one is its own; any other model must bring one."""
    folder = shutil.copytree(files, tmp_path / "model")
    shutil.rmtree(folder / TOKENIZER)
    assert load_tokenizer(tiny_model(path=folder)).ids("a red star") == load_tokenizer(tiny_model()).ids("a red star")
    with pytest.raises(CheckpointError, match="tokenizer not found"):
        load_tokenizer(tiny_model(path=folder, random_weights=False))


def test_a_tokenizer_beyond_the_vocabulary_is_refused(files: Path) -> None:
    """On a GPU an id without an embedding would end the process with a device assertion."""
    config = tiny_model().text_encoder.model_copy(update={"vocab_size": 100})
    with pytest.raises(CheckpointError, match=r"found \d+ tokens, expected at most 100"):
        load_tokenizer(tiny_model(path=files, text_encoder=config))


def test_the_written_configuration_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scripts/write_checkpoint.py`, then `--config DIR/config.yaml`: all its files, the LoRA merged."""
    monkeypatch.setattr(sys, "argv", ["write_checkpoint.py", "--out", str(tmp_path / "model"), "--rank", "2"])
    SCRIPT["main"]()
    model = load_config(str(tmp_path / "model" / "config.yaml")).model
    check_files(model)
    assert model.lora == LoraConfig(rank=2, alpha=2)
    with_lora, without = weights(model), weights(model.model_copy(update={"lora": None}))
    assert with_lora.keys() == without.keys()
    assert not equal(with_lora, without)


def test_the_tiny_vae_is_written_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["write_checkpoint.py", "--out", str(tmp_path), "--tiny"])
    SCRIPT["main"]()
    model = load_config(str(tmp_path / "config.yaml")).model
    assert model.decoder == "tiny"
    check_files(model)
    drawn = model.model_copy(update={"path": None, "random_weights": True})
    assert equal(load_tiny_vae(model, CPU).state_dict(), load_tiny_vae(drawn, CPU).state_dict())


def test_the_vae_computes_in_bfloat16_where_that_is_not_emulated() -> None:
    """As torch names a CPU's capability; on a GPU always."""
    auto, named = tiny_model(vae_dtype="auto"), tiny_model(vae_dtype="float16")
    assert vae_dtype(auto, torch.device("cuda")) == torch.bfloat16
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("DEFAULT", "AVX2"):
        assert vae_dtype(auto, CPU) == torch.float32
    elif capability.startswith("AVX512"):
        assert vae_dtype(auto, CPU) == torch.bfloat16
    assert vae_dtype(named, CPU) == torch.float16
    assert load_vae_decoder(tiny_model(vae_dtype="auto"), CPU).conv2.weight.dtype == vae_dtype(auto, CPU)
