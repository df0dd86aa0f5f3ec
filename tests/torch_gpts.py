"""GPTs of torch's own nn.TransformerEncoderLayer, as different authors write them, with weights that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoints as make
from .gpts import CONTEXT, HEADS, HIDDEN, LAYERS, VOCAB


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    known: dict[str, Any] = {"activation": "gelu", "norm_first": True, "batch_first": True, "dropout": 0.1, **options}
    return nn.TransformerEncoderLayer(HIDDEN, HEADS, 4 * HIDDEN, **known)


class Stacked(nn.Module):
    """nn.TransformerEncoder with its norm, embeddings as modules, a head of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, HIDDEN)
        self.position_embedding = nn.Embedding(CONTEXT, HIDDEN)
        norm = nn.LayerNorm(HIDDEN)
        self.transformer = nn.TransformerEncoder(_layer(**options), LAYERS, norm, enable_nested_tensor=False)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        return self.lm_head(self.transformer(x, mask=mask, is_causal=True))


class Listed(nn.Module):
    """Layers in a list, without biases; positions in a buffer [T, 1, C]; a mask; a head that shares the embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.pos = nn.Module()
        self.pos.register_buffer("pe", torch.zeros(CONTEXT, 1, HIDDEN))
        self.blocks = nn.ModuleList(_layer(bias=False, **options) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        length = ids.shape[1]
        x = self.wte(ids) + self.pos.get_buffer("pe")[:length, 0]
        for block in self.blocks:
            x = block(x, src_mask=self.get_buffer("mask")[:length, :length])
        return self.head(self.ln_f(x))


MODELS: dict[str, type[nn.Module]] = {"stacked": Stacked, "listed": Listed}


def model(name: str, seed: int = 11, **options: Any) -> nn.Module:
    """One of them, in eval mode: matrices of unit gain, norms and biases far from where they start."""
    made = MODELS[name](**options).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            z = torch.randn(tensor.shape, generator=rng)
            if tensor.dtype == torch.bool:
                continue
            if tensor.dim() == 1:
                tensor.copy_(0.3 * z + ("norm" in key or "ln_f" in key) * key.endswith("weight"))
            else:
                tensor.copy_(z if "pos" in key else z / tensor.shape[-1] ** 0.5)
    return made


def gpt2_of(state: make.State) -> make.State:
    """What GPT2LMHeadModel's file holds for either."""
    outer = {
        "token_embedding.weight": "wte.weight", "wte.weight": "wte.weight", "position_embedding.weight": "wpe.weight",
        "pos.pe": "wpe.weight", "transformer.norm.weight": "ln_f.weight", "transformer.norm.bias": "ln_f.bias",
        "ln_f.weight": "ln_f.weight",
    }  # fmt: skip
    inner = {
        "self_attn.in_proj_": "attn.c_attn.", "self_attn.out_proj.": "attn.c_proj.", "linear1.": "mlp.c_fc.",
        "linear2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2.",
    }  # fmt: skip
    made = {f"transformer.{new}": state[old] for old, new in outer.items() if old in state}
    made["transformer.wpe.weight"] = made["transformer.wpe.weight"].view(CONTEXT, HIDDEN)
    made.setdefault("transformer.ln_f.bias", torch.zeros(HIDDEN))
    blocks = "blocks" if "blocks.0.norm1.weight" in state else "transformer.layers"
    for i in range(LAYERS):
        for old, new in inner.items():
            at = f"transformer.h.{i}.{new}"
            weight = state[f"{blocks}.{i}.{old}weight"]
            made[f"{at}weight"] = weight.T if weight.dim() == 2 else weight
            made[f"{at}bias"] = state.get(f"{blocks}.{i}.{old}bias", torch.zeros(len(weight)))
    if "lm_head.weight" in state:
        made["lm_head.weight"] = state["lm_head.weight"]
    return made
