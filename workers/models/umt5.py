"""UMT5 encoder under Wan's tensor names: transformers runs it, this file only translates.

Names are those of models_t5_umt5-xxl-enc-bf16.pth (Wan 2.1, wan/modules/t5.py). Every layer has a relative position
bias of its own. Knows no tokenizer and no cache.
"""

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from configs.schema import TextEncoderConfig

_LAYER = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def translation(layers: int) -> dict[str, str]:
    """Wan's tensor names to those of transformers' UMT5EncoderModel."""
    names = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    for layer in range(layers):
        for ours, theirs in _LAYER.items():
            names[f"blocks.{layer}.{ours}"] = f"encoder.block.{layer}.{theirs}"
    return names


class TextEncoder(nn.Module):
    """Embeds token ids. Its table of tokens may lie in host memory while its layers are on a GPU: a prompt needs few of
    its rows, and UMT5-XXL's are 2 GiB in bfloat16."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.dim_attn // config.num_heads,
                d_ff=config.dim_ffn,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        self.model.encoder.embed_tokens = self.model.shared  # one module: a tensor is loaded once

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, L] -> embeds [B, L, dim], zero where the mask is."""
        layers = self.model.encoder.final_layer_norm.weight.device
        tokens = self.model.shared(ids.to(self.model.shared.weight.device)).to(layers)
        mask = mask.to(layers)
        embeds = self.model(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
        return embeds * mask[..., None].to(embeds.dtype)

    def encode(self, ids: Tensor) -> Tensor:
        """One prompt's ids [n] -> embeds [n, dim] float32; padding would change nothing, so there is none."""
        return self(ids[None], torch.ones_like(ids)[None])[0].float()
