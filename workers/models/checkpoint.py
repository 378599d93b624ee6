"""From files to models: finds them, checks every tensor by name and shape, and puts each straight where it belongs.

The files are those of Wan2.1-T2V-1.3B and LongLive-1.3B, by their own names. A model is built without memory first
(meta device), then given one tensor at a time, so that no second full copy ever exists. Transformers and PEFT are
imported only where they are needed. Knows no process.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from configs.schema import LoraConfig, ModelConfig, VaeConfig
from ipc.errors import ConfigError
from workers.models.causal_conv import ConvKind
from workers.models.random_weights import DrawnTensors
from workers.models.tensor_file import TensorFile, damaged, open_tensors, shown
from workers.models.tiny_vae import TinyVae, tiny_encoder_shapes
from workers.models.transformer import CausalWanTransformer, Layer
from workers.models.vae import VaeDecoder
from workers.models.vae_encoder import VaeEncoder

if TYPE_CHECKING:
    from workers.models.prompt_text import Tokenizer
    from workers.models.umt5 import TextEncoder

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
Part = TypeVar("Part", VaeDecoder, VaeEncoder)
FLOATING = ("float32", "bfloat16", "float16")
Shapes = Mapping[str, tuple[int, ...]]
HINT = "is this the right file for model.path, and do the widths in the configuration fit it?"


def load_transformer(model: ModelConfig, device: torch.device) -> CausalWanTransformer:
    """The denoising transformer with its LoRA merged, in `model.dtype`. Raises CheckpointError, ConfigError."""
    transformer = _on_meta(lambda: CausalWanTransformer(model.transformer))
    expected = shapes_of(transformer)
    dtype = getattr(torch, model.dtype)
    file = _drawn(model, expected) if model.path is None else _transformer_file(model, model.path, expected)
    if model.path is None or model.lora is None:
        _give(transformer, file, expected, device, dtype)
    else:
        adapter = _lora_file(model.lora, model.files.lora, model.path, transformer)
        _give(transformer, file, [name for name in expected if not name.startswith("blocks.")], device, dtype)
        for index, layer in enumerate(transformer.blocks):
            prefix = f"blocks.{index}."
            _give_merged(layer, prefix, file, adapter, model.lora, device)
            for name, merged in layer.state_dict().items():
                _set(layer, name, _finite(merged.to(dtype), adapter, prefix + name))
    return _ready(transformer)


def load_adapter(model: ModelConfig, transformer: CausalWanTransformer) -> list[dict[str, Tensor]]:
    """The LoRA of each layer, by PEFT's names without what stands before the layer's, in float32 where that layer lies.

    Raises:
        CheckpointError: the file is not that of this transformer.
        ConfigError: `model` names no LoRA.
    """
    if model.lora is None or model.path is None:
        raise ConfigError("model.lora: found nothing, expected rank and alpha of a LoRA in model.path")
    adapter = _lora_file(model.lora, model.files.lora, model.path, transformer)
    layers = range(len(transformer.blocks))
    return [_layer_adapter(adapter, f"blocks.{index}.", transformer.device) for index in layers]


def load_vae_decoder(model: ModelConfig, device: torch.device, conv: ConvKind = "stacked") -> VaeDecoder:
    """The VAE's decoder in `model.vae_dtype`. Raises CheckpointError, ConfigError."""
    return _vae_part(_on_meta(lambda: VaeDecoder(model.vae, conv)), model, device).prepare()


def load_vae_encoder(model: ModelConfig, device: torch.device, conv: ConvKind = "stacked") -> VaeEncoder:
    """The VAE's encoder in `model.vae_dtype`. Raises CheckpointError, ConfigError."""
    return _vae_part(_on_meta(lambda: VaeEncoder(model.vae, conv)), model, device).prepare()


def load_tiny_vae(model: ModelConfig, device: torch.device) -> TinyVae:
    """TAEHV's decoder in `model.vae_dtype`. Raises CheckpointError, ConfigError."""
    vae = _on_meta(TinyVae)
    file = _file(model, "tiny VAE", model.files.tiny_vae, tiny_vae_shapes())
    _give(vae, file, shapes_of(vae), device, vae_dtype(model, device))
    return _ready(vae).prepare()


