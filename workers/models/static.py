"""The denoiser's fast path: one block as a sequence of operations whose shapes and addresses never change.

What differs from block to block (noise, where to write, positions, the prompt) lies in buffers that are filled before.
`transformer.py` and `passes.py` are the definition; this is the same arithmetic without what is the same every time:
modulations of the few steps are tables, query, key and value are one product, the clean pass stops at the last layer's
keys and values. Knows no blocks' numbers, prompts or clocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import LATENT_CHANNELS, LAYER_LINEARS, PATCH, KVKind, StreamConfig, VideoConfig
from workers.models.attention import Attend
from workers.models.fp8 import Fp8Linear, MakeLinear, PlainLinear, plain_linear
from workers.models.kernels import E4M3, TORCH, Codes, Kernels, LinearInputs
from workers.models.kv_store import LayerKV, StoreKind, new_store
from workers.models.rope import Rotation, frame_rotation, rotation
from workers.models.schedule import Schedule
from workers.models.transformer import CausalWanTransformer, Layer, PromptKV, timestep_embedding


@dataclass(frozen=True)
class Shape:
    """What is fixed in a captured pass: input blocks, slots seen, inputs that are the sink's, keys of the prompt."""

    blocks: int
    visible: int
    sinks: int
    text_keys: int


PADDING_KEYS = {torch.float32: 1, torch.bfloat16: 3, torch.float16: 3}
"""How many keys stand for all padding of a prompt: more where one bias is too coarse."""


