"""Every operation of a `Kernels` set, by PyTorch and by Triton, on the rows of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from counting import distinct
from torch import Tensor

from gpu.micro.bench import Bench, off_by
from workers.models.kernels import TORCH, Codes, Kernels
from workers.models.kv_store import new_store
from workers.models.rope import rotation
from workers.models.triton_kernels import TRITON

EPS = 1e-6
STORES = ("model", "int8", "fp8")


@dataclass(frozen=True)
class Operation:
    """What is measured.

    Attributes:
        of: finds it in a set.
        arguments: draws new ones.
        beside: bytes read and written besides those of arguments and results; None where they are not counted.
    """

    name: str
    of: Callable[[Kernels], Callable[..., Any]]
    arguments: Callable[[], tuple[Any, ...]]
    beside: float | None = 0.0


def run(bench: Bench) -> None:
    """Each operation by both."""
    for operation in operations(bench):
        with torch.inference_mode():
            _both(bench, operation)
        bench.give_back()


def _both(bench: Bench, operation: Operation) -> None:
    arguments = [operation.arguments()]
    twin = operation.of(TORCH)(*arguments[0])
    touched = float(sum(tensor.nbytes for tensor in distinct((arguments[0], twin))))
    arguments += [operation.arguments() for _ in range(bench.sets(touched) - 1)]
    moved = 0.0 if operation.beside is None else touched + operation.beside
    note = "" if bench.on_gpu else "under Triton's interpreter"
    for kernels in (TORCH, TRITON):
        function = operation.of(kernels)
        if kernels is TRITON and function is operation.of(TORCH):
            bench.add(f"{operation.name}, {kernels.name}", note="is PyTorch's")
            continue
        error = (lambda f=function: off(f(*arguments[0]), twin)) if kernels is TRITON else None
        bench.measure(
            f"{operation.name}, {kernels.name}",
            [partial(function, *given) for given in arguments],
            moved=moved,
            error=error,
            note=note if kernels is TRITON else "",
        )


def operations(bench: Bench) -> list[Operation]:
    """All but those that do nothing or end a product."""
    config = bench.config.model.transformer
    rows, dim, wide = bench.tokens, config.dim, config.ffn_dim

    def x(width: int = dim) -> Tensor:
        return bench.draw(rows, width)

    def vector() -> Tensor:
        return bench.draw(dim, dtype=torch.float32)

    def normed() -> tuple[Any, ...]:
        return x(), vector(), vector(), EPS

    def gated() -> tuple[Any, ...]:
        return x(), x(), vector(), vector(), vector(), EPS

    def ungated() -> tuple[Any, ...]:
        return x(), x(), None, vector(), vector(), EPS

    return [
        Operation("norm_modulate", lambda k: k.plain.norm_modulate, normed),
        Operation("norm_modulate, rows in e4m3", lambda k: k.fp8.norm_modulate, normed),
        Operation("gate_norm_modulate", lambda k: k.plain.gate_norm_modulate, gated),
        Operation("gate_norm_modulate without gate", lambda k: k.plain.gate_norm_modulate, ungated),
        Operation("gate_norm_modulate, rows in e4m3", lambda k: k.fp8.gate_norm_modulate, gated),
        Operation("gelu", lambda k: k.plain.gelu, lambda: (x(wide),)),
        Operation("gelu, rows in e4m3", lambda k: k.fp8.gelu, lambda: (x(wide),)),
        Operation("rows in e4m3", lambda k: k.fp8.rows, lambda: (x(),)),
        Operation("rms_norm", lambda k: k.rms_norm, lambda: (x(), bench.draw(dim), EPS)),
        *(_write_qkv(bench, kind) for kind in STORES),
    ]


def _write_qkv(bench: Bench, kind: str) -> Operation:
    """Into a slot of one layer's keys and values, kept in a kind."""
    config, video = bench.config.model.transformer, bench.config.video
    rows, columns = video.latent_height // 2, video.latent_width // 2
    frames = range(3, 3 + bench.config.stream.frames_per_block)
    turn = rotation(list(frames), rows, columns, config.head_dim, bench.device)
    slots = torch.ones(1, dtype=torch.int64, device=bench.device)

    def arguments() -> tuple[Any, ...]:
        store = new_store(
            kind,
            bench.config.stream,
            bench.dtype,
            layers=1,
            heads=config.num_heads,
            head_dim=config.head_dim,
            frame_tokens=video.frame_tokens,
            device=bench.device,
        )
        weights = bench.draw(config.dim), bench.draw(config.dim)
        return bench.draw(bench.tokens, 3 * config.dim), weights, EPS, turn, store.layers[0], slots, 0

    written = 2.0 * bench.tokens * config.dim * bench.dtype.itemsize
    name = "write_qkv" if kind == "model" else f"write_qkv, kept in {kind}"
    return Operation(name, lambda k: k.write_qkv, arguments, written if kind == "model" else None)


def off(out: object, twin: object) -> float:
    """The largest of the results' errors; codes as the numbers they stand for."""
    return max(off_by(mine, theirs) for mine, theirs in zip(_numbers(out), _numbers(twin), strict=True))


def _numbers(result: object) -> list[Tensor]:
    if isinstance(result, Codes):
        return [result.codes.float() * result.scale]
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, tuple)
    return [number for part in result for number in _numbers(part)]
