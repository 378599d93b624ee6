"""The passes of a stream on the fast path: fills the static buffers, runs what was recorded for the shape at hand."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from configs.schema import KVKind, StreamConfig, VideoConfig
from workers.models.attention import Attend
from workers.models.fp8 import MakeLinear, plain_linear
from workers.models.graphs import Recorder, Replay, run_directly
from workers.models.kernels import TORCH, Kernels
from workers.models.kv_cache import CacheLayout, CachePlan
from workers.models.kv_store import LayerKV
from workers.models.noise import NoiseSource
from workers.models.passes import AfterPass, go_on, undo_for
from workers.models.static import Shape, StaticTransformer
from workers.models.transformer import CausalWanTransformer

Key = tuple[str | int, Shape | None]
"""Which pass of which shape: a step by its number, `remember`, `recompute`, `move sink`."""


class StaticPasses:
    """As `passes.PlainPasses`, with shapes, addresses and operations that stay.

    Args:
        record: takes what a pass does once, returns how to do it again.
        kv, linear, kernels, compiled, beside, attend_fp8: as of `StaticTransformer`.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        stream: StreamConfig,
        video: VideoConfig,
        on_pass: AfterPass = go_on,
        record: Recorder = run_directly,
        kv: KVKind = "model",
        linear: MakeLinear = plain_linear,
        kernels: Kernels = TORCH,
        compiled: bool = False,
        beside: StaticTransformer | None = None,
        attend_fp8: Attend | None = None,
    ) -> None:
        self.model, self.stream = model, stream
        self.static = StaticTransformer(model, stream, video, kv, linear, kernels, compiled, beside, attend_fp8)
        self._compiled = compiled
        self._compiling = partial(_compiling, stream) if compiled else nullcontext
        self._on_pass = on_pass
        self._undo = undo_for(stream, self.static.store.touched_by)
        self.record = record
        self._recorded: dict[Key, Replay] = {}
        self.text_keys = 0
        self.sink_at: int | None = None

    @property
    def nbytes(self) -> int:
        return self.static.store.nbytes

    @property
    def layers(self) -> list[LayerKV]:
        return self.static.store.layers

    def take_prompt(self, embeds: Tensor) -> None:
        self.text_keys = self.static.text.put(self.model.prompt_kv(embeds), embeds.shape[1])

    def denoise(self, plan: CachePlan, block: int, noise: NoiseSource) -> Tensor | None:
        if self._undo is not None:
            self._undo.keep(plan.slots[0], self.sink_at)
        shape = self.fill(plan, block, noise)
        for step in range(len(self.static.sigmas)):
            self._run(step, shape)
            if self._on_pass() and self._undo is not None and step + 1 < len(self.static.sigmas):
                self._undo.put_back()
                self.sink_at = self._undo.sink_at
                return None
        return self.static.latents.clone()[None]

    def fill(self, plan: CachePlan, block: int, noise: NoiseSource) -> Shape:
        """Puts into the buffers all in which a block differs from others."""
        static, shape = self.static, self._place(plan)
        static.latents.copy_(noise.start(block)[0], non_blocking=True)
        for step in range(len(static.sigmas) - 1):
            static.noise[step].copy_(noise.between(block, step)[0], non_blocking=True)
        return shape

    def remember(self, plan: CachePlan, clean: Tensor) -> None:
        shape = self._place(plan)
        target = self.static.latents if shape.blocks == 1 else self.static.past[: clean.shape[1]]
        target.copy_(clean[0])
        self._run("remember", shape)
        self._on_pass()

    def record_all(self) -> None:
        """Records every pass that a stream can meet, for every length of prompt; leaves the buffers as it likes.

        The largest come first: graphs share memory, and what one has left free is cut up for smaller ones alone.
        """
        static = self.static
        static.slots.zero_()  # a slot that every shape may write to, whatever a stream left there
        plans = sorted(all_plans(self.stream), key=lambda each: -len(each[0].slots))
        for plan, denoises in plans:
            for text_keys in reversed(static.text.lengths):
                shape = self._shape(plan, text_keys)
                for kind in (*range(len(static.sigmas)), "remember") if denoises else ("remember",):
                    self._replay(kind, shape)
        if self.stream.sink and self.stream.rope == "relative":
            self._replay("move sink", None)
        if self._compiled:
            self._compile_all()

    @torch.inference_mode()
    def _compile_all(self) -> None:
        """Runs a pass of each shape that is compiled anew: neither steps nor keys are among what a compilation sees.

        But whether a block sees itself alone may be.
        """
        once: dict[tuple[bool, int, int, bool], Replay] = {}
        for (kind, shape), replay in self._recorded.items():
            if shape is not None:
                once[isinstance(kind, int), shape.blocks, shape.sinks, shape.visible == 1] = replay
        for replay in once.values():
            replay()

    def _place(self, plan: CachePlan) -> Shape:
        """Writes where the inputs stand and go; moves the sink if it is not there yet."""
        static = self.static
        if plan.sink is not None and plan.sink != self.sink_at:
            static.place(static.sink_turn, range(plan.sink, plan.sink + self.stream.sink))
            self._run("move sink", None)
            self.sink_at = plan.sink
        static.place(static.turn, plan.frames)
        static.slots[: len(plan.slots)].copy_(torch.tensor(plan.slots), non_blocking=True)
        if plan.slots[0] == 0:
            self.sink_at = plan.frames[0]
        return self._shape(plan, self.text_keys)

    def _shape(self, plan: CachePlan, text_keys: int) -> Shape:
        sinks = sum(slot < self.stream.sink_blocks for slot in plan.slots)
        return Shape(len(plan.slots), plan.visible, sinks, text_keys)

    def _run(self, kind: str | int, shape: Shape | None) -> None:
        self._replay(kind, shape)()

    def _replay(self, kind: str | int, shape: Shape | None) -> Replay:
        key = (kind, shape)
        if key not in self._recorded:
            self._recorded[key] = self.record(lambda: self._once(kind, shape))
        return self._recorded[key]

    def _once(self, kind: str | int, shape: Shape | None) -> None:
        static = self.static
        with self._compiling():
            if shape is None:
                static.store.move_sink(static.sink_turn, static.kernels)
            elif isinstance(kind, int):
                static.step(kind, shape)
            else:
                static.remember(shape)


@contextmanager
def _compiling(stream: StreamConfig) -> Iterator[None]:
    """Where torch.compile may be at work: every number of input blocks, and of the sink's among them, is a shape."""
    shapes = torch._dynamo.config.patch(recompile_limit=8 + stream.window_blocks * (1 + stream.sink_blocks))
    # In this process: a pool of compilers would be left when it ends.
    with shapes, torch._inductor.config.patch(compile_threads=1):
        yield


def all_plans(stream: StreamConfig) -> list[tuple[CachePlan, bool]]:
    """One plan of every shape that a stream can meet, and whether blocks are denoised under it."""
    layout = CacheLayout(stream)
    plans: list[tuple[CachePlan, bool]] = []
    for block in range(2 * stream.window_blocks + 1):
        plans.append((layout.denoise(block, 0), True))
        if block:
            plans.append((layout.reanchor(block)[0], False))
            recache = layout.recache(block, 0)
            if recache is not None:
                plans.append((recache[0], False))
    return plans
