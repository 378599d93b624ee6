"""TAEHV: the published layout over a whole clip at once is the oracle of the stream."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative_error
from safetensors.torch import save_file
from torch import Tensor

from configs.load import load_config
from configs.schema import ModelConfig, RuntimeConfig
from ipc.errors import CheckpointError
from workers.models.audit import Operations
from workers.models.checkpoint import check_files, load_tiny_vae, tiny_vae_shapes
from workers.models.execution import choose_frame_stream
from workers.models.random_weights import draw
from workers.models.tiny_vae import StaticTinyVae, TinyVae

CPU = torch.device("cpu")
HEIGHT, WIDTH = 3, 4
MEMORY = {
    "conv.0.weight": "{n}x{m}x3x3",
    "conv.0.bias": "{n}",
    "conv.2.weight": "{n}x{n}x3x3",
    "conv.2.bias": "{n}",
    "conv.4.weight": "{n}x{n}x3x3",
    "conv.4.bias": "{n}",
}
"""A memory layer's tensors, as the published files have them; m is twice n."""
PUBLISHED = {
    "encoder.0": {"weight": "64x3x3x3", "bias": "64"},
    "encoder.2": {"conv.weight": "64x128x1x1"},
    "encoder.3": {"weight": "64x64x3x3"},
    "encoder.7": {"conv.weight": "64x128x1x1"},
    "encoder.8": {"weight": "64x64x3x3"},
    "encoder.12": {"conv.weight": "64x64x1x1"},
    "encoder.13": {"weight": "64x64x3x3"},
    "encoder.17": {"weight": "16x64x3x3", "bias": "16"},
    "decoder.1": {"weight": "256x16x3x3", "bias": "256"},
    "decoder.7": {"conv.weight": "256x256x1x1"},
    "decoder.8": {"weight": "128x256x3x3"},
    "decoder.13": {"conv.weight": "256x128x1x1"},
    "decoder.14": {"weight": "64x128x3x3"},
    "decoder.19": {"conv.weight": "128x64x1x1"},
    "decoder.20": {"weight": "64x64x3x3"},
    "decoder.22": {"weight": "3x64x3x3", "bias": "3"},
}
WIDTH_AT = {"encoder": dict.fromkeys((4, 5, 6, 9, 10, 11, 14, 15, 16), 64)}
WIDTH_AT["decoder"] = {3: 256, 4: 256, 5: 256, 9: 128, 10: 128, 11: 128, 15: 64, 16: 64, 17: 64}


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of taew2_1.pth (github.com/madebyollin/taehv, taehv.py)."""
    texts = {f"{layer}.{name}": text for layer, tensors in PUBLISHED.items() for name, text in tensors.items()}
    for half, widths in WIDTH_AT.items():
        for layer, n in widths.items():
            texts |= {f"{half}.{layer}.{name}": text.format(n=n, m=2 * n) for name, text in MEMORY.items()}
    return {name: tuple(int(side) for side in text.split("x")) for name, text in texts.items()}


def tensors() -> dict[str, Tensor]:
    """A file's contents, drawn; biases large enough that one left out would show."""
    made = {name: draw(name, torch.Size(shape), 0) for name, shape in published().items()}
    return {name: 10 * tensor if tensor.ndim == 1 else tensor for name, tensor in made.items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tensors()


def write(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "taew2_1.pth")
    return folder


def model(**changes: object) -> ModelConfig:
    base = load_config("longlive-1.3b").model
    return base.model_copy(update={"decoder": "tiny", "vae_dtype": "float32", "lora": None, **changes})


def latents(count: int, seed: int = 0) -> Tensor:
    """Larger than latents are, so that bending them shows."""
    return 2 * torch.randn(count, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def whole_clip(weights: dict[str, Tensor], clip: Tensor) -> Tensor:
    """The published decoder on all latent frames at once: [T, 16, h, w] -> [4 T - 3, 3, 8h, 8w] in 0 to 1."""

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same")

    x = torch.relu(conv(3 * torch.tanh(clip / 3), "decoder.1"))
    for first, frames in ((3, 1), (9, 2), (15, 2)):
        for layer in range(first, first + 3):
            before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
            y = torch.relu(conv(torch.cat((x, before), 1), f"decoder.{layer}.conv.0"))
            y = torch.relu(conv(y, f"decoder.{layer}.conv.2"))
            x = torch.relu(conv(y, f"decoder.{layer}.conv.4") + x)
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv(x, f"decoder.{first + 4}.conv")
        x = x.reshape(len(x) * frames, -1, *x.shape[2:])
        x = conv(x, f"decoder.{first + 5}")
    return conv(torch.relu(x), "decoder.22").clamp(0, 1)[3:]


@torch.inference_mode()
def stream(vae: StaticTinyVae, clip: Tensor) -> list[Tensor]:
    return [vae.frames(latent, first=index == 0).clone() for index, latent in enumerate(clip)]


def loaded(weights: dict[str, Tensor]) -> TinyVae:
    vae = TinyVae().requires_grad_(False)
    vae.load_state_dict({name: tensor for name, tensor in weights.items() if name.startswith("decoder")})
    return vae.prepare()


def test_names_and_shapes_are_the_published_ones() -> None:
    assert tiny_vae_shapes() == published()
    assert len(published()) == 128


def test_stream_equals_the_whole_clip(weights: dict[str, Tensor]) -> None:
    clip = latents(5)
    expected = 2 * whole_clip(weights, clip) - 1
    assert 0.2 < expected.std() < 1.0
    made = stream(StaticTinyVae(loaded(weights), HEIGHT, WIDTH), clip)
    assert [len(frames) for frames in made] == [1, 4, 4, 4, 4]
    for frames, whole in zip(made, expected.split([1, 4, 4, 4, 4]), strict=True):
        assert relative_error(frames, whole) <= 1e-5


def test_a_first_frame_forgets_what_was(weights: dict[str, Tensor]) -> None:
    vae = StaticTinyVae(loaded(weights), HEIGHT, WIDTH)
    alone = torch.cat(stream(vae, latents(3)))
    before = [tensor.data_ptr() for tensor in vae.buffers()]
    stream(vae, latents(2, seed=1))
    assert torch.equal(torch.cat(stream(vae, latents(3))), alone)
    assert [tensor.data_ptr() for tensor in vae.buffers()] == before


def test_every_later_frame_does_the_same_and_reads_nothing(weights: dict[str, Tensor]) -> None:
    vae, done = StaticTinyVae(loaded(weights), HEIGHT, WIDTH), []
    for index, latent in enumerate(latents(4)):
        with torch.no_grad(), Operations(torch.device("cpu")) as mode:
            vae.frames(latent, first=index == 0)
        done.append(mode.names)
    assert done[1] == done[2] == done[3]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_a_file_is_read(tmp_path: Path, weights: dict[str, Tensor], stored: torch.dtype) -> None:
    vae = load_tiny_vae(model(path=write(tmp_path, weights, stored)), CPU)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, weights[name].to(stored).float())


def test_safetensors_too(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "taew2_1.safetensors")
    assert torch.equal(load_tiny_vae(model(path=tmp_path), CPU).decoder["22"].bias, weights["decoder.22.bias"])


def without(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in weights.items() if other != name}


def test_other_files_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Those of other models have other shapes; every line names file and tensor."""
    write(tmp_path, weights | {"decoder.22.weight": torch.zeros(12, 64, 3, 3)})
    with pytest.raises(CheckpointError, match=r"taew2_1\.pth: tensor decoder\.22\.weight: found \[12, 64, 3, 3\]"):
        load_tiny_vae(model(path=tmp_path), CPU)
    write(tmp_path, without("encoder.12.conv.weight", weights))
    with pytest.raises(CheckpointError, match=r"tensor encoder\.12\.conv\.weight: found nothing of that name"):
        load_tiny_vae(model(path=tmp_path), CPU)


@pytest.mark.parametrize("look", [lambda model: load_tiny_vae(model, CPU), check_files])
def test_a_missing_file_is_one_line(tmp_path: Path, look) -> None:
    for candidates in (model().files.transformer, model().files.text_encoder):
        (tmp_path / candidates[-1]).touch()
    with pytest.raises(CheckpointError, match=r"tiny VAE not found, expected one of taew2_1\.pth, ") as caught:
        look(model(path=tmp_path))
    assert "\n" not in str(caught.value)


def tiny_run() -> RuntimeConfig:
    changes = ["model.path=null", "model.random_weights=true", "model.decoder=tiny"]
    return load_config("pocket", [*changes, "video.height=32", "video.width=48"])


def test_it_stands_in_for_the_full_decoder() -> None:
    """In the same stage, drawn like the others, without the other's file."""
    frames = choose_frame_stream(tiny_run(), CPU)
    frames.record_all()
    made = [frames.decode(latent).clone() for latent in torch.randn(3, 16, 4, 6)]
    assert [tuple(each.shape) for each in made] == [(1, 32, 48, 3), (4, 32, 48, 3), (4, 32, 48, 3)]
    assert all(each.dtype == torch.uint8 and each.float().std() > 5 for each in made)
