"""LoRA over the linears of the transformer's layers, merged into their weights: what runs afterwards is plain linears.

PEFT reads the adapter and computes the update. Rank and alpha come from the configuration, because the published file
does not state them. Knows no file.
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from configs.schema import LoraConfig
from workers.models.transformer import CausalWanTransformer

PREFIX = "base_model.model."


def lora_shapes(transformer: CausalWanTransformer, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's tensors, for every linear of every layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _targets(transformer):
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
    return shapes


@torch.no_grad()
def merge_lora(transformer: CausalWanTransformer, config: LoraConfig, adapter: Mapping[str, Tensor]) -> None:
    """Adds alpha / rank * B @ A to the weight of every linear the adapter has; the module tree is as before.

    Args:
        adapter: PEFT's names, as `lora_shapes` lists them; float32, bfloat16 or float16.
    """
    targets = _targets(transformer)
    peft = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(peft, transformer)
    set_peft_model_state_dict(transformer, {name.removeprefix(PREFIX): t for name, t in adapter.items()})
    for name in targets:
        layer = transformer.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        layer.merge(safe_merge=False)
        transformer.set_submodule(name, layer.get_base_layer())


def _targets(transformer: CausalWanTransformer) -> list[str]:
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]