def vae_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """`model.vae_dtype` on a device. Where a CPU only emulates bfloat16, convolutions take some ten times as long."""
    if model.vae_dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.vae_dtype)
        return dtype
    emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


def load_text_encoder(model: ModelConfig, device: torch.device) -> "TextEncoder":
    """UMT5 in `model.text_dtype`, its table of tokens in host memory. Raises CheckpointError, ConfigError."""
    from workers.models.umt5 import TextEncoder, translation

    encoder = _on_meta(lambda: TextEncoder(model.text_encoder))
    file = _file(model, "text encoder", model.files.text_encoder, text_encoder_shapes(encoder))
    dtype = getattr(torch, model.text_dtype)
    for ours, theirs in translation(model.text_encoder.num_layers).items():
        place = torch.device("cpu") if theirs == "shared.weight" else device
        _set(encoder.model, theirs, _placed(file, ours, place, dtype))
    return _ready(encoder)


def load_tokenizer(model: ModelConfig) -> "Tokenizer":
    """The tokenizer beside the weights; the embedded model's for random weights without one. Raises CheckpointError."""
    from workers.models.prompt_text import POCKET_TOKENIZER, Tokenizer

    path = _tokenizer_folder(model) or POCKET_TOKENIZER
    tokenizer = Tokenizer(path)
    known = model.text_encoder.vocab_size
    if tokenizer.size > known:
        raise damaged(
            path, f"found {tokenizer.size} tokens, expected at most {known}, model.text_encoder.vocab_size; {HINT}"
        )
    return tokenizer


def check_files(model: ModelConfig) -> None:
    """Looks whether all files are there, without opening any. Raises CheckpointError, ConfigError."""
    if model.path is None:
        _drawn(model, {})
        return
    find(model.path, model.files.transformer, "transformer")
    if model.lora is not None:
        find(model.path, model.files.lora, "LoRA")
    if model.decoder == "full":
        find(model.path, model.files.vae, "VAE")
    else:
        find(model.path, model.files.tiny_vae, "tiny VAE")
    find(model.path, model.files.text_encoder, "text encoder")
    _tokenizer_folder(model)


def find(root: Path, candidates: Iterable[str], what: str) -> Path:
    """The first candidate below a folder that exists. Raises CheckpointError naming them all."""
    names = list(candidates)
    if not root.is_dir():
        raise damaged(root, "found no such directory, expected the folder with the weights; set model.path")
    found = _existing(root, names)
    if found is None:
        raise damaged(root, f"{what} not found, expected one of {', '.join(names)}; set model.path or model.files")
    return found


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors, which are those of its file."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def text_encoder_shapes(encoder: "TextEncoder") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the text encoder's file."""
    from workers.models.umt5 import translation

    parameters = dict(encoder.model.named_parameters())
    return {ours: tuple(parameters[theirs].shape) for ours, theirs in translation(encoder.config.num_layers).items()}


def vae_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the VAE's file, which holds encoder and decoder."""
    return _on_meta(lambda: shapes_of(VaeEncoder(config)) | shapes_of(VaeDecoder(config)))


def tiny_vae_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of taew2_1.pth, which holds encoder and decoder."""
    return tiny_encoder_shapes() | shapes_of(_on_meta(TinyVae))


def check(file: TensorFile, expected: Shapes, hint: str = HINT) -> None:
    """Raises CheckpointError unless a file holds exactly the expected tensors, in a floating dtype."""
    unknown = next((name for name in file.shapes if name not in expected), None)
    for name, shape in expected.items():
        if name not in file.shapes:
            instead = "nothing of that name" if unknown is None else f"{shown(unknown)} instead"
            raise damaged(file.path, f"tensor {name}: found {instead}, expected {list(shape)}; {hint}")
        found, dtype = file.shapes[name]
        if found != shape:
            raise damaged(file.path, f"tensor {name}: found {list(found)}, expected {list(shape)}; {hint}")
        if dtype not in FLOATING:
            raise damaged(file.path, f"tensor {name}: found {dtype}, expected one of {', '.join(FLOATING)}; {hint}")
    if unknown is not None:
        found = list(file.shapes[unknown][0])
        raise damaged(
            file.path, f"tensor {shown(unknown)}: found {found}, expected none but {len(expected)} others; {hint}"
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
                twice = f"found it twice, as {shown(self._names[new])} too, expected it once"
                raise damaged(file.path, f"tensor {shown(name)}: {twice}; {HINT}")
            self._names[new] = name
        self.shapes = {new: file.shapes[name] for new, name in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._file.read(self._names[name])


def _without_wrappers(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("model.")


def _file(model: ModelConfig, what: str, candidates: Iterable[str], expected: Shapes) -> TensorFile:
    """A network's file, checked; drawn tensors for a model without files."""
    if model.path is None:
        return _drawn(model, expected)
    file = open_tensors(find(model.path, candidates, what))
    check(file, expected)
    return file


