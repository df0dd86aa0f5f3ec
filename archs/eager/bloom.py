"""BLOOM's forward pass on the names of its pipeline in Megatron-DeepSpeed.

Source of every formula: bigscience-workshop/Megatron-DeepSpeed, megatron/model/transformer.py, fused_bias_gelu.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .llama_meta import attend
from .parts import Embedding, Linear, TiedHead, length_of, taken

Sizes = Mapping[str, Any]
_KINDS: dict[type, tuple[str, ...]] = {
    int: ("layers", "hidden", "heads", "vocab", "context"),
    float: ("norm_eps",),
    str: ("activation",),
    bool: ("tied", "post_norm_residual"),
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing or has the wrong type.
    """
    sizes = taken(dims, _KINDS)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Pipeline(sizes).eval()


def slopes(heads: int) -> Tensor:
    """How fast each head forgets: 2^(-8/n), 2^(-16/n), … of n heads. Where n is no power of two, those of the power
    below it, and for the rest every second one of the power above."""

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (k + 1) / n) for k in range(n)]

    below = 2 ** math.floor(math.log2(heads))
    return torch.tensor([*of_power(below), *of_power(2 * below)[::2][: heads - below]], device="cpu")


class Pipeline(nn.Module):
    """The whole model, by the numbers of its modules."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, last = sizes, sizes["layers"] + 4
        self.sequential = nn.ModuleDict()
        self.sequential["1"] = nn.ModuleDict({"word_embeddings": Words(sizes)})
        for i in range(sizes["layers"]):
            self.sequential[str(i + 3)] = Block(sizes)
        self.sequential[str(last)] = nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"])
        head = TiedHead() if sizes["tied"] else Linear(sizes["hidden"], sizes["vocab"], bias=False)
        self.sequential[str(last + 1)] = nn.ModuleDict({"word_embeddings": head})

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.sizes["context"])
        first, *blocks, last, end = self.sequential.values()
        words, head = first.get_submodule("word_embeddings"), end.get_submodule("word_embeddings")
        x = words(ids)
        positions = torch.arange(length, dtype=x.dtype, device=x.device)
        alibi = slopes(self.sizes["heads"]).to(x)[:, None, None] * positions
        for block in blocks:
            x = block(x, alibi)
        x = last(x)
        return head(x, words.weight) if isinstance(head, TiedHead) else head(x)


class Words(Embedding):
    """The embedding, and the norm behind it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes["vocab"], sizes["hidden"])
        self.norm = nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"])

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding gives it
        """Token ids [B, T] to hidden states [B, T, C]."""
        return self.norm(super().forward(input))


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each added to the stream, or to what its norm made of it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.normed = sizes["post_norm_residual"]
        self.input_layernorm = nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"])
        self.self_attention = Attention(sizes)
        self.post_attention_layernorm = nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"])
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor, alibi: Tensor) -> Tensor:
        """Hidden states [B, T, C] and what is added to scores [H, 1, T] to hidden states."""
        normed = self.input_layernorm(x)
        x = (normed if self.normed else x) + self.self_attention(normed, alibi)
        normed = self.post_attention_layernorm(x)
        return (normed if self.normed else x) + self.mlp(normed)


class Attention(nn.Module):
    """Causal self-attention; query_key_value's rows lie head by head, [q k v]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes["heads"]
        self.query_key_value = Linear(sizes["hidden"], 3 * sizes["hidden"])
        self.dense = Linear(sizes["hidden"], sizes["hidden"])

    def forward(self, x: Tensor, alibi: Tensor) -> Tensor:
        """Hidden states [B, T, C] and what is added to scores [H, 1, T] to hidden states."""
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)  # [B, T, H, D]
        return self.dense(attend(q, k, v, added=alibi))


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.approximate = "tanh" if sizes["activation"] == "gelu_new" else "none"
        self.dense_h_to_4h = Linear(sizes["hidden"], 4 * sizes["hidden"])
        self.dense_4h_to_h = Linear(4 * sizes["hidden"], sizes["hidden"])

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x), approximate=self.approximate))
