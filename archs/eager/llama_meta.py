"""Llama's forward pass on the names of Meta's own checkpoints, which llama2.c shares.

RMSNorm before each half of a block, rotary positions on neighbouring pairs of channels, grouped key/value heads,
SwiGLU. Sources of the formulas: meta-llama/llama, llama3 and llama-models (model.py), karpathy/llama2.c (model.py).
Module paths and ``state_dict()`` keys are those of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .parts import Embedding, Linear, TiedHead, take


@dataclass(frozen=True)
class Scaling:
    """How Llama 3.1 and later stretch the slow rotations, so that a longer context stays within trained angles."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Rotary:
    """What the rotary table is computed from."""

    head_dim: int
    theta: float
    scaling: Scaling | None


@dataclass(frozen=True)
class Sizes:
    """What the model is built from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    tied: bool
    rotary: Rotary


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    head_dim = take(dims, "head_dim", int)
    sizes = Sizes(
        layers=take(dims, "layers", int),
        hidden=take(dims, "hidden", int),
        heads=take(dims, "heads", int),
        kv_heads=take(dims, "kv_heads", int),
        head_dim=head_dim,
        ffn=take(dims, "ffn", int),
        vocab=take(dims, "vocab", int),
        context=take(dims, "context", int),
        norm_eps=take(dims, "norm_eps", float),
        tied=take(dims, "tied", bool),
        rotary=Rotary(head_dim, take(dims, "rope_theta", float), _scaling(dims)),
    )
    _check(sizes)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Transformer(sizes).eval()


def _scaling(dims: Mapping[str, Value]) -> Scaling | None:
    kind = take(dims, "rope_scaling", str)
    if kind == "none":
        return None
    if kind != "llama3":
        raise input_error(
            f"the eager Llama has no rotary scaling {kind!r}", "dims: rope_scaling", "it must be none or llama3"
        )
    return Scaling(
        factor=take(dims, "rope_factor", float),
        low_freq_factor=take(dims, "rope_low_freq_factor", float),
        high_freq_factor=take(dims, "rope_high_freq_factor", float),
        original_context=take(dims, "rope_original_context", int),
    )


def _check(sizes: Sizes) -> None:
    if sizes.heads % sizes.kv_heads:
        raise input_error(
            f"{sizes.heads} query heads can't share {sizes.kv_heads} key heads evenly",
            "dims: heads, kv_heads",
            "check both numbers against params.json or model_args",
        )
    if sizes.head_dim % 2:
        raise input_error(
            f"a head of {sizes.head_dim} channels can't be rotated in pairs",
            "dims: head_dim",
            "check the number of heads that the checkpoint was trained with",
        )


def rotary_table(rotary: Rotary, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2] of the angle by which pair j is turned at position t: ``t · theta^(-2j/D)``.

    float32 on the CPU whatever the model's dtype and device: the rounding of the table is part of the model.
    With scaling, wavelengths beyond original_context / low_freq_factor are stretched by factor, those below
    original_context / high_freq_factor are kept, those between are blended (llama-models, models/llama3/model.py).
    """
    pairs = torch.arange(0, rotary.head_dim, 2, dtype=torch.float32, device="cpu")
    freqs = 1.0 / (rotary.theta ** (pairs / rotary.head_dim))
    if rotary.scaling is not None:
        freqs = stretched(freqs, rotary.scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), freqs)
    return angles.cos(), angles.sin()


def stretched(freqs: Tensor, scaling: Scaling) -> Tensor:
    """Angles per position [D/2], slowed down as :func:`rotary_table` says."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    waves = 2 * math.pi / freqs
    kept = (context / waves - low) / (high - low)
    blended = (1 - kept) * freqs / scaling.factor + kept * freqs
    ends = torch.where(waves > context / low, freqs / scaling.factor, freqs)
    return torch.where((waves >= context / high) & (waves <= context / low), blended, ends)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels (2j, 2j+1) of x [B, T, heads, D] by the table's angles [T, D/2].

    Computed in float32 at least, then cast back to the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.device, wide)[:, None, :], sin.to(x.device, wide)[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Transformer(nn.Module):
    """The whole model. ``output`` holds a weight of its own only where the checkpoint's does."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.context = sizes.context
        self.rotary = sizes.rotary
        self.tok_embeddings = Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.hidden, sizes.norm_eps)
        self.output = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = ids.shape[1]
        if length > self.context:
            raise input_error(
                f"{length} tokens do not fit a context of {self.context}", "input ids", "use a shorter prompt"
            )
        cos, sin = rotary_table(self.rotary, length)
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return self.output(x, self.tok_embeddings.weight) if isinstance(self.output, TiedHead) else self.output(x)


class RMSNorm(nn.Module):
    """Division by the root mean square in float32 at least; the weight multiplies after the cast back."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.feed_forward = FeedForward(sizes.hidden, sizes.ffn)
        self.attention_norm = RMSNorm(sizes.hidden, sizes.norm_eps)
        self.ffn_norm = RMSNorm(sizes.hidden, sizes.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    """Causal self-attention; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.group = sizes.heads // sizes.kv_heads
        self.wq = Linear(sizes.hidden, sizes.heads * sizes.head_dim, bias=False)
        self.wk = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.wv = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.wo = Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v.transpose(1, 2)))  # [B, H, T, D]
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill_(future, -math.inf).to(torch.promote_types(x.dtype, torch.float32))
        mixed = scores.softmax(dim=-1).to(x.dtype) @ v
        return self.wo(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w1 is the gate, w3 the value, w2 the way back."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden, ffn, bias=False)
        self.w2 = Linear(ffn, hidden, bias=False)
        self.w3 = Linear(hidden, ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))
