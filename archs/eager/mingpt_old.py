"""The forward pass of minGPT before June 2022, on its own tensor names.

Learned positions in a parameter, pre-norm blocks, q, k and v by three projections with biases, exact GELU, no dropout
at inference. Source of the formulas: karpathy/minGPT, mingpt/model.py at 3ed14b2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Value
from .gpt import Sizes, activation, attend, positions, sizes_of
from .parts import Embedding, Linear, TiedHead


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) when a dim is missing, has the wrong
    type, or describes a model that minGPT can't be.
    """
    sizes = sizes_of(dims, "minGPT")
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPT(sizes).eval()


class GPT(nn.Module):
    """The whole model. ``head`` holds a weight of its own only where it differs from the embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_emb = Embedding(sizes.vocab, sizes.hidden)
        self.pos_emb = nn.Parameter(torch.empty(1, sizes.context, sizes.hidden))
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.ln_f = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps)
        self.head = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        x = self.tok_emb(ids) + positions(self.pos_emb, ids.shape[1])
        x = self.ln_f(self.blocks(x))
        return self.head(x, self.tok_emb.weight) if isinstance(self.head, TiedHead) else self.head(x)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps)
        self.ln2 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps)
        self.attn = Attention(sizes)
        up, down = Linear(sizes.hidden, sizes.ffn), Linear(sizes.ffn, sizes.hidden)
        self.mlp = nn.Sequential(up, activation(sizes), down)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Attention(nn.Module):
    """Causal self-attention whose q, k and v have a projection each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.key = Linear(sizes.hidden, sizes.hidden)
        self.query = Linear(sizes.hidden, sizes.hidden)
        self.value = Linear(sizes.hidden, sizes.hidden)
        self.proj = Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.proj(attend(self.query(x), self.key(x), self.value(x), self.heads))
