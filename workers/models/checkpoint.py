"""From files to models: finds them, checks every tensor by name and shape, and puts each straight where it belongs.

The files are those of Wan2.1-T2V-1.3B and LongLive-1.3B, by their own names. A model is built without memory first
(meta device), then given one tensor at a time, so that no second full copy ever exists. Transformers is imported only
where text is read. Knows no process.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig, VaeConfig
from ipc.errors import CheckpointError, ConfigError
from workers.models.causal_conv import ConvKind
from workers.models.random_weights import fill
from workers.models.tensor_file import TensorFile, open_tensors
from workers.models.transformer import CausalWanTransformer
from workers.models.vae import VaeDecoder
from workers.models.vae_encoder import VaeEncoder

if TYPE_CHECKING:
    from workers.models.prompt_text import Tokenizer
    from workers.models.umt5 import TextEncoder

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
Part = TypeVar("Part", VaeDecoder, VaeEncoder)
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
Shapes = dict[str, tuple[int, ...]]
HINT = "is this the right file for model.path, and do the widths in the configuration fit it?"


def load_transformer(model: ModelConfig, device: torch.device) -> CausalWanTransformer:
    """The denoising transformer with its LoRA merged, in `model.dtype`. Raises CheckpointError, ConfigError."""
    transformer = _on_meta(lambda: CausalWanTransformer(model.transformer))
    dtype = getattr(torch, model.dtype)
    if model.path is None:
        return _random(transformer, model, device, dtype)
    path = find(model.path, model.files.transformer, "transformer")
    roots = (model.generator,) if path.suffix in (".pt", ".pth") else ()
    file = Renamed(open_tensors(path, roots), _without_wrappers)
    check(file, shapes_of(transformer))
    _give(transformer, file, device, dtype)
    if model.lora is not None:
        _merge(model, transformer)
    return _ready(transformer)


def load_vae_decoder(model: ModelConfig, device: torch.device, conv: ConvKind = "stacked") -> VaeDecoder:
    """The VAE's decoder in `model.vae_dtype`. Raises CheckpointError, ConfigError."""
    decoder = _on_meta(lambda: VaeDecoder(model.vae, conv))
    return _vae_part(decoder, model, device).prepare()


def load_vae_encoder(model: ModelConfig, device: torch.device, conv: ConvKind = "stacked") -> VaeEncoder:
    """The VAE's encoder in `model.vae_dtype`. Raises CheckpointError, ConfigError."""
    encoder = _on_meta(lambda: VaeEncoder(model.vae, conv))
    return _vae_part(encoder, model, device).prepare()


def load_text_encoder(model: ModelConfig, device: torch.device) -> "TextEncoder":
    """UMT5 in `model.text_dtype`. Raises CheckpointError, ConfigError."""
    from workers.models.umt5 import TextEncoder, translation

    encoder = _on_meta(lambda: TextEncoder(model.text_encoder))
    dtype = getattr(torch, model.text_dtype)
    if model.path is None:
        return _random(encoder, model, device, dtype)
    file = open_tensors(find(model.path, model.files.text_encoder, "text encoder"))
    check(file, text_encoder_shapes(encoder))
    names = translation(model.text_encoder.num_layers)
    for ours, theirs in names.items():
        _set(encoder.model, theirs, file.read(ours).to(device, dtype, copy=True))
    return _ready(encoder)


def load_tokenizer(model: ModelConfig) -> "Tokenizer":
    """The tokenizer beside the weights; without weights the embedded model's. Raises CheckpointError."""
    from workers.models.prompt_text import Tokenizer, pocket_tokenizer

    if model.path is None:
        return pocket_tokenizer()
    return Tokenizer(find(model.path, model.files.tokenizer, "tokenizer"))


def find(root: Path, candidates: Iterable[str], what: str) -> Path:
    """The first candidate below a folder that exists. Raises CheckpointError naming them all."""
    names = list(candidates)
    if not root.is_dir():
        raise CheckpointError(f"model.path {root}: no such directory; expected the folder with the weights")
    for name in names:
        if (root / name).exists():
            return root / name
    raise CheckpointError(f"model.path {root}: {what} not found, expected one of {', '.join(names)}")


