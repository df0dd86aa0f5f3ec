"""OLMo's forward pass on its own names: OLMo 1, whose norms have no weights, OLMo 2, and Llama's shape.

Source of the formulas: allenai/OLMo, olmo/model.py, OLMoSequentialBlock. Rotary pairs are halves; ff_proj gives the
value first and the gate second; clip_qkv limits what att_proj gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .llama_meta import RMSNorm, attend
from .parts import Embedding, Linear, TiedHead, check_heads, length_of, taken
from .rotary import Rotary, rotary_table, rotate_halves

_KINDS: dict[type, tuple[str, ...]] = {
    int: ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"),
    float: ("norm_eps", "rope_theta", "clip_qkv"),
    bool: ("tied", "norm_weights", "norm_after", "norm_qk"),
    str: ("norm",),
}
Sizes = Mapping[str, Any]


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes = taken(dims, _KINDS)
    check_heads(sizes)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Olmo(sizes).eval()


class Plain(nn.Module):
    """LayerNorm without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The last dimension, centred and divided by its deviation."""
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps)


def _norm(sizes: Sizes, size: int) -> nn.Module:
    return RMSNorm(size, sizes["norm_eps"]) if sizes["norm"] == "rms" else Plain(sizes["norm_eps"])


class Olmo(nn.Module):
    """The whole model. The head's weight is one of its own only where the checkpoint has it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.context, self.rotary = sizes["context"], Rotary(sizes["head_dim"], sizes["rope_theta"])
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = Embedding(sizes["vocab"], sizes["hidden"])
        self.transformer["blocks"] = nn.ModuleList(Block(sizes) for _ in range(sizes["layers"]))
        self.transformer["ln_f"] = _norm(sizes, sizes["hidden"])
        head = TiedHead() if sizes["tied"] else Linear(sizes["hidden"], sizes["vocab"], bias=False)
        self.transformer["ff_out"] = head

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context)
        cos, sin = rotary_table(self.rotary, length)
        x = self.transformer["wte"](ids)
        for block in self.transformer["blocks"].children():
            x = block(x, cos, sin)
        x = self.transformer["ln_f"](x)
        head = self.transformer["ff_out"]
        return head(x, self.transformer["wte"].weight) if isinstance(head, TiedHead) else head(x)


class Block(nn.Module):
    """Attention and MLP, each added to the stream; norms stand before them, or after with ``norm_after``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.after, self.head_dim, self.clip = sizes["norm_after"], sizes["head_dim"], sizes["clip_qkv"]
        self.rows = [n * self.head_dim for n in (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])]
        self.normed = sizes["norm_qk"]
        if self.normed:
            self.q_norm, self.k_norm = _norm(sizes, self.rows[0]), _norm(sizes, self.rows[1])
        self.att_proj = Linear(sizes["hidden"], sum(self.rows), bias=False)
        self.attn_out = Linear(sizes["hidden"], sizes["hidden"], bias=False)
        self.ff_proj = Linear(sizes["hidden"], 2 * sizes["ffn"], bias=False)
        self.ff_out = Linear(sizes["ffn"], sizes["hidden"], bias=False)
        self.attn_norm, self.ff_norm = _norm(sizes, sizes["hidden"]), _norm(sizes, sizes["hidden"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        if self.after:
            x = x + self.attn_norm(self.attention(x, cos, sin))
            return x + self.ff_norm(self.mlp(x))
        x = x + self.attention(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.ff_norm(x))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal self-attention; query head h reads key/value head h // (H / K)."""
        qkv = self.att_proj(x)
        qkv = qkv.clamp(-self.clip, self.clip) if self.clip else qkv
        q, k, v = qkv.split(self.rows, dim=-1)
        q, k = (self.q_norm(q), self.k_norm(k)) if self.normed else (q, k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        return self.attn_out(attend(rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v))

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU; the value lies before the gate."""
        value, gate = self.ff_proj(x).chunk(2, dim=-1)
        return self.ff_out(functional.silu(gate) * value)
