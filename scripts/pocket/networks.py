"""Transformer and text encoder while they are trained."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pocket.network import TrainedTransformer
from pocket.training import Training
from workers.models.transformer import CausalWanTransformer
from workers.models.umt5 import TextEncoder


@dataclass
class Networks:
    """The transformer and the text encoder in bfloat16, and passes over them; `fast` ones for shapes that stay."""

    transformer: CausalWanTransformer
    text_encoder: TextEncoder
    plain: TrainedTransformer
    fast: TrainedTransformer

    @classmethod
    def build(cls, run: Training, found: Path | None, compiled: bool = False) -> "Networks":
        torch.manual_seed(run.seed + 1)
        transformer = CausalWanTransformer(run.config.model.transformer)
        _draw(transformer)
        text_encoder = TextEncoder(run.config.model.text_encoder)
        if found is not None:
            tensors = load_file(found)
            for prefix, network in (("transformer", transformer), ("text", text_encoder.model)):
                network.load_state_dict(
                    {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")},
                    strict=False,
                )
        for network in (transformer, text_encoder):
            network.to(run.device, torch.bfloat16)
        plain = TrainedTransformer(transformer, run.config.stream, run.config.video)
        compiler = partial(torch.compile, dynamic=False)
        fast = TrainedTransformer(transformer, run.config.stream, run.config.video, compiler) if compiled else plain
        return cls(transformer, text_encoder, plain, fast)

    def embeds(self, ids: Tensor) -> Tensor:
        """[B, n] -> [B, n, text_dim]."""
        return self.text_encoder(ids, (ids != 0).long())

    def save(self, path: Path) -> None:
        tensors = {f"transformer/{n}": t for n, t in self.transformer.state_dict().items()}
        tensors |= {f"text/{n}": t for n, t in self.text_encoder.model.named_parameters()}
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, path)


def _draw(transformer: CausalWanTransformer) -> None:
    """Starting values: Xavier for linears, a silent head."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.head.head.weight)