def _transformer_file(model: ModelConfig, root: Path, expected: Shapes) -> TensorFile:
    path = find(root, model.files.transformer, "transformer")
    file = Renamed(open_tensors(path, (model.generator,)), _without_wrappers)
    check(file, expected)
    return file


def _lora_file(
    lora: LoraConfig, candidates: Iterable[str], root: Path, transformer: CausalWanTransformer
) -> TensorFile:
    from workers.models.lora import lora_shapes

    file = open_tensors(find(root, candidates, "LoRA"), ("generator_lora",))
    hint = f"set model.lora.rank (now {lora.rank}) and model.lora.alpha to what it was trained with"
    check(file, lora_shapes(transformer, lora.rank), hint)
    return file


def _drawn(model: ModelConfig, expected: Shapes) -> DrawnTensors:
    if not model.random_weights:
        raise ConfigError("model.path: found nothing, expected the folder with the weights; set model.path=DIR")
    return DrawnTensors(expected, model.random_weights_seed)


def _tokenizer_folder(model: ModelConfig) -> Path | None:
    """Of the model's files; None for a model of random weights without one, for which the embedded one's is made."""
    if model.path is None:
        return None
    if model.random_weights and _existing(model.path, model.files.tokenizer) is None:
        return None
    return find(model.path, model.files.tokenizer, "tokenizer")


def _existing(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def _vae_part(part: Part, model: ModelConfig, device: torch.device) -> Part:
    file = _file(model, "VAE", model.files.vae, vae_shapes(model.vae))
    _give(part, file, shapes_of(part), device, vae_dtype(model, device))
    return _ready(part)


def _on_meta(build: Callable[[], T]) -> T:
    with torch.device("meta"):
        return build()


def _give(module: nn.Module, file: TensorFile, names: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    for name in names:
        _set(module, name, _placed(file, name, device, dtype))


def _give_merged(
    layer: Layer, prefix: str, file: TensorFile, adapter: TensorFile, lora: LoraConfig, device: torch.device
) -> None:
    """A layer's weights and their LoRA's update, summed in float32."""
    from workers.models.lora import merge_lora

    for name in shapes_of(layer):
        _set(layer, name, _placed(file, prefix + name, device, torch.float32))
    merge_lora(layer, lora, _layer_adapter(adapter, prefix, device))


def _layer_adapter(adapter: TensorFile, prefix: str, device: torch.device) -> dict[str, Tensor]:
    from workers.models.lora import PREFIX

    stem = PREFIX + prefix
    own = [name for name in adapter.shapes if name.startswith(stem)]
    return {n.removeprefix(stem): _placed(adapter, n, device, torch.float32) for n in own}


def _placed(file: TensorFile, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of a file where it shall be. Raises CheckpointError if it is not finite there."""
    if isinstance(file, DrawnTensors):
        return _finite(file.place(name, device, dtype), file, name)
    return _finite(file.read(name).to(device, dtype, copy=True), file, name)


def _finite(tensor: Tensor, file: TensorFile, name: str) -> Tensor:
    least, most = torch.aminmax(tensor)
    if not torch.isfinite(torch.stack((least, most))).all():
        word = str(tensor.dtype).removeprefix("torch.")
        raise damaged(file.path, f"tensor {name}: found NaN or infinity as {word}, expected finite numbers; {HINT}")
    return tensor


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _ready(module: Module) -> Module:
    return module.eval().requires_grad_(False)
