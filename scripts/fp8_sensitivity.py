"""Which linears of the denoiser bear e4m3: the teacher-forced error of clean latents with some quantised alone.

    .venv/bin/python scripts/fp8_sensitivity.py --config pocket
    .venv/bin/python scripts/fp8_sensitivity.py --config longlive-1.3b --set model.path=weights --by layer --bar 0.03

An exact stream in float32 gives every step its context, latents and noise; what is computed from them with quantised
linears is compared, norm of the difference over norm. Prints a table, most sensitive first; with `--bar` also what
`execution.fp8_keep` has to name so that all other linears in e4m3 together stay below it, measured. Last line JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from configs.load import check_model_files, load_config
from configs.schema import LAYER_LINEARS, RuntimeConfig
from ipc.errors import UserError
from workers.models.checkpoint import load_text_encoder, load_tokenizer, load_transformer
from workers.models.fp8 import Fp8Linear, Linear, plain_linear
from workers.models.kv_cache import CacheLayout
from workers.models.noise import DrawnNoise
from workers.models.prompt_text import clean
from workers.models.static import StaticTransformer
from workers.models.static_passes import StaticPasses

By = Literal["kind", "layer", "linear"]
Linears = Mapping[str, Linear]
"""By their names in the configuration."""
Errors = dict[str, list[float]]
"""By what was replaced: the largest of each step."""
BFLOAT16, ALL = "all in bfloat16", "all in fp8"
LEAST_COLUMNS = 100


class Sensitivity:
    """Exact streams of a configuration, and linears to put in the place of its own.

    Args:
        prompts: one stream each.
        blocks: of each stream.

    Attributes:
        fp8, bfloat16: all linears of the fast path, in these numbers.
    """

    def __init__(self, config: RuntimeConfig, prompts: Sequence[str], blocks: int) -> None:
        model = config.model.model_copy(update={"dtype": "float32"})
        device = torch.device(config.stage("denoiser").device or "cpu")
        self._config, self._blocks = config, blocks
        self._embeds = [embeds.to(device) for embeds in encoded(config, prompts)]
        self.fp8: dict[str, Linear] = {}
        self.bfloat16: dict[str, Linear] = {}
        transformer = load_transformer(model, device)
        self._passes = StaticPasses(transformer, config.stream, config.video, linear=self._linear)

    def _linear(self, name: str, weight: Tensor, bias: Tensor) -> Linear:
        """The exact one; the others are put by."""
        self.fp8[name] = Fp8Linear(weight, bias)
        narrow = weight.bfloat16(), bias.bfloat16()
        self.bfloat16[name] = lambda x: F.linear(x.bfloat16(), *narrow).float()
        return plain_linear(name, weight, bias)

    @torch.inference_mode()
    def errors(self, replaced: Mapping[str, Linears]) -> Errors:
        """Of clean latents with each of some sets of linears in place, the others exact."""
        static, layout = self._passes.static, CacheLayout(self._config.stream)
        worst = {name: [0.0] * len(static.sigmas) for name in replaced}
        for seed, embeds in enumerate(self._embeds):
            self._passes.take_prompt(embeds)
            noise = DrawnNoise(self._config.seed + seed, tuple(static.latents.shape))
            for block in range(self._blocks):
                plan = layout.denoise(block, 0)
                shape = self._passes.fill(plan, block, noise)
                for step, sigma in enumerate(static.sigmas):
                    latents = static.latents.clone()
                    exact = latents - sigma * static.flow(step, shape)
                    for name, linears in replaced.items():
                        with in_place(static, linears):
                            made = latents - sigma * static.flow(step, shape)
                        off = float(torch.linalg.norm(made - exact) / torch.linalg.norm(exact))
                        worst[name][step] = max(worst[name][step], off)
                    static.step(step, shape)
                self._passes.remember(plan, static.latents.clone()[None])
        return worst

    def keeping(self, patterns: Sequence[str]) -> float:
        """The largest error with all linears in e4m3 but those that fit a pattern."""
        kept = {name for pattern in patterns for name in self.fp8 if fnmatchcase(name, pattern)}
        replaced = {name: linear for name, linear in self.fp8.items() if name not in kept}
        return max(self.errors({ALL: replaced})[ALL])


@contextmanager
def in_place(static: StaticTransformer, linears: Linears) -> Iterator[None]:
    """Puts linears in the place of a transformer's own for a while."""
    kept: list[tuple[dict[str, Linear], str, Linear]] = []
    for name, linear in linears.items():
        _, index, own = name.split(".", 2)
        layer = static.layers[int(index)].linears
        kept.append((layer, own, layer[own]))
        layer[own] = linear
    try:
        yield
    finally:
        for layer, own, linear in kept:
            layer[own] = linear


