"""The forward pass of x-transformers' Decoder with rotary positions, RMSNorm and a gated SiLU, on its own tensor names.

Source of the formulas: lucidrains/x-transformers 2.31.10, x_transformers.py (TransformerWrapper, Attention,
FeedForward, GLU, RMSNorm, RotaryEmbedding), and attend.py for which key head a query head reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .llama_meta import attend
from .parts import Embedding, Linear, length_of, take
from .rotary import Rotary, rotary_table, rotate


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) when a dim is missing or has
    the wrong type.
    """
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Wrapper(dims).eval()


class Wrapper(nn.Module):
    """TransformerWrapper: the embedding, the layers, the head."""

    def __init__(self, dims: Mapping[str, Value]) -> None:
        super().__init__()
        hidden, vocab = take(dims, "hidden", int), take(dims, "vocab", int)
        self.context = take(dims, "context", int)
        self.rotary = Rotary(take(dims, "rotary", int), take(dims, "rope_theta", float), None)
        self.token_emb = nn.Module()
        self.token_emb.emb = Embedding(vocab, hidden)
        self.attn_layers = Layers(dims)
        self.to_logits = Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context)
        cos, sin = rotary_table(self.rotary, length)
        return self.to_logits(self.attn_layers(self.token_emb.get_submodule("emb")(ids), cos, sin))


class Layers(nn.Module):
    """Attention and feed-forward in turn, each on the normalised stream, each added to it; and a norm."""

    def __init__(self, dims: Mapping[str, Value]) -> None:
        super().__init__()
        kinds = (Attention, FeedForward) * take(dims, "layers", int)
        self.layers = nn.ModuleList(nn.ModuleList([nn.ModuleList([RMSNorm(dims)]), kind(dims)]) for kind in kinds)
        self.final_norm = RMSNorm(dims)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        for layer in self.layers:
            x = x + layer.get_submodule("1")(layer.get_submodule("0.0")(x), cos, sin)
        return self.final_norm(x)


class RMSNorm(nn.Module):
    """Division by the length, times the root of the width and ``g``, which may count from one."""

    def __init__(self, dims: Mapping[str, Value]) -> None:
        super().__init__()
        self.offset = float(take(dims, "unit_offset", bool))
        self.g = nn.Parameter(torch.empty(take(dims, "hidden", int)))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (self.g + self.offset)


class Attention(nn.Module):
    """Causal self-attention; query head h reads key/value head h mod K. The first R channels of a head turn."""

    def __init__(self, dims: Mapping[str, Value]) -> None:
        super().__init__()
        hidden, self.size = take(dims, "hidden", int), take(dims, "head_dim", int)
        heads, kv = take(dims, "heads", int), take(dims, "kv_heads", int)
        self.repeat = heads // kv
        self.to_q = Linear(hidden, heads * self.size, bias=False)
        self.to_k = Linear(hidden, kv * self.size, bias=False)
        self.to_v = Linear(hidden, kv * self.size, bias=False)
        self.to_out = Linear(heads * self.size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        q, k, v = (w(x).unflatten(-1, (-1, self.size)) for w in (self.to_q, self.to_k, self.to_v))
        q, k = (
            torch.cat([rotate(t[..., : 2 * cos.shape[1]], cos, sin), t[..., 2 * cos.shape[1] :]], -1) for t in (q, k)
        )
        k, v = (t.repeat(1, 1, self.repeat, 1) for t in (k, v))
        return self.to_out(attend(q, k, v))


class FeedForward(nn.Module):
    """One projection to the value and its gate, which goes through SiLU; and the way back."""

    def __init__(self, dims: Mapping[str, Value]) -> None:
        super().__init__()
        hidden, ffn = take(dims, "hidden", int), take(dims, "ffn", int)
        gated = nn.Module()
        gated.proj = Linear(hidden, 2 * ffn)
        self.ff = nn.ModuleList([gated, nn.Identity(), Linear(ffn, hidden, bias=take(dims, "down_bias", bool))])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape; the table is not looked at."""
        up, gate = self.ff.get_submodule("0.proj")(x).chunk(2, dim=-1)
        return self.ff.get_submodule("2")(up * functional.silu(gate))
