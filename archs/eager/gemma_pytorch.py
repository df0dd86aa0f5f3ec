"""gemma_pytorch's forward pass on its own names: Gemma 1, 2 and 3 without images.

Source of the formulas: google/gemma_pytorch, gemma/model.py. Embeddings are multiplied by sqrt(C), norms by 1 + weight,
rotary pairs are halves. Since Gemma 2 norms stand around both halves of a block, and most layers see a window; Gemma 3
norms q and k and rotates windowed layers by a base of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .litgpt import RMSNorm
from .llama_meta import attend
from .parts import Embedding, Linear, TiedHead, length_of, softcap, take
from .rotary import Rotary, rotary_table, rotate_halves

_INTEGERS = (
    *("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"),
    *("sliding_window", "attention_scalar", "full_every"),
)
_Sizes = dict[str, int]


class Style(Struct, frozen=True):
    """In what the generations differ, and the constants that are no sizes."""

    norm_eps: float
    norms_around: bool
    norm_qk: bool
    attention_softcap: float
    logit_softcap: float
    full: Rotary
    local: Rotary


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes = {name: take(dims, name, int) for name in _INTEGERS}
    if sizes["heads"] % sizes["kv_heads"] or sizes["head_dim"] % 2:
        what = f"{sizes['heads']} heads of {sizes['head_dim']} channels can't share {sizes['kv_heads']} key heads"
        raise input_error(what, "dims: heads, kv_heads", "check num_attention_heads")
    full = Rotary(sizes["head_dim"], take(dims, "rope_theta", float))
    local = full
    if take(dims, "generation", int) == 3:
        full = Rotary(full.head_dim, full.theta, factor=take(dims, "rope_factor", float))
        local = Rotary(full.head_dim, take(dims, "rope_local_theta", float))
    style = Style(
        norm_eps=take(dims, "norm_eps", float),
        norms_around=take(dims, "norms_around", bool),
        norm_qk=take(dims, "norm_qk", bool),
        attention_softcap=take(dims, "attention_softcap", float),
        logit_softcap=take(dims, "logit_softcap", float),
        full=full,
        local=local,
    )
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Gemma(sizes, style).eval()


class Gemma(nn.Module):
    """The whole model; its head is always the embedding."""

    def __init__(self, sizes: _Sizes, style: Style) -> None:
        super().__init__()
        self.context, self.style = sizes["context"], style
        self.embedder = Embedding(sizes["vocab"], sizes["hidden"])
        self.model = Stack(sizes, style)
        self.head = TiedHead()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context)
        tables = [rotary_table(rotary, length) for rotary in (self.style.full, self.style.local)]
        x = self.embedder(ids)
        x = x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype, device=x.device)
        for layer in self.model.layers:
            x = layer(x, *tables[bool(layer.get_submodule("self_attn").local)])
        logits = self.head(self.model.norm(x), self.embedder.weight)
        return softcap(logits, self.style.logit_softcap)


class Stack(nn.Module):
    """What the checkpoint calls the model: the blocks and the last norm, without the embedding."""

    def __init__(self, sizes: _Sizes, style: Style) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(sizes, style, i) for i in range(sizes["layers"]))
        self.norm = RMSNorm(sizes["hidden"], style.norm_eps, offset=True)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it, since Gemma 2 through another norm."""

    def __init__(self, sizes: _Sizes, style: Style, index: int) -> None:
        super().__init__()
        self.around = style.norms_around
        self.self_attn = Attention(sizes, style, index)
        self.mlp = FeedForward(sizes["hidden"], sizes["ffn"])
        self.input_layernorm = RMSNorm(sizes["hidden"], style.norm_eps, offset=True)
        self.post_attention_layernorm = RMSNorm(sizes["hidden"], style.norm_eps, offset=True)
        if self.around:
            self.pre_feedforward_layernorm = RMSNorm(sizes["hidden"], style.norm_eps, offset=True)
            self.post_feedforward_layernorm = RMSNorm(sizes["hidden"], style.norm_eps, offset=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        mixed = self.self_attn(self.input_layernorm(x), cos, sin)
        if not self.around:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Attention(nn.Module):
    """Causal self-attention, in a window in some layers; query head h reads key/value head h // (H / K)."""

    def __init__(self, sizes: _Sizes, style: Style, index: int) -> None:
        super().__init__()
        self.head_dim, self.scalar, self.cap = sizes["head_dim"], sizes["attention_scalar"], style.attention_softcap
        every = sizes["full_every"]
        self.local = not every or (index + 1) % every != 0
        self.window = sizes["sliding_window"] if self.local else 0
        self.rows = [n * self.head_dim for n in (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])]
        self.qkv_proj = Linear(sizes["hidden"], sum(self.rows), bias=False)
        self.o_proj = Linear(self.rows[0], sizes["hidden"], bias=False)
        self.normed = style.norm_qk
        if self.normed:
            self.query_norm = RMSNorm(self.head_dim, style.norm_eps, offset=True)
            self.key_norm = RMSNorm(self.head_dim, style.norm_eps, offset=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x).split(self.rows, dim=-1))
        if self.normed:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        return self.o_proj(attend(q, k, v, self.window, scalar=self.scalar, cap=self.cap))


class FeedForward(nn.Module):
    """The gate through the tanh form of GELU, times the value, and back."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn, bias=False)
        self.up_proj = Linear(hidden, ffn, bias=False)
        self.down_proj = Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