def encoded(config: RuntimeConfig, prompts: Sequence[str]) -> Iterator[Tensor]:
    """Embeddings [1, n, text_dim] float32 on the CPU; the text encoder is dropped afterwards."""
    device = torch.device(config.stage("text_encoder").device or "cpu")
    tokenizer, encoder = load_tokenizer(config.model), load_text_encoder(config.model, device)
    for prompt in prompts:
        ids = torch.tensor(tokenizer.ids(clean(prompt)), device=device)
        yield encoder.encode(ids)[None].float().cpu()


def patterns(by: By, layers: int) -> list[str]:
    """What is quantised alone, as `execution.fp8_keep` names it."""
    if by == "kind":
        return [f"blocks.*.{name}" for name in LAYER_LINEARS]
    if by == "layer":
        return [f"blocks.{layer}.*" for layer in range(layers)]
    return [f"blocks.{layer}.{name}" for layer in range(layers) for name in LAYER_LINEARS]


def fewest_kept(measured: Sensitivity, ranked: Sequence[str], bar: float) -> tuple[list[str], float]:
    """How many of the most sensitive stay so that the rest in e4m3 errs at most `bar`; and how much it then errs."""
    low, high, error = 0, len(ranked), 0.0
    while low < high:
        middle = (low + high) // 2
        found = measured.keeping(ranked[:middle])
        if found <= bar:
            high, error = middle, found
        else:
            low = middle + 1
    return list(ranked[:high]), error


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--by", choices=["kind", "layer", "linear"], default="kind", help="what is quantised alone")
    parser.add_argument("--prompt", action="append", help="may be given several times; else the configuration's")
    parser.add_argument("--blocks", type=int, help="of each stream; else two with a full window")
    parser.add_argument("--bar", type=float, help="largest error that all of fp8 together may make")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        config = load_config(given.config, given.set)
        check_model_files(config)
        blocks = given.blocks or config.stream.window_blocks + 1
        measured = Sensitivity(config, given.prompt or [config.prompt], blocks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    groups = patterns(given.by, config.model.transformer.num_layers)
    sets = {group: {n: linear for n, linear in measured.fp8.items() if fnmatchcase(n, group)} for group in groups}
    errors = measured.errors({ALL: measured.fp8, BFLOAT16: measured.bfloat16, **sets})
    ranked = sorted(groups, key=lambda group: max(errors[group]), reverse=True)
    console = Console()
    console.width = max(console.width, LEAST_COLUMNS)
    console.print(table(errors, ranked, f"{config.name}: error of clean latents, {blocks} blocks of each prompt"))
    told = {name: rounded(errors[name]) for name in (ALL, BFLOAT16, *ranked)}
    out = {"config": config.name, "by": given.by, "errors": told}
    if given.bar is not None:
        kept, error = fewest_kept(measured, ranked, given.bar)
        print(f"--set 'execution.fp8_keep=[{', '.join(kept)}]' keeps the error at {error:.2e}")  # noqa: T201
        out |= {"bar": given.bar, "fp8_keep": kept, "error": rounded([error])[0]}
    print(json.dumps(out))  # noqa: T201
    return 0


def rounded(numbers: Sequence[float]) -> list[float]:
    """Four digits, for reading."""
    return [float(f"{number:.4g}") for number in numbers]


def table(errors: Errors, ranked: Sequence[str], title: str) -> Table:
    """The most sensitive first, beside what bfloat16 does."""
    steps = [f"step {step}" for step in range(len(errors[ALL]))]
    out = Table(Column("in fp8", no_wrap=True), "largest", "of bfloat16's", *steps, title=title)
    for name in (ALL, *ranked, BFLOAT16):
        worst = max(errors[name])
        ratio = f"{worst / max(errors[BFLOAT16]):.2f}"
        out.add_row(name, f"{worst:.2e}", ratio, *(f"{error:.2e}" for error in errors[name]))
    return out


if __name__ == "__main__":
    sys.exit(main())