def shapes_of(module: nn.Module) -> Shapes:
    """Names and shapes of a module's tensors, which are those of its file."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def text_encoder_shapes(encoder: "TextEncoder") -> Shapes:
    """Names and shapes of the text encoder's file."""
    from workers.models.umt5 import translation

    parameters = dict(encoder.model.named_parameters())
    return {ours: tuple(parameters[theirs].shape) for ours, theirs in translation(encoder.config.num_layers).items()}


def vae_shapes(config: VaeConfig) -> Shapes:
    """Names and shapes of the VAE's file, which holds encoder and decoder."""
    return _on_meta(lambda: shapes_of(VaeEncoder(config)) | shapes_of(VaeDecoder(config)))


def check(file: TensorFile, expected: Mapping[str, tuple[int, ...]], hint: str = HINT) -> None:
    """Raises CheckpointError unless a file holds exactly the expected tensors, in a floating dtype."""
    for name, shape in expected.items():
        if name not in file.shapes:
            raise CheckpointError(
                f"{file.path}: tensor {name}: found nothing of that name, expected {list(shape)}; {hint}"
            )
        found, dtype = file.shapes[name]
        if tuple(found) != tuple(shape):
            raise CheckpointError(f"{file.path}: tensor {name}: found {list(found)}, expected {list(shape)}; {hint}")
        if dtype not in FLOATING:
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{file.path}: tensor {name}: found {kind}, expected float32, bfloat16 or float16; {hint}"
            )
    unknown = next((name for name in file.shapes if name not in expected), None)
    if unknown is not None:
        shape = list(file.shapes[unknown][0])
        raise CheckpointError(
            f"{file.path}: tensor {unknown}: found {shape}, expected no such tensor ({len(expected)} are known); {hint}"
        )


class Renamed:
    """A file whose tensors go by other names.

    Raises:
        CheckpointError: two tensors get the same name.
    """

    def __init__(self, file: TensorFile, rename: Callable[[str], str]) -> None:
        self.path = file.path
        self._file = file
        self._names: dict[str, str] = {}
        for name in file.shapes:
            new = rename(name)
            if new in self._names:
                raise CheckpointError(f"{file.path}: tensor {name}: found twice, as {self._names[new]} too")
            self._names[new] = name
        self.shapes = {new: file.shapes[name] for new, name in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._file.read(self._names[name])


def _without_wrappers(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("model.")


def _merge(model: ModelConfig, transformer: CausalWanTransformer) -> None:
    from workers.models.lora import lora_shapes, merge_lora

    assert model.path is not None and model.lora is not None
    file = open_tensors(find(model.path, model.files.lora, "LoRA"), ("generator_lora",))
    check(file, lora_shapes(transformer, model.lora.rank), f"is model.lora.rank {model.lora.rank} the file's?")
    merge_lora(transformer, model.lora, {name: file.read(name) for name in file.shapes})


def _vae_part(part: Part, model: ModelConfig, device: torch.device) -> Part:
    dtype = getattr(torch, model.vae_dtype)
    if model.path is None:
        return _random(part, model, device, dtype)
    file = open_tensors(find(model.path, model.files.vae, "VAE"))
    check(file, vae_shapes(model.vae))
    _give(part, file, device, dtype)
    return _ready(part)


def _on_meta(build: Callable[[], T]) -> T:
    with torch.device("meta"):
        return build()


def _give(module: nn.Module, file: TensorFile, device: torch.device, dtype: torch.dtype) -> None:
    for name in shapes_of(module):
        _set(module, name, file.read(name).to(device, dtype, copy=True))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _ready(module: Module) -> Module:
    return module.eval().requires_grad_(False)


def _random(module: Module, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Module:
    if not model.random_weights:
        raise ConfigError("model.path: found nothing, expected the folder with the weights; set model.path=DIR")
    fill(module, model.random_weights_seed, device, dtype)
    return _ready(module)
