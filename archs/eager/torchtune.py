"""torchtune's decoders on their own names: Llama's forward with options for Qwen2, Qwen3 and Gemma.

Sources: meta-pytorch/torchtune 0.6.1 and, for Qwen3, bd2a0fc, models/*/_component_builders.py and
modules/{transformer,attention}.py. Llama and Mistral rotate neighbouring pairs of channels, Phi-3 and Qwen halves.
Qwen3 norms each head of q and k before that. Gemma multiplies embeddings by sqrt(C), its norms by 1 + scale, and its
activation is the tanh form of GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .llama_meta import FeedForward, Sizes, Transformer, attend, sizes_of
from .parts import Linear, take
from .rotary import rotate, rotate_halves


class Style(Struct, frozen=True):
    """In what the families differ."""

    interleaved: bool
    bias: bool = False
    gemma: bool = False
    qk_norm: bool = False


def build(dims: Mapping[str, Value]) -> nn.Module:
    """Llama, Mistral, Phi-3 without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    return _assemble(dims, Style(take(dims, "interleaved", bool)))


def build_qwen2(dims: Mapping[str, Value]) -> nn.Module:
    """Qwen2 and Qwen2.5 without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    return _assemble(dims, Style(interleaved=False, bias=True))


def build_qwen3(dims: Mapping[str, Value]) -> nn.Module:
    """Qwen3 without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    return _assemble(dims, Style(interleaved=False, qk_norm=True))


def build_gemma(dims: Mapping[str, Value]) -> nn.Module:
    """Gemma without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    return _assemble(dims, Style(interleaved=True, gemma=True))


def _assemble(dims: Mapping[str, Value], style: Style) -> nn.Module:
    sizes = sizes_of(dims)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Decoder(sizes, style).eval()


class Decoder(Transformer):
    """The whole model."""

    def __init__(self, sizes: Sizes, style: Style) -> None:
        super().__init__(sizes, partial(Block, style=style), Norm(sizes.hidden, sizes, style))
        self.scale = sizes.hidden**0.5 if style.gemma else None

    def embedded(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to the hidden states [B, T, C] that the first block is given."""
        x = self.tok_embeddings(ids)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)


class Norm(nn.Module):
    """Division by the root mean square, times the scale, in float32 at least; Gemma's scale is stored less 1."""

    def __init__(self, width: int, sizes: Sizes, style: Style) -> None:
        super().__init__()
        self.eps, self.offset = sizes.norm_eps, 1.0 if style.gemma else 0.0
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (self.offset + self.scale.to(wide.dtype))).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes, style: Style) -> None:
        super().__init__()
        self.attn = Attention(sizes, style)
        activation = partial(functional.gelu, approximate="tanh") if style.gemma else functional.silu
        self.mlp = FeedForward(sizes.hidden, sizes.ffn, activation)
        self.sa_norm = Norm(sizes.hidden, sizes, style)
        self.mlp_norm = Norm(sizes.hidden, sizes, style)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        x = x + self.attn(self.sa_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: Sizes, style: Style) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.rotate = rotate if style.interleaved else rotate_halves
        self.q_proj = Linear(sizes.hidden, sizes.heads * sizes.head_dim, bias=style.bias)
        self.k_proj = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=style.bias)
        self.v_proj = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=style.bias)
        self.output_proj = Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)
        self.q_norm, self.k_norm = (
            Norm(sizes.head_dim, sizes, style) if style.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(self.q_norm(q), cos, sin), self.rotate(self.k_norm(k), cos, sin)
        return self.output_proj(self.mixed(q, k, v))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [B, T, H, D] and k, v [B, T, K, D] to what the heads gather [B, T, H·D]."""
        return attend(q, k, v)
