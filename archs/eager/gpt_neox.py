"""GPT-NeoX's forward pass on the names of its own pipeline.

Source of every formula: EleutherAI/gpt-neox, megatron/model/transformer.py, positional_embeddings.py, activations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .llama_meta import attend
from .parts import Embedding, Linear, TiedHead, length_of, taken
from .rotary import Rotary, rotary_table, rotate_halves

Sizes = Mapping[str, Any]
_KINDS: dict[type, tuple[str, ...]] = {
    int: ("layers", "hidden", "heads", "head_dim", "ffn", "vocab", "context"),
    float: ("norm_eps", "rope_theta", "rotary_pct"),
    str: ("activation",),
    bool: ("tied", "parallel_residual", "new_names"),
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes = taken(dims, _KINDS)
    sizes["rotated"] = int(sizes["head_dim"] * sizes["rotary_pct"])
    if sizes["rotated"] % 2:
        raise input_error(f"a rotation of {sizes['rotated']} channels can't be built", "dims", "check rotary_pct")
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Pipeline(sizes).eval()


def _named(name: str, module: nn.Module) -> nn.Module:
    return nn.ModuleDict({name: module})


class Pipeline(nn.Module):
    """The whole model, by the numbers of its modules."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, last = sizes, sizes["layers"] + 3
        self.sequential = nn.ModuleDict()
        self.sequential["0"] = _named("word_embeddings", Embedding(sizes["vocab"], sizes["hidden"]))
        for i in range(sizes["layers"]):
            self.sequential[str(i + 2)] = Block(sizes)
        self.sequential[str(last)] = _named("norm", nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"]))
        head = TiedHead() if sizes["tied"] else Linear(sizes["hidden"], sizes["vocab"], bias=False)
        self.sequential[str(last + 1)] = _named("final_linear", head)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        sizes = self.sizes
        length = length_of(ids, sizes["context"])
        first, *blocks, last, end = self.sequential.values()
        words, head = first.get_submodule("word_embeddings"), end.get_submodule("final_linear")
        x = words(ids)
        table = rotary_table(Rotary(sizes["rotated"], sizes["rope_theta"], None), length)
        for block in blocks:
            x = block(x, *table)
        x = last.get_submodule("norm")(x)
        return head(x, words.weight) if isinstance(head, TiedHead) else head(x)


class Block(nn.Module):
    """Attention and MLP, one after the other or side by side, each behind a norm of its own."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.parallel = sizes["parallel_residual"]
        self.input_layernorm = nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"])
        self.attention = Attention(sizes)
        self.post_attention_layernorm = nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"])
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        after = x + self.attention(self.input_layernorm(x), cos, sin)
        return after + self.mlp(self.post_attention_layernorm(x if self.parallel else after))


class Attention(nn.Module):
    """Causal self-attention; query_key_value's rows lie head by head, [q k v]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.rotated = sizes["heads"], sizes["rotated"]
        self.query_key_value = Linear(sizes["hidden"], 3 * sizes["hidden"])
        self.dense = Linear(sizes["hidden"], sizes["hidden"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)  # [B, T, H, D]
        n = self.rotated
        q, k = (torch.cat((rotate_halves(t[..., :n], cos, sin), t[..., n:]), dim=-1) for t in (q, k))
        return self.dense(attend(q, k, v))


class MLP(nn.Module):
    """Up, GELU, down, under the names that the release had."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.names = ("linear1", "linear2") if sizes["new_names"] else ("dense_h_to_4h", "dense_4h_to_h")
        self.approximate = "tanh" if sizes["activation"] == "gelu_new" else "none"
        self.add_module(self.names[0], Linear(sizes["hidden"], sizes["ffn"]))
        self.add_module(self.names[1], Linear(sizes["ffn"], sizes["hidden"]))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        up, down = (self.get_submodule(name) for name in self.names)
        return down(functional.gelu(up(x), approximate=self.approximate))