def fuse_qkv(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight [3 dim, dim] and bias [3 dim] of a layer's self-attention; its linears become views of them."""
    linears = [layer.self_attn.q, layer.self_attn.k, layer.self_attn.v]
    weight = joined([linear.weight.detach() for linear in linears])
    bias = joined([linear.bias.detach() for linear in linears])
    for linear, part, offset in zip(linears, weight.chunk(3), bias.chunk(3), strict=True):
        linear.weight, linear.bias = nn.Parameter(part, False), nn.Parameter(offset, False)
    return weight, bias


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors of one shape as one, [n * rows, ...]; a view where they are its parts already."""
    first, size = parts[0], parts[0].nbytes
    places = [(part.untyped_storage().data_ptr(), part.data_ptr()) for part in parts]
    if places != [(places[0][0], places[0][1] + number * size) for number in range(len(parts))]:
        return torch.cat(parts)
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())


class StaticLayer:
    """One layer's weights, its modulations at every timestep that occurs, and its work on [tokens, dim].

    Its three methods are what happens between attentions; they take tensors of few shapes, so that one compilation
    of each serves all layers and all timesteps.

    Args:
        index: which layer it is.
        times: [T, 6, dim], the time projection of each timestep.
        linear: makes its linears, `configs.schema.LAYER_LINEARS`.
        compiled: whether torch.compile makes the methods.

    Attributes:
        linears: by those names.
        inputs: by the same names, what makes their inputs: codes for a linear in e4m3, else tensors.
        modulation: [T, 6, dim] float32: shift, scale (1 included), gate of self-attention, then of the feed-forward.
    """

    def __init__(
        self, index: int, layer: Layer, times: Tensor, linear: MakeLinear, kernels: Kernels, compiled: bool
    ) -> None:
        self.layer, self.kernels = layer, kernels
        self.heads = layer.self_attn.heads
        weights = {"self_attn.qkv": fuse_qkv(layer)}
        for name in LAYER_LINEARS[1:]:
            own = layer.get_submodule(name)
            weights[name] = own.weight, own.bias
        self.linears = {name: linear(f"blocks.{index}.{name}", *parts) for name, parts in weights.items()}
        self.inputs = {
            name: kernels.fp8 if isinstance(made, Fp8Linear) else kernels.plain for name, made in self.linears.items()
        }
        self.modulation = layer.modulation[0].float() + times.float()
        self.modulation[:, (1, 4)] += 1
        self.norm3 = (layer.norm3.weight.float(), layer.norm3.bias.float())
        self.eps = layer.norm1.eps
        if compiled:
            self.ask_past = torch.compile(self.ask_past, fullgraph=True, dynamic=False)
            self.ask_prompt = torch.compile(self.ask_prompt, fullgraph=True, dynamic=False)
            self.finish = torch.compile(self.finish, fullgraph=True, dynamic=False)

    def ask_past(self, h: Tensor | Codes, turn: Rotation, kv: LayerKV, slots: Tensor, sinks: int) -> Tensor:
        """Rotated queries [tokens, heads, head_dim] of the normed input h; its keys and values are in `kv` then."""
        attn = self.layer.self_attn
        weights = (attn.norm_q.weight, attn.norm_k.weight)
        qkv = self.linears["self_attn.qkv"](h)
        return self.kernels.write_qkv(qkv, weights, attn.norm_q.eps, turn, kv, slots, sinks)

    def ask_prompt(self, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """x with self-attention's y [tokens, heads, head_dim] gated onto it, and queries of cross-attention."""
        y = self.linears["self_attn.o"](self.inputs["self_attn.o"].rows(y.flatten(-2)))
        x, h = self.inputs["cross_attn.q"].gate_norm_modulate(x, y, gate, *self.norm3, self.eps)
        attn = self.layer.cross_attn
        q = self.kernels.rms_norm(self.linears["cross_attn.q"](h), attn.norm_q.weight, attn.norm_q.eps)
        return x, q.unflatten(-1, (self.heads, -1))

    def finish(
        self,
        x: Tensor,
        y: Tensor,
        norm: tuple[Tensor, Tensor],
        gate: Tensor,
        then: tuple[Tensor, Tensor],
        into: LinearInputs,
    ) -> tuple[Tensor, Tensor | Codes]:
        """x with cross-attention's y and the feed-forward added, and its norm as what comes then takes it.

        Args:
            norm: scale and shift before the feed-forward.
            gate: of the feed-forward's result.
            then: scale and shift of the norm that follows the layer.
            into: what makes that norm, for the linear that takes it.
        """
        y = self.linears["cross_attn.o"](self.inputs["cross_attn.o"].rows(y.flatten(-2)))
        x, h = self.inputs["ffn.0"].gate_norm_modulate(x, y, None, *norm, self.eps)
        y = self.linears["ffn.2"](self._widened(h))
        return into.gate_norm_modulate(x, y, gate, *then, self.eps)

    def _widened(self, h: Tensor | Codes) -> Tensor | Codes:
        """What `ffn.2` takes of the feed-forward's normed input."""
        first = self.linears["ffn.0"]
        if isinstance(first, PlainLinear) and self.inputs["ffn.2"] is self.kernels.plain:
            return self.kernels.linear_gelu(h, first.weight, first.bias)
        return self.inputs["ffn.2"].gelu(first(h))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention with a bias of the logits: q [Lq, heads, head_dim], k and v [Lk, heads, head_dim], bias [1, Lk].

    All are of one dtype: on CUDA a float32 bias of 16-bit keys is refused by some kernels and misread by others.
    """
    out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=bias)
    return out[0].transpose(0, 1)


class TextKV:
    """Cross-attention keys and values of the prompt in force, in place.

    The padding of a prompt is one vector many times over: one key with the logarithm of their number as bias of its
    logit stands for all (exact), or a few keys that weigh as much. What is left is cut to one of a few lengths.

    Attributes:
        k, v: [layers, text_len, heads, head_dim].
        bias: [1, text_len], of the same dtype.
    """

    LENGTHS = (32, 64, 128, 256)

    def __init__(self, model: CausalWanTransformer) -> None:
        config = model.config
        shape = (config.num_layers, config.text_len, config.num_heads, config.head_dim)
        self.k = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.v = torch.zeros_like(self.k)
        self.bias = torch.zeros(1, config.text_len, device=model.device, dtype=model.dtype)

    @property
    def lengths(self) -> tuple[int, ...]:
        """All lengths that occur."""
        text_len = self.k.shape[1]
        return (*(length for length in self.LENGTHS if length < text_len), text_len)

    def put(self, prompt: PromptKV, tokens: int) -> int:
        """Takes a prompt's keys and values over; returns how many keys there now are."""
        for mine, new in ((self.k, prompt.k), (self.v, prompt.v)):
            mine.copy_(torch.stack([layer[0] for layer in new]))
        text_len = self.k.shape[1]
        biases = [0.0] * tokens + padding_biases(text_len - tokens, self.k.dtype)
        self.bias.copy_(torch.tensor(biases + [-math.inf] * (text_len - len(biases))))
        return next(length for length in self.lengths if length >= len(biases))


def padding_biases(count: int, dtype: torch.dtype) -> list[float]:
    """Biases of a few keys that together weigh what `count` equal keys weigh, each exact in a dtype.

    A logarithm in 8 bits of mantissa is up to 3 % off in weight, so that further keys weigh what the first leaves over.
    """
    keys = PADDING_KEYS[dtype]
    if count <= keys:
        return [0.0] * count
    biases, left = [], float(count)
    for key in range(keys):
        wanted = math.log(left)
        if key + 1 < keys:
            wanted -= abs(wanted) * torch.finfo(dtype).eps  # rounds to less than is left
        biases.append(float(torch.tensor(wanted, dtype=dtype)))
        left -= math.exp(biases[-1])
    return biases


class StaticTransformer:
    """A stream's passes over its buffers.

    Args:
        kv: how keys and values are kept.
        linear: makes the layers' linears.
        kernels: what computes the small operations.
        compiled: whether torch.compile makes what lies between attentions.
        beside: another of the same model, stream, picture and `kept`, to work in whose memory; never both at once.
        attend_fp8: attends to keys and values in e4m3, which are then kept in it; needs `kv: model`.

    Attributes:
        kept: the kind of its store.
        noise: [steps - 1, F, 16, h, w] float32, what is mixed back in after each step but the last.
        latents: [F, 16, h, w] float32, the block at work: noise at first, clean after the last step.
        past: [window blocks * F, 16, h, w] float32, latents to recompute the cache from.
        turn: rotations of the inputs' tokens, up to a window of blocks; `sink_turn` those of the sink. What comes from
            a token's row and column stays in them, `place` writes the rest.
        slots: [window blocks] int64, where the inputs are written.
        into: what makes the input of each layer, and of the head.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        kv: KVKind = "model",
        linear: MakeLinear = plain_linear,
        kernels: Kernels = TORCH,
        compiled: bool = False,
        beside: "StaticTransformer | None" = None,
        attend_fp8: Attend | None = None,
    ) -> None:
        self.model, self.stream, self.kernels, self.attend_fp8 = model, stream, kernels, attend_fp8
        self.kept: StoreKind = kv if attend_fp8 is None else "attended"
        schedule = Schedule.from_config(stream)
        self.sigmas = [schedule.sigma_at(step) for step in schedule.steps]
        self.rows, self.columns = video.latent_height // PATCH, video.latent_width // PATCH
        if beside is None:
            self._allocate(video)
        else:
            self.store, self.text, self.noise, self.latents = beside.store, beside.text, beside.noise, beside.latents
            self.past, self.turn, self.sink_turn, self.slots = beside.past, beside.turn, beside.sink_turn, beside.slots
        self._bake((*schedule.steps, float(stream.context_noise)), linear, compiled)

    def _allocate(self, video: VideoConfig) -> None:
        model, stream = self.model, self.stream
        config, device = model.config, model.device
        self.store = new_store(
            self.kept,
            stream,
            model.dtype,
            layers=config.num_layers,
            heads=config.num_heads,
            head_dim=config.head_dim,
            frame_tokens=video.frame_tokens,
            device=device,
        )
        self.text = TextKV(model)
        frames, shape = stream.frames_per_block, (LATENT_CHANNELS, video.latent_height, video.latent_width)
        self.noise = torch.zeros(len(self.sigmas) - 1, frames, *shape, device=device)
        self.latents = torch.zeros(frames, *shape, device=device)
        self.past = torch.zeros(stream.window, *shape, device=device)
        self.turn = rotation([0] * stream.window, self.rows, self.columns, config.head_dim, device)
        self.sink_turn = Rotation(*(t[: stream.sink * video.frame_tokens].clone() for t in self.turn))
        self.slots = torch.zeros(stream.window_blocks, dtype=torch.int64, device=device)

    def place(self, turn: Rotation, frames: Sequence[int]) -> None:
        """Puts the tokens of one of the two tables at these frames' positions, from its first token on."""
        for mine, new in zip(turn, frame_rotation(frames, self.model.config.head_dim), strict=True):
            by_frame = mine.unflatten(0, (-1, self.rows * self.columns))[: len(new), :, : new.shape[1]]
            by_frame.copy_(new.to(mine.device, non_blocking=True)[:, None])

    def buffers(self) -> list[Tensor]:
        """All memory that passes read or write besides weights; it never moves."""
        text = self.text
        return [
            *self.store.buffers(),
            text.k,
            text.v,
            text.bias,
            self.noise,
            self.latents,
            self.past,
            *self.turn,
            *self.sink_turn,
            self.slots,
        ]

    @property
    def context(self) -> int:
        """Which timestep of the tables is the clean pass's."""
        return len(self.sigmas)

    @torch.no_grad()
    def _bake(self, timesteps: tuple[float, ...], linear: MakeLinear, compiled: bool) -> None:
        """What follows from a timestep alone, for all that occur."""
        model = self.model
        embedded = [timestep_embedding(t, model.config.freq_dim, model.device) for t in timesteps]
        time = model.time_embedding(torch.stack(embedded).to(model.dtype))
        projected = model.time_projection(time).unflatten(-1, (6, -1))
        self.attend = model.attention.attend
        self.layers = [
            StaticLayer(index, layer, projected, linear, self.kernels, compiled)
            for index, layer in enumerate(model.blocks)
        ]
        self.into = [*(layer.inputs["self_attn.qkv"] for layer in self.layers), self.kernels.plain]
        self.head_modulation = model.head.modulation[0].float() + time.float()[:, None]
        self.head_modulation[:, 1] += 1
        self.patch_weight = model.patch_embedding.weight.flatten(1)

    def step(self, number: int, shape: Shape) -> None:
        """One denoising step of the block in `latents`, in place."""
        clean = (self.latents.double() - self.sigmas[number] * self.flow(number, shape).double()).float()
        if number + 1 < len(self.sigmas):
            sigma = self.sigmas[number + 1]
            clean = (1 - sigma) * clean + sigma * self.noise[number]
        self.latents.copy_(clean)

    def flow(self, time: int, shape: Shape) -> Tensor:
        """The flow of the block in `latents`, [F, 16, h, w] float32; leaves its keys and values in the store."""
        y = self.model.head.head(self._layers(self.latents, time, shape, to_the_end=True))
        return unpatchified(y, len(self.latents), self.rows, self.columns).float()

    def remember(self, shape: Shape) -> None:
        """Keys and values, and nothing else, of the clean block in `latents` or of the several in `past`."""
        frames = shape.blocks * self.stream.frames_per_block
        latents = self.latents if shape.blocks == 1 else self.past[:frames]
        self._layers(latents, self.context, shape, to_the_end=False)

    def _layers(self, latents: Tensor, time: int, shape: Shape, *, to_the_end: bool) -> Tensor | Codes:
        """All layers' keys and values, and to the end what the head takes: the normed stream, [tokens, dim]."""
        x = F.linear(patchified(latents).to(self.model.dtype), self.patch_weight, self.model.patch_embedding.bias)
        turn = Rotation(*(table[: len(x)] for table in self.turn))
        slots, keys = self.slots[: shape.blocks], slice(shape.text_keys)
        modulations = [layer.modulation[time].unbind() for layer in self.layers]
        norms = [(scale, shift) for shift, scale, *_ in (*modulations, self.head_modulation[time].unbind())]
        h = self.into[0].norm_modulate(x, *norms[0], self.model.head.norm.eps)
        parts = self.store.at_work(shape.blocks, shape.visible)
        for index, (layer, kv) in enumerate(zip(self.layers, parts, strict=True)):
            q = layer.ask_past(h, turn, kv, slots, shape.sinks)
            if not to_the_end and index + 1 == len(self.layers):
                break
            _, _, gate, shift, scale, gate2 = modulations[index]
            attend = self.attend_fp8 if self.attend_fp8 is not None and q.dtype == E4M3 else self.attend
            seen = attend(q[None], *(part[None] for part in kv.visible(shape.visible)))[0]
            x, q = layer.ask_prompt(x, seen, gate)
            y = attention(q, self.text.k[index, keys], self.text.v[index, keys], self.text.bias[:, keys])
            x, h = layer.finish(x, y, (scale, shift), gate2, norms[index + 1], self.into[index + 1])
        return h


def patchified(latents: Tensor) -> Tensor:
    """[F, 16, 2 rows, 2 columns] -> [F * rows * columns, 16 * 2 * 2]."""
    x = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def unpatchified(x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """[frames * rows * columns, 2 * 2 * 16] -> [frames, 16, 2 rows, 2 columns]."""
    x = x.view(frames, rows, columns, PATCH, PATCH, LATENT_CHANNELS)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(frames, LATENT_CHANNELS, rows * PATCH, columns * PATCH)
