"""The forward pass of a GPT made of torch's nn.TransformerEncoderLayer, with names of its author's around the layers.

Learned positions, norms before each half of a block and one behind the last. Source of the formulas: torch,
torch/nn/modules/transformer.py (TransformerEncoderLayer with norm_first) and torch/nn/functional.py
(multi_head_attention_forward).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .gpt import GELUS, Sizes, activation, attend, sizes_of
from .parts import LEARNED, Embedding, Linear, TiedHead, length_of, take


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) when a dim is missing, has the wrong
    type, or describes a model that this family can't be.
    """
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Model(sizes_of(dims, "TransformerEncoderLayer", ("relu", *GELUS)), dims).eval()


class Model(nn.Module):
    """The whole model. The head holds a weight of its own only where it differs from the embedding."""

    def __init__(self, sizes: Sizes, dims: Mapping[str, Value]) -> None:
        super().__init__()
        names = ("embedding", "blocks", "last_norm", "head")
        self.at = {name: take(dims, name, str).removesuffix(".weight") for name in names}
        self.context = sizes.context
        self.table = take(dims, "positions", str)
        shape = _shape(take(dims, "position_form", str), sizes)
        *path, leaf = self.table.split(".")
        _owner(self, path).register_parameter(leaf, nn.Parameter(torch.empty(shape)))
        norm = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=take(dims, "last_bias", bool))
        head = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)
        self._put("embedding", Embedding(sizes.vocab, sizes.hidden))
        self._put("blocks", nn.ModuleList(Layer(sizes) for _ in range(sizes.layers)))
        self._put("last_norm", norm)
        self._put("head", head)

    def _put(self, name: str, module: nn.Module) -> None:
        *path, leaf = self.at[name].split(".")
        owner = _owner(self, path)
        if leaf not in dict(owner.named_children()):  # a head that is the embedding's own module is there already
            owner.add_module(leaf, module)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context, LEARNED)
        table = self.get_parameter(self.table)
        embedding = self.get_submodule(self.at["embedding"])
        x = embedding(ids) + table.reshape(self.context, -1)[:length]
        for layer in self.get_submodule(self.at["blocks"]).children():
            x = layer(x)
        x = self.get_submodule(self.at["last_norm"])(x)
        head = self.get_submodule(self.at["head"])
        return head(x, embedding.weight) if isinstance(head, TiedHead) else head(x)


def _shape(form: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape in which positions are kept: [T, C], or with a 1 in the first or the second place."""
    shape = [sizes.context, sizes.hidden]
    if form != "rows":
        shape.insert(0 if form == "first" else 1, 1)
    return tuple(shape)


def _owner(root: nn.Module, path: list[str]) -> nn.Module:
    """The module at a path below ``root``, with empty ones on the way to it where there are none."""
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


class Layer(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn = Attention(sizes)
        self.linear1 = Linear(sizes.hidden, sizes.ffn, bias=sizes.bias)
        self.linear2 = Linear(sizes.ffn, sizes.hidden, bias=sizes.bias)
        self.norm1 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=sizes.bias)
        self.norm2 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=sizes.bias)
        self.activation = activation(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(self.activation(self.linear1(self.norm2(x))))


class Attention(nn.Module):
    """Causal self-attention, whose q, k and v are made by one matrix of torch's nn.MultiheadAttention."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * sizes.hidden, sizes.hidden))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * sizes.hidden)) if sizes.bias else None
        self.out_proj = Linear(sizes.hidden, sizes.hidden, bias=sizes.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        q, k, v = functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads))
