"""Llama's forward pass on the names of Meta's own checkpoints, which llama2.c and Mistral's code share.

RMSNorm before each half of a block, rotary positions on neighbouring pairs of channels, grouped key/value heads,
SwiGLU. Sources of the formulas: meta-llama/llama, llama3 and llama-models (model.py), karpathy/llama2.c (model.py).
Module paths and ``state_dict()`` keys are those of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .parts import Embedding, Linear, TiedHead, length_of, softcap, take
from .rotary import Rotary, Scaling, rotary_table, rotate


class Sizes(Struct, frozen=True):
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
    window: int = 0
    """How many positions one sees, itself included; 0 for all before it."""


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    return assemble(sizes_of(dims))


def sizes_of(dims: Mapping[str, Value]) -> Sizes:
    """What the model is built from, read from the dims and checked. Raises MdlError (INPUT)."""
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
    return sizes


def assemble(sizes: Sizes, block: Callable[[Sizes], nn.Module] | None = None) -> nn.Module:
    """The model of these blocks, :class:`Block` if none is given, on the meta device."""
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Transformer(sizes, block or Block, RMSNorm(sizes.hidden, sizes.norm_eps)).eval()


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


class Transformer(nn.Module):
    """The whole model. The head, by the name that the checkpoint has for it, holds a weight of its own only where the
    checkpoint's does."""

    def __init__(
        self, sizes: Sizes, block: Callable[[Sizes], nn.Module], norm: nn.Module, head: str = "output"
    ) -> None:
        super().__init__()
        self.context = sizes.context
        self.rotary = sizes.rotary
        self.tok_embeddings = Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(block(sizes) for _ in range(sizes.layers))
        self.norm = norm
        self.head_name = head
        self.add_module(head, TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context)
        cos, sin = rotary_table(self.rotary, length)
        x = self.embedded(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        head = self.get_submodule(self.head_name)
        return head(x, self.tok_embeddings.weight) if isinstance(head, TiedHead) else head(x)

    def embedded(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to the hidden states [B, T, C] that the first block is given."""
        return self.tok_embeddings(ids)


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
    """Attention and MLP, each on the normalised stream, each added to it.

    ``mlp`` maps hidden states [B, T, C] to the same shape, under the name that the checkpoint has for it.
    """

    def __init__(self, sizes: Sizes, mlp: nn.Module | None = None, name: str = "feed_forward") -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.mlp_name = name
        self.add_module(name, mlp or FeedForward(sizes.hidden, sizes.ffn))
        self.attention_norm = RMSNorm(sizes.hidden, sizes.norm_eps)
        self.ffn_norm = RMSNorm(sizes.hidden, sizes.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.get_submodule(self.mlp_name)(self.ffn_norm(x))


class Attention(nn.Module):
    """Causal self-attention, in a window where there is one; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.window = sizes.window
        self.wq = Linear(sizes.hidden, sizes.heads * sizes.head_dim, bias=False)
        self.wk = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.wv = Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim, bias=False)
        self.wo = Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.wo(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.window))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    *,
    scalar: float = 0.0,
    cap: float = 0.0,
    added: Tensor | None = None,
) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v of rotated q [B, T, H, D] and of k, v [B, T, K, D], as [B, T, H·D].

    A query sees the last ``window`` positions, its own included; all before it where that is 0. ``scalar`` stands in
    D's place where it is not 0, ``cap`` limits the scores where it is not, and ``added`` [H, 1, T] is added to them.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))  # [B, H, T, D]
    scores = softcap(q @ k.transpose(-2, -1) / math.sqrt(scalar or q.shape[-1]), cap)
    scores = scores if added is None else scores + added
    every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    unseen = every.triu(1) | every.tril(-window) if window else every.triu(1)
    scores = scores.masked_fill_(unseen, -math.inf).to(torch.promote_types(q.dtype, torch.float32))
    return (scores.softmax(dim=-1).to(q.dtype) @ v).transpose(1, 2).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU, or its like with another activation: w1 is the gate, w3 the value, w2 the way back."""

    def __init__(self, hidden: int, ffn: int, activation: Callable[[Tensor], Tensor] = functional.silu) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = Linear(hidden, ffn, bias=False)
        self.w2 = Linear(ffn, hidden, bias=False)
        self.w3 = Linear(hidden, ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.w2(self.activation(self.w1(x)) * self.w3(x))
