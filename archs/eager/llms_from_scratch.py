"""The forward pass of the book's GPTModel, on its own tensor names.

Learned positions, pre-norm blocks, q, k and v by three projections, GELU in the tanh form, no dropout at inference.
Source of the formulas: rasbt/LLMs-from-scratch, chapters 3 and 4 (the package llms-from-scratch, ch03.py and ch04.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .gpt import Sizes, activation, attend, positions, sizes_of
from .parts import Embedding, Linear, TiedHead, take


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) when a dim is missing, has the wrong
    type, or describes a model that GPTModel can't be.
    """
    sizes = replace(sizes_of(dims, "GPTModel"), bias=take(dims, "qkv_bias", bool))
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPTModel(sizes).eval()


class GPTModel(nn.Module):
    """The whole model. ``out_head`` holds a weight of its own only where it differs from the embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_emb = Embedding(sizes.vocab, sizes.hidden)
        self.pos_emb = Embedding(sizes.context, sizes.hidden)
        self.trf_blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.final_norm = LayerNorm(sizes)
        self.out_head = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        x = self.tok_emb(ids) + positions(self.pos_emb, ids.shape[1])
        x = self.final_norm(self.trf_blocks(x))
        return self.out_head(x, self.tok_emb.weight) if isinstance(self.out_head, TiedHead) else self.out_head(x)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.att = Attention(sizes)
        self.ff = FeedForward(sizes)
        self.norm1 = LayerNorm(sizes)
        self.norm2 = LayerNorm(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Attention(nn.Module):
    """Causal self-attention; biases of q, k and v are optional, that of the output is not."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.W_query = Linear(sizes.hidden, sizes.hidden, bias=sizes.bias)
        self.W_key = Linear(sizes.hidden, sizes.hidden, bias=sizes.bias)
        self.W_value = Linear(sizes.hidden, sizes.hidden, bias=sizes.bias)
        self.out_proj = Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.out_proj(attend(self.W_query(x), self.W_key(x), self.W_value(x), self.heads))


class FeedForward(nn.Module):
    """Up, GELU, down."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        up, down = Linear(sizes.hidden, sizes.ffn), Linear(sizes.ffn, sizes.hidden)
        self.layers = nn.Sequential(up, activation(sizes), down)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.layers(x)


class LayerNorm(nn.Module):
    """The norm over channels with its biased variance, whose weight and bias are called scale and shift."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.eps = sizes.norm_eps
        self.scale = nn.Parameter(torch.empty(sizes.hidden))
        self.shift = nn.Parameter(torch.empty(sizes.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] to the same shape."""
        return functional.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)
