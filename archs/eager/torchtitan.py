"""torchtitan's Llama 3 and Qwen3 under each of the names that they had: Meta's forward, with torch's own RMSNorm.

Sources: pytorch/torchtitan, models/{llama3,qwen3}/model/model.py of v0.2.2; models/{llama3,qwen3}/model.py and
models/common/{attention,rope,decoder}.py since. Qwen3 norms each head of q and k, and rotates halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from msgspec import Struct
from torch import Tensor, nn

from ..base import Value
from .llama_meta import Block as MetaBlock
from .llama_meta import Sizes, Transformer, attend, sizes_of
from .parts import Linear, take
from .rotary import rotate, rotate_halves


class Style(Struct, frozen=True):
    """Where q, k and v come from, and which model it is."""

    flat: bool
    fused: bool
    qwen: bool


def build(dims: Mapping[str, Value]) -> nn.Module:
    """Llama 3 without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    return _assemble(dims, qwen=False)


def build_qwen3(dims: Mapping[str, Value]) -> nn.Module:
    """Qwen3 without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    return _assemble(dims, qwen=True)


def _assemble(dims: Mapping[str, Value], *, qwen: bool) -> nn.Module:
    sizes = sizes_of(dims)
    style = Style(take(dims, "qkv_flat", bool), take(dims, "qkv_fused", bool), qwen)
    head = "output" if take(dims, "head_is_output", bool) else "lm_head"
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        norm = nn.RMSNorm(sizes.hidden, sizes.norm_eps)
        return Transformer(sizes, partial(Block, style=style), norm, head).eval()


class Block(MetaBlock):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes, *, style: Style) -> None:
        super().__init__(sizes)
        self.attention = Attention(sizes, style)
        self.attention_norm = nn.RMSNorm(sizes.hidden, sizes.norm_eps)
        self.ffn_norm = nn.RMSNorm(sizes.hidden, sizes.norm_eps)


class Attention(nn.Module):
    """Causal self-attention; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: Sizes, style: Style) -> None:
        super().__init__()
        self.flat, self.head_dim = style.flat, sizes.head_dim
        if style.flat:
            add_apart(self, sizes)
        else:
            self.qkv_linear = Fused(sizes) if style.fused else Apart(sizes)
        self.wo = Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)
        self.rotate = rotate_halves if style.qwen else rotate
        self.q_norm, self.k_norm = (
            nn.RMSNorm(sizes.head_dim, sizes.norm_eps) if style.qwen else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = apart(self, self.head_dim, x) if self.flat else self.qkv_linear(x)
        q, k = self.rotate(self.q_norm(q), cos, sin), self.rotate(self.k_norm(k), cos, sin)
        return self.wo(attend(q, k, v))


def add_apart(holder: nn.Module, sizes: Sizes) -> None:
    """Give a module one matrix each for queries, keys and values."""
    for name, heads in {"wq": sizes.heads, "wk": sizes.kv_heads, "wv": sizes.kv_heads}.items():
        holder.add_module(name, Linear(sizes.hidden, heads * sizes.head_dim, bias=False))


def apart(holder: nn.Module, head_dim: int, x: Tensor) -> tuple[Tensor, ...]:
    """Hidden states [B, T, C] to q [B, T, H, D], k and v [B, T, K, D], by the matrices of that module."""
    return tuple(holder.get_submodule(name)(x).unflatten(-1, (-1, head_dim)) for name in ("wq", "wk", "wv"))


class Apart(nn.Module):
    """Queries, keys and values by a matrix each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        add_apart(self, sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [B, T, C] to q [B, T, H, D], k and v [B, T, K, D]."""
        return apart(self, self.head_dim, x)


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
