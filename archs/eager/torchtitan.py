"""torchtitan's Llama 3 under each of the names that it had: Meta's forward, with torch's own RMSNorm.

Sources: pytorch/torchtitan, models/llama3/model/model.py of v0.2.2; models/llama3/model.py and
models/common/{attention,rope,decoder}.py since.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..base import Value
from .llama_meta import Block as MetaBlock
from .llama_meta import Sizes, Transformer, attend, sizes_of
from .parts import Linear, take
from .rotary import rotate


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    sizes = sizes_of(dims)
    fused = take(dims, "qkv_fused", bool)
    block = Block if take(dims, "qkv_flat", bool) else partial(LinearBlock, fused=fused)
    head = "output" if take(dims, "head_is_output", bool) else "lm_head"
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Transformer(sizes, block, nn.RMSNorm(sizes.hidden, sizes.norm_eps), head).eval()


class Block(MetaBlock):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.attention_norm = nn.RMSNorm(sizes.hidden, sizes.norm_eps)
        self.ffn_norm = nn.RMSNorm(sizes.hidden, sizes.norm_eps)


class LinearBlock(Block):
    """The same with q, k and v in a module of their own."""

    def __init__(self, sizes: Sizes, *, fused: bool) -> None:
        super().__init__(sizes)
        self.attention = Attention(sizes, fused=fused)


class Attention(nn.Module):
    """Causal self-attention; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: Sizes, *, fused: bool) -> None:
        super().__init__()
        self.qkv_linear = Fused(sizes) if fused else Apart(sizes)
        self.wo = Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = self.qkv_linear(x)
        return self.wo(attend(rotate(q, cos, sin), rotate(k, cos, sin), v))


class Apart(nn.Module):
    """Queries, keys and values by a matrix each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.wq = Linear(sizes.hidden, sizes.heads * sizes.head_dim, bias=False)
        self.wk = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.wv = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [B, T, C] to q [B, T, H, D], k and v [B, T, K, D]."""
        return tuple(w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))


class Fused(nn.Module):
    """The same by one matrix: for each key head its queries, then the key, then the value."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim, self.group = sizes.head_dim, sizes.heads // sizes.kv_heads
        self.wqkv = Linear(sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [B, T, C] to q [B, T, H, D], k and v [B, T, K, D]."""
        groups = self.wqkv(x).unflatten(-1, (-1, self.group + 2, self.head_dim))
        return tuple(part.flatten(-3, -2) for part in groups.split([self.group, 1, 1], dim=-2))
