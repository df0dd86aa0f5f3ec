"""The forward pass of the lecture's gpt.py, on its own tensor names, with a head that has no bias.

Learned positions, pre-norm blocks, a module for every head, ReLU, no dropout at inference. Source of the formulas:
karpathy/ng-video-lecture, gpt.py since 988848a, where q·k is scaled by head_size^-0.5.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Value
from .gpt import GELUS, Sizes, activation, attend, positions, sizes_of
from .parts import Embedding, Linear, TiedHead


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) when a dim is missing, has the wrong
    type, or describes a model that gpt.py can't be.
    """
    sizes = sizes_of(dims, "gpt.py", ("relu", *GELUS))
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPTLanguageModel(sizes).eval()


class GPTLanguageModel(nn.Module):
    """The whole model. ``lm_head`` holds a weight of its own only where it differs from the embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.token_embedding_table = Embedding(sizes.vocab, sizes.hidden)
        self.position_embedding_table = Embedding(sizes.context, sizes.hidden)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.ln_f = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps)
        self.lm_head = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        table = self.token_embedding_table
        x = table(ids) + positions(self.position_embedding_table, ids.shape[1])
        x = self.ln_f(self.blocks(x))
        return self.lm_head(x, table.weight) if isinstance(self.lm_head, TiedHead) else self.lm_head(x)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sa = MultiHeadAttention(sizes)
        self.ffwd = FeedForward(sizes)
        self.ln1 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps)
        self.ln2 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class MultiHeadAttention(nn.Module):
    """Heads side by side, and a projection of them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(sizes) for _ in range(sizes.heads))
        self.proj = Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class Head(nn.Module):
    """One head of causal self-attention, without biases."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        size = sizes.hidden // sizes.heads
        self.key = Linear(sizes.hidden, size, bias=False)
        self.query = Linear(sizes.hidden, size, bias=False)
        self.value = Linear(sizes.hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to this head's part [B, T, D]."""
        return attend(self.query(x), self.key(x), self.value(x), 1)


class FeedForward(nn.Module):
    """Up, ReLU, down."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        up, down = Linear(sizes.hidden, sizes.ffn), Linear(sizes.ffn, sizes.hidden)
        self.net = nn.Sequential(up, activation(sizes), down)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.net(x)
