"""The forward pass of llm-foundry's mixtures of experts, DBRX above all, on its own names.

Norms before attention and before the experts, q, k and v clipped before they turn (rotary halves), and for each token
the experts of greatest probability, weighed by it, their weights' sum made one. Sources: mosaicml/llm-foundry,
llmfoundry/models/layers/{attention,blocks,dmoe}.py, and databricks/megablocks, layers/router.py and layers/glu.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Value
from .llama_meta import RMSNorm, attend
from .olmoe import Mixture
from .parts import Embedding, Linear, TiedHead, length_of, taken
from .rotary import Rotary, rotary_table, rotate_halves

Sizes = Mapping[str, Any]
_KINDS: dict[type, tuple[str, ...]] = {
    int: (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "vocab",
        "experts",
        "experts_per_token",
        "context",
    ),
    float: ("norm_eps", "rope_theta", "clip_qkv"),
    str: ("in_attn", "in_norm_1", "in_norm_2", "norm"),
    bool: ("tied",),
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing or of another type.
    """
    sizes = taken(dims, _KINDS)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Model(sizes).eval()


def _norm(sizes: Sizes) -> nn.Module:
    if sizes["norm"] == "rmsnorm":
        return RMSNorm(sizes["hidden"], sizes["norm_eps"])
    return nn.LayerNorm(sizes["hidden"], eps=sizes["norm_eps"], bias=False)


class Model(nn.Module):
    """Everything lies below ``transformer`` but the head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.rotary = sizes, Rotary(sizes["head_dim"], sizes["rope_theta"], None)
        self.transformer = nn.Module()
        self.transformer.wte = Embedding(sizes["vocab"], sizes["hidden"])
        self.transformer.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes["layers"]))
        self.transformer.norm_f = _norm(sizes)
        self.lm_head = TiedHead() if sizes["tied"] else Linear(sizes["hidden"], sizes["vocab"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        parts = self.transformer
        cos, sin = rotary_table(self.rotary, length_of(ids, self.sizes["context"]))
        x = parts.get_submodule("wte")(ids)
        for block in parts.get_submodule("blocks").children():
            x = block(x, cos, sin)
        x, head = parts.get_submodule("norm_f")(x), self.lm_head
        return head(x, parts.get_parameter("wte.weight")) if isinstance(head, TiedHead) else head(x)


class Block(nn.Module):
    """Attention and experts, each on the normalised stream, each added to it. A module of its own may hold the norms
    and attention (``fuse_norm_attn_norm``)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.names = [sizes["in_norm_1"], sizes["in_attn"], sizes["in_norm_2"]]
        made = (_norm(sizes), Attention(sizes), _norm(sizes))
        for path, module in zip(self.names, made, strict=True):
            around, _, name = path.rpartition(".")
            if around and not hasattr(self, around):
                self.add_module(around, nn.Module())
            self.get_submodule(around).add_module(name, module)
        self.ffn = Mixture(sizes, normalised=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        first, attention, second = map(self.get_submodule, self.names)
        x = x + attention(first(x), cos, sin)
        return x + self.ffn(second(x))


class Attention(nn.Module):
    """Causal self-attention; Wqkv's rows are all of q, then k, then v."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        kv = sizes["kv_heads"] * sizes["head_dim"]
        self.head_dim, self.parts, self.clip = sizes["head_dim"], [sizes["hidden"], kv, kv], sizes["clip_qkv"]
        self.Wqkv = Linear(sizes["hidden"], sum(self.parts), bias=False)
        self.out_proj = Linear(sizes["hidden"], sizes["hidden"], bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        fused = self.Wqkv(x)
        fused = fused.clamp(-self.clip, self.clip) if self.clip else fused
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in fused.split(self.parts, dim=-1))
        return self.out_proj(attend(rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v))
