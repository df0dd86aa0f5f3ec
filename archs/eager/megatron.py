"""megatron-core's GPTModel on the CPU: Llama, Qwen 2 and 3, GPT-2 and GPT-NeoX without parallel residuals.

Source of every formula: NVIDIA/Megatron-LM, megatron/core/models/gpt and megatron/core/transformer. Module paths and
``state_dict()`` keys are those of its checkpoints, with norms of their own or inside the matrix behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .gpt import positions
from .llama_meta import attend
from .parts import Embedding, Linear, TiedHead, length_of, take, taken
from .rotary import Scaling, rotate, rotate_halves, stretched

Sizes = Mapping[str, Any]
"""The family's dims, as archs/megatron.py settles them; what their types are is checked by :func:`sizes_of`."""
_KINDS: dict[type, tuple[str, ...]] = {
    int: ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"),
    float: ("norm_eps", "rope_theta", "rotary_percent"),
    str: ("norm", "position", "activation", "rope_scaling"),
    bool: ("tied", "fused_norms", "qkv_bias", "linear_bias", "qk_norm", "gated", "interleaved"),
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPT(sizes_of(dims)).eval()


def sizes_of(dims: Mapping[str, Value]) -> Sizes:
    """The dims with their types checked. Raises MdlError (INPUT)."""
    sizes: dict[str, Any] = {**dims, **taken(dims, _KINDS)}
    if sizes["heads"] % sizes["kv_heads"] or rotated(sizes) % 2:
        what = f"{sizes['heads']} heads of {sizes['kv_heads']} groups, or a rotation of {rotated(sizes)} channels"
        raise input_error(f"{what}, can't be built", "dims", "check num_attention_heads and rotary_percent")
    return sizes


def rotated(sizes: Sizes) -> int:
    """How many channels of each head rotary positions turn."""
    share: float = sizes["rotary_percent"]
    return int(sizes["head_dim"] * share) if share < 1 else int(sizes["head_dim"])


def rotary_table(sizes: Sizes, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R/2] of the angles ``t · theta^(-2j/R)``, stretched as rope_scaling says.

    float32 on the CPU whatever the model's dtype and device: the rounding of the table is part of the model.
    """
    size = rotated(sizes)
    freqs = 1.0 / sizes["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    at = torch.arange(length, dtype=torch.float32, device="cpu")
    if sizes["rope_scaling"] == "linear":
        at = at * (1 / take(sizes, "rope_factor", float))
    elif sizes["rope_scaling"] == "llama3":
        factor, low, high = (take(sizes, f"rope_{key}factor", float) for key in ("", "low_freq_", "high_freq_"))
        freqs = stretched(freqs, Scaling(factor, low, high, take(sizes, "rope_original_context", int)))
    angles = torch.outer(at, freqs)
    return angles.cos(), angles.sin()


class Norm(nn.Module):
    """LayerNorm or RMSNorm of the last dimension, in float32 at least."""

    def __init__(self, sizes: Sizes, size: int) -> None:
        super().__init__()
        self.eps = sizes["norm_eps"]
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if sizes["norm"] == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return normed(x, self.weight, self.bias, self.eps)


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or LayerNorm where there is a bias."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        return functional.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


class NormedLinear(Linear):
    """A matrix that holds the norm before it, as Transformer Engine's LayerNormLinear does."""

    def __init__(self, sizes: Sizes, width: int, rows: int, *, bias: bool) -> None:
        super().__init__(width, rows, bias=bias)
        self.eps = sizes["norm_eps"]
        self.layer_norm_weight = nn.Parameter(torch.empty(width))
        self.layer_norm_bias = nn.Parameter(torch.empty(width)) if sizes["norm"] == "LayerNorm" else None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """Hidden states [B, T, C] to [B, T, rows]."""
        return super().forward(normed(input, self.layer_norm_weight, self.layer_norm_bias, self.eps))


def _up(sizes: Sizes, rows: int, *, bias: bool) -> nn.Module:
    if sizes["fused_norms"]:
        return NormedLinear(sizes, sizes["hidden"], rows, bias=bias)
    return Linear(sizes["hidden"], rows, bias=bias)


class GPT(nn.Module):
    """The whole model. ``output_layer`` holds a weight of its own only where it is not the embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.ModuleDict({"word_embeddings": Embedding(sizes["vocab"], sizes["hidden"])})
        if sizes["position"] == "learned_absolute":
            self.embedding["position_embeddings"] = Embedding(sizes["context"], sizes["hidden"])
        self.decoder = nn.ModuleDict({"layers": self.layers(sizes), "final_layernorm": Norm(sizes, sizes["hidden"])})
        self.output_layer = TiedHead() if sizes["tied"] else Linear(sizes["hidden"], sizes["vocab"], bias=False)

    def layers(self, sizes: Sizes) -> nn.Module:
        """The modules that hold the layers' weights."""
        return nn.ModuleList(self.one(sizes, number) for number in range(sizes["layers"]))

    def one(self, sizes: Sizes, number: int) -> Block:
        """The block of one layer."""
        return Block(sizes)

    def run(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Hidden states [B, T, C] through all layers."""
        for block in self.decoder["layers"]:  # type: ignore[attr-defined]  # a ModuleList
            x = block(x, table)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        sizes = self.sizes
        length = length_of(ids, sizes["context"])
        words = self.embedding["word_embeddings"]
        x = words(ids)
        if sizes["position"] == "learned_absolute":
            x = x + positions(self.embedding["position_embeddings"], length)  # type: ignore[arg-type]  # an Embedding
        table = rotary_table(sizes, length) if sizes["position"] == "rope" else None
        x = self.decoder["final_layernorm"](self.run(x, table))
        return self.output_layer(x, words.weight) if isinstance(self.output_layer, TiedHead) else self.output_layer(x)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        fused = sizes["fused_norms"]
        self.input_layernorm = nn.Identity() if fused else Norm(sizes, sizes["hidden"])
        self.self_attention = Attention(sizes)
        self.pre_mlp_layernorm = nn.Identity() if fused else Norm(sizes, sizes["hidden"])
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2], if there is one, to hidden states."""
        x = x + self.self_attention(self.input_layernorm(x), table)
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Attention(nn.Module):
    """Causal self-attention; linear_qkv's rows lie group by group, [q … q k v] for each key head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.groups, self.size = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.rotated, self.turn = rotated(sizes), rotate if sizes["interleaved"] else rotate_halves
        self.linear_qkv = _up(sizes, (self.heads + 2 * self.groups) * self.size, bias=sizes["qkv_bias"])
        self.linear_proj = Linear(self.heads * self.size, sizes["hidden"], bias=sizes["linear_bias"])
        self.q_layernorm = Norm(sizes, self.size) if sizes["qk_norm"] else nn.Identity()
        self.k_layernorm = Norm(sizes, self.size) if sizes["qk_norm"] else nn.Identity()

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2], if there is one, to hidden states."""
        per = self.heads // self.groups
        grouped = self.linear_qkv(x).unflatten(-1, (self.groups, per + 2, self.size))
        q, k, v = (t.flatten(2, 3) for t in grouped.split((per, 1, 1), dim=-2))  # [B, T, H or K, D]
        q, k = self.q_layernorm(q), self.k_layernorm(k)
        if table is not None:
            q, k = (torch.cat((self.turn(t[..., : self.rotated], *table), t[..., self.rotated :]), -1) for t in (q, k))
        return self.linear_proj(attend(q, k, v))


class MLP(nn.Module):
    """fc1, an activation, fc2; where it is gated, the first half of fc1 is the gate, the second the value."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gated, self.approximate = sizes["gated"], "tanh" if sizes["activation"] == "gelu_new" else "none"
        rows = sizes["ffn"] * (2 if self.gated else 1)
        self.linear_fc1 = _up(sizes, rows, bias=sizes["linear_bias"])
        self.linear_fc2 = Linear(sizes["ffn"], sizes["hidden"], bias=sizes["linear_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x = self.linear_fc1(x)
        if not self.gated:
            return self.linear_fc2(functional.gelu(x, approximate=self.approximate))
        gate, value = x.chunk(2, dim=-1)
        return self.linear_fc2(functional.silu(gate) * value)
