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
from workers.models.transformer import CausalWanTransformer, Layer

PREFIX = "base_model.model."


def lora_shapes(transformer: CausalWanTransformer, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's tensors, for every linear of every layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(transformer.blocks):
        for name, linear in _linears(layer).items():
            stem = f"{PREFIX}blocks.{index}.{name}"
            shapes[f"{stem}.lora_A.weight"] = (rank, linear.in_features)
            shapes[f"{stem}.lora_B.weight"] = (linear.out_features, rank)
    return shapes


@torch.no_grad()
def merge_lora(layer: Layer, config: LoraConfig, adapter: Mapping[str, Tensor]) -> None:
    """Adds alpha / rank * B @ A to the weight of every linear of a layer; its modules are as before.

    Args:
        layer: in float32, so that weight and update are rounded once, when the sum becomes `model.dtype`.
        adapter: the layer's tensors by PEFT's names, without what stands before the layer's; float32, on its device.
    """
    targets = list(_linears(layer))
    add_lora(layer, config, adapter)
    for name in targets:
        adapted = layer.get_submodule(name)
        assert isinstance(adapted, LoraLayer)
        adapted.merge(safe_merge=False)
        layer.set_submodule(name, adapted.get_base_layer())
    del layer.peft_config  # PEFT leaves it on the module it was injected into


def add_lora(layer: Layer, config: LoraConfig, adapter: Mapping[str, Tensor]) -> None:
    """Puts PEFT's modules around every linear of a layer, unmerged; arguments as of `merge_lora`."""
    targets = list(_linears(layer))
    peft = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(peft, layer, low_cpu_mem_usage=True)
    set_peft_model_state_dict(layer, dict(adapter), low_cpu_mem_usage=True)


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
