"""OLMo-core's forward pass on its own names: RMSNorm before or after each half, rotary halves, SwiGLU.

Source of the formulas: allenai/OLMo-core, nn/transformer/block.py, nn/attention/__init__.py and nn/rope.py. Norms
multiply by their weight in float32; q and k are normed as a whole or by head, before the rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import input_error
from ..base import Value
from .litgpt import RMSNorm
from .llama_meta import FeedForward, attend
from .parts import Embedding, Linear, TiedHead, check_heads, length_of, take, taken
from .rotary import Rotary, Scaling, Yarn, rotary_table, rotate_halves

_KINDS: dict[type, tuple[str, ...]] = {
    int: ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"),
    float: ("norm_eps",),
    bool: ("tied", "norms_after", "norm_qk", "norm_qk_whole"),
}
Sizes = Mapping[str, Any]


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes = taken(dims, _KINDS)
    check_heads(sizes)
    windows = dims.get("windows")
    if not isinstance(windows, list) or len(windows) != sizes["layers"]:
        raise input_error(f"windows is {windows!r}, not one number per layer", "dims: windows")
    rotaries = [rotary_of(dims.get(name), sizes["head_dim"]) for name in ("rope", "rope_local")]
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Transformer(sizes, cast("list[int]", windows), rotaries).eval()


def rotary_of(rope: object, head_dim: int) -> Rotary:
    """What the rotary table is computed from, of rope_parameters as transformers spells them."""
    table = cast("dict[str, Any]", rope) if isinstance(rope, dict) else {}
    kind, theta = table.get("rope_type"), take(table, "rope_theta", float)
    if kind == "linear":
        return Rotary(head_dim, theta, factor=take(table, "factor", float))
    original = table.get("original_max_position_embeddings", 0)
    if kind == "llama3":
        return Rotary(
            head_dim, theta, Scaling(table["factor"], table["low_freq_factor"], table["high_freq_factor"], original)
        )
    if kind == "yarn":
        return Rotary(head_dim, theta, yarn=Yarn(table["factor"], table["beta_fast"], table["beta_slow"], original))
    if kind != "default":
        raise input_error(f"the eager OLMo-core has no rotary scaling {kind!r}", "dims: rope")
    return Rotary(head_dim, theta)


class Transformer(nn.Module):
    """The whole model."""

    def __init__(self, sizes: Sizes, windows: list[int], rotaries: list[Rotary]) -> None:
        super().__init__()
        self.context, self.rotaries = sizes["context"], rotaries
        self.embeddings = Embedding(sizes["vocab"], sizes["hidden"])
        self.blocks = nn.ModuleList(Block(sizes, window) for window in windows)
        self.lm_head = Head(sizes)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context)
        tables = [rotary_table(rotary, length) for rotary in self.rotaries]
        x = self.embeddings(ids)
        for block in self.blocks:
            x = block(x, *tables[bool(block.get_submodule("attention").window)])
        return self.lm_head(x, self.embeddings.weight)


class Head(nn.Module):
    """The last norm and the projection, by the embedding where that is the head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = RMSNorm(sizes["hidden"], sizes["norm_eps"], offset=False)
        self.w_out = TiedHead() if sizes["tied"] else Linear(sizes["hidden"], sizes["vocab"], bias=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the embedding [V, C] to logits [B, T, V]."""
        x = self.norm(x)
        return self.w_out(x, embedding) if isinstance(self.w_out, TiedHead) else self.w_out(x)


class Block(nn.Module):
    """Attention and MLP, each added to the stream; norms stand before them, or after in ``reordered_norm``."""

    def __init__(self, sizes: Sizes, window: int) -> None:
        super().__init__()
        self.after = sizes["norms_after"]
        self.attention = Attention(sizes, window)
        self.attention_norm = RMSNorm(sizes["hidden"], sizes["norm_eps"], offset=False)
        self.feed_forward = FeedForward(sizes["hidden"], sizes["ffn"])
        self.feed_forward_norm = RMSNorm(sizes["hidden"], sizes["norm_eps"], offset=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        if self.after:
            x = x + self.attention_norm(self.attention(x, cos, sin))
            return x + self.feed_forward_norm(self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Attention(nn.Module):
    """Causal self-attention, in a window where there is one; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: Sizes, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = sizes["head_dim"], window
        rows, kv = sizes["heads"] * self.head_dim, sizes["kv_heads"] * self.head_dim
        self.w_q = Linear(sizes["hidden"], rows, bias=False)
        self.w_k = Linear(sizes["hidden"], kv, bias=False)
        self.w_v = Linear(sizes["hidden"], kv, bias=False)
        self.w_out = Linear(rows, sizes["hidden"], bias=False)
        self.whole, self.normed = sizes["norm_qk_whole"], sizes["norm_qk"]
        if self.normed:
            self.q_norm = RMSNorm(rows if self.whole else self.head_dim, sizes["norm_eps"], offset=False)
            self.k_norm = RMSNorm(kv if self.whole else self.head_dim, sizes["norm_eps"], offset=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = self.w_q(x), self.w_k(x), self.w_v(x)
        if self.normed and self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.normed and not self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.w_out(attend(rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v, self.window))
