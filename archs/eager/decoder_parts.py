"""The composable decoder's norms, attention and MLPs in plain PyTorch. Sources: see archs/decoder/schema.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..decoder.schema import Decoder, Moe
from ..decoder.tables import NormKind
from .llama_meta import attend
from .mixture import mixed
from .parts import Linear
from .rotary import rotate, rotate_halves

Table = tuple[Tensor, Tensor]


def activated(name: str, x: Tensor) -> Tensor:
    """One of the schema's activations, by transformers' names."""
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return functional.gelu(x, approximate="tanh")
    if name == "gelu_fast":  # transformers/activations.py, FastGELUActivation: sqrt(2 / pi) in ten digits
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "relu2":
        return functional.relu(x).square()
    plain = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}
    return {**plain, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[name](x)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32 at least; the weight multiplies before the cast back."""

    def __init__(self, kind: NormKind, size: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(size)) if kind.weight else None
        self.bias = nn.Parameter(torch.empty(size)) if kind.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Any [..., size] to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.kind.eps)
        if self.weight is not None:
            wide = wide * (self.weight.to(wide.dtype) + (1 if self.kind.unit_offset else 0))
        if self.bias is not None:
            wide = wide + self.bias.to(wide.dtype)
        return wide.to(x.dtype)


class Attention(nn.Module):
    """Causal attention of one layer, with whatever the config adds to it."""

    def __init__(self, d: Decoder, layer: int) -> None:
        super().__init__()
        self.d, self.layer, a = d, layer, d.attention
        heads, keys = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
        self.q_proj = Linear(d.hidden_size, heads, bias=a.bias)
        self.k_proj = Linear(d.hidden_size, keys, bias=a.bias)
        self.v_proj = Linear(d.hidden_size, keys, bias=a.bias)
        self.o_proj = Linear(heads, d.hidden_size, bias=a.out_bias)
        if a.qk_norm:
            each = a.qk_norm.over == "head"
            self.q_norm = Norm(a.qk_norm, d.head_dim if each else heads)
            self.k_norm = Norm(a.qk_norm, d.head_dim if each else keys)
        if a.gate:
            self.gate_proj = Linear(d.hidden_size, d.num_attention_heads if a.gate == "head" else heads, bias=False)
        if a.value_residual and layer:
            self.value_lambdas = nn.Parameter(torch.empty(2))
        if a.value_embedding and d.value_embedded(layer):
            self.value_gate = Linear(a.value_embedding.channels, d.num_key_value_heads, bias=False)

    def forward(
        self, x: Tensor, table: Table | None, slopes: Tensor | None, embedded: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, C] to the same shape, and this layer's values [B, T, K, D].

        ``table`` holds the cosines and sines [T, R/2], ``slopes`` what is added to scores [H, 1, T], ``embedded`` the
        tokens' rows of this layer's value table [B, T, K·D], ``first`` the first layer's values [B, T, K, D].
        """
        d, a = self.d, self.d.attention
        q, k = self._turned(self.q_proj(x), table, "q"), self._turned(self.k_proj(x), table, "k")
        v = self.v_proj(x).unflatten(-1, (-1, d.head_dim))
        if a.value_embedding and embedded is not None:
            gate = a.value_embedding.scale * torch.sigmoid(self.value_gate(x[..., : a.value_embedding.channels]))
            v = v + gate[..., None] * embedded.unflatten(-1, (-1, d.head_dim))
        if a.value_residual and self.layer and first is not None:
            v = self.value_lambdas[0] * v + self.value_lambdas[1] * first
        scalar = a.scale**-2 if a.scale else 0.0  # attend divides by a root
        out = attend(q, k, v, d.window(self.layer) or 0, scalar=scalar, cap=a.softcap or 0.0, added=slopes)
        if a.gate:
            gates = torch.sigmoid(self.gate_proj(x))
            gates = gates.repeat_interleave(d.head_dim, dim=-1) if a.gate == "head" else gates
            out = out * gates
        return self.o_proj(out), v

    def _turned(self, x: Tensor, table: Table | None, name: str) -> Tensor:
        """Queries or keys [B, T, heads·D] to [B, T, heads, D]: normed and rotated, in the config's order."""
        norm = self.d.attention.qk_norm
        if norm is None or norm.after_rotary:
            x = self._rotated(x.unflatten(-1, (-1, self.d.head_dim)), table)
            return self._normed(x, name) if norm else x
        return self._rotated(self._normed(x.unflatten(-1, (-1, self.d.head_dim)), name), table)

    def _normed(self, x: Tensor, name: str) -> Tensor:
        norm = self.get_submodule(f"{name}_norm")
        each = self.d.attention.qk_norm is not None and self.d.attention.qk_norm.over == "head"
        return norm(x) if each else norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])

    def _rotated(self, x: Tensor, table: Table | None) -> Tensor:
        if table is None:
            return x
        size = 2 * table[0].shape[-1]
        turn = rotate_halves if self.d.positions.style == "half" else rotate
        turned = turn(x[..., :size], *table)
        return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


class Mlp(nn.Module):
    """down(act(gate x) · up x), or down(act(up x)) without a gate."""

    def __init__(self, hidden: int, inner: int, activation: str, *, gated: bool, bias: bool, out_bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden, inner, bias=bias) if gated else None
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=out_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] to the same shape."""
        if self.gate_proj is None:
            return self.down_proj(activated(self.activation, self.up_proj(x)))
        return self.down_proj(activated(self.activation, self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A mixture of experts, and the expert that all tokens pass where there is one."""

    def __init__(self, d: Decoder, moe: Moe) -> None:
        super().__init__()
        self.moe = moe

        def mlp(size: int) -> Mlp:
            return Mlp(d.hidden_size, size, moe.activation, gated=True, bias=False, out_bias=False)

        self.router = Linear(d.hidden_size, moe.experts, bias=moe.router_bias)
        self.selection_bias = nn.Parameter(torch.empty(moe.experts)) if moe.selection_bias else None
        self.experts = nn.ModuleList(mlp(moe.size) for _ in range(moe.experts))
        self.shared_expert = mlp(moe.shared_size) if moe.shared_size else None
        self.shared_expert_gate = Linear(d.hidden_size, 1, bias=False) if moe.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        tokens = x.flatten(0, -2)
        weights, chosen = self._routed(tokens)
        made = mixed(tokens, weights, chosen, self.moe.experts, lambda index, x: self.experts[index](x))
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            gate = torch.sigmoid(self.shared_expert_gate(tokens)) if self.shared_expert_gate else None
            made = made + (shared if gate is None else shared * gate)
        return made.view_as(x)

    def _routed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, C] to weights [N, k] and the numbers of experts [N, k]."""
        logits = self.router(tokens).to(torch.promote_types(tokens.dtype, torch.float32))
        scores = logits.softmax(-1) if self.moe.scoring == "softmax" else logits.sigmoid()
        ranked = scores if self.selection_bias is None else scores + self.selection_bias.to(scores.dtype)
        chosen = ranked.topk(self.moe.experts_per_token).indices
        weights = scores.gather(-1, chosen)
        if self.moe.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * self.moe.scaling).to(tokens.dtype), chosen
