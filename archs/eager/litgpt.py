"""litgpt's forward pass: one GPT whose fields make it Llama, Qwen, Gemma, OLMo 2, Mixtral, StableLM and more.

Source of every formula: Lightning-AI/litgpt, litgpt/model.py. Module paths and ``state_dict()`` keys are those of its
checkpoints, before and since release 0.5.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .parts import Embedding, Linear, TiedHead, length_of, softcap, take, taken
from .rotary import Scaling, stretched

Sizes = Mapping[str, Any]
"""The family's dims, as archs/litgpt.py settles them; what their types are is checked by :func:`build`."""
_KINDS: dict[type, tuple[str, ...]] = {
    int: ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "rotary", "sliding_window"),
    float: ("norm_eps", "rope_theta", "rope_local_theta", "attention_scalar", "attention_softcap", "logit_softcap"),
    str: ("name", "norm", "mlp", "rope_scaling", "gelu_approximate"),
    bool: (
        *("tied", "bias", "qkv_bias", "lm_head_bias", "grouped_rows", "parallel_residual", "shared_attention_norm"),
        *("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm", "norm_qk", "scale_embeddings"),
    ),
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes: dict[str, Any] = {**dims, **taken(dims, _KINDS)}
    if sizes["heads"] % sizes["kv_heads"] or sizes["rotary"] % 2:
        what = f"{sizes['heads']} heads of {sizes['kv_heads']} groups, or a rotation of {sizes['rotary']} channels"
        raise input_error(f"{what}, can't be built", "dims", "check n_head and rotary_percentage")
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPT(sizes).eval()


def rotary_table(sizes: Sizes, length: int, *, local: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R/2] of the angles ``t · theta^(-2j/R)``; ``local`` are those of windowed Gemma 3 layers.

    float32 on the CPU whatever the model's dtype and device: the rounding of the table is part of the model.
    """
    theta = sizes["rope_local_theta"] if local else sizes["rope_theta"]
    pairs = torch.arange(0, sizes["rotary"], 2, dtype=torch.float32, device="cpu")
    freqs = 1.0 / theta ** (pairs / sizes["rotary"])
    if sizes["rope_scaling"] == "linear" and not local:
        freqs = freqs / take(sizes, "rope_factor", float)
    elif sizes["rope_scaling"] == "llama3" and not local:
        freqs = stretched(freqs, _scaling(sizes))
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), freqs)
    return angles.cos(), angles.sin()


def _scaling(sizes: Sizes) -> Scaling:
    return Scaling(
        factor=take(sizes, "rope_factor", float),
        low_freq_factor=take(sizes, "rope_low_freq_factor", float),
        high_freq_factor=take(sizes, "rope_high_freq_factor", float),
        original_context=take(sizes, "rope_original_context", int),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R channels of x [B, H, T, D] by the table's angles [T, R/2]: pair j is channels j and j + R/2."""
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    a, b, cos, sin = a.to(wide), b.to(wide), cos.to(x.device, wide), sin.to(x.device, wide)
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), dim=-1)


class RMSNorm(nn.Module):
    """Division by the root mean square, then by the weight, in float32 at least; Gemma's weight counts from one."""

    def __init__(self, size: int, eps: float, *, offset: bool) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """The last dimension, normalised."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = 1 + self.weight if self.offset else self.weight
        return (normed * weight.to(wide.dtype)).to(x.dtype)


def _norm(sizes: Sizes, size: int) -> nn.Module:
    if sizes["norm"] == "LayerNorm":
        return nn.LayerNorm(size, eps=sizes["norm_eps"])
    return RMSNorm(size, sizes["norm_eps"], offset="Gemma" in sizes["name"])


class GPT(nn.Module):
    """The whole model. ``lm_head`` holds a weight of its own only where it is not the embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, vocab = sizes["hidden"], sizes["vocab"]
        self.lm_head = TiedHead() if sizes["tied"] else Linear(hidden, vocab, bias=sizes["lm_head_bias"])
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = Embedding(vocab, hidden)
        self.transformer["h"] = nn.ModuleList(Block(sizes, i) for i in range(sizes["layers"]))
        self.transformer["ln_f"] = _norm(sizes, hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        sizes = self.sizes
        length = length_of(ids, sizes["context"])
        tables = [rotary_table(sizes, length, local=bool(k) and sizes["rope_local_theta"] > 0) for k in range(2)]
        x = self.transformer["wte"](ids)
        if sizes["scale_embeddings"]:
            x = x * torch.tensor(sizes["hidden"] ** 0.5, dtype=x.dtype, device=x.device)
        for block, local in zip(self.transformer["h"], sizes["rope_local_layers"], strict=True):  # type: ignore[arg-type]  # a ModuleList
            x = block(x, *tables[local])
        x = self.transformer["ln_f"](x)
        head = self.lm_head
        logits = head(x, self.transformer["wte"].weight) if isinstance(head, TiedHead) else head(x)
        return softcap(logits, sizes["logit_softcap"])


class Block(nn.Module):
    """Attention and MLP, one after the other or side by side, with norms before, after or around each."""

    def __init__(self, sizes: Sizes, index: int) -> None:
        super().__init__()
        self.parallel, self.shared = sizes["parallel_residual"], sizes["shared_attention_norm"]
        self.norm_1, self.norm_2, self.post_attention_norm, self.post_mlp_norm = (
            _norm(sizes, sizes["hidden"]) if sizes[name] else nn.Identity()
            for name in ("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm")
        )
        self.attn = Attention(sizes, index)
        self.mlp = _MLPS[sizes["mlp"]](sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        normed = self.norm_1(x)
        after = x + self.post_attention_norm(self.attn(normed, cos, sin))
        if not self.shared:
            normed = self.norm_2(x if self.parallel else after)
        return after + self.post_mlp_norm(self.mlp(normed))


class Attention(nn.Module):
    """Causal self-attention, windowed in some layers; query head h reads key head h // (H / K)."""

    def __init__(self, sizes: Sizes, index: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.scale, self.cap = 1 / math.sqrt(sizes["attention_scalar"]), sizes["attention_softcap"]
        self.window = sizes["sliding_window"] if sizes["sliding_layers"][index] else 0
        self.fused = "attn" if sizes["grouped_rows"] else "qkv"  # its name until release 0.5.4, and since
        rows = (self.heads + 2 * self.kv_heads) * self.size
        self.add_module(self.fused, Linear(sizes["hidden"], rows, bias=sizes["qkv_bias"]))
        self.proj = Linear(self.heads * self.size, sizes["hidden"], bias=sizes["bias"])
        self.whole = sizes["norm_qk"] and sizes["norm_qk_type"] == "olmo2"
        if sizes["norm_qk"]:
            self.norm_q = _norm(sizes, self.size * (self.heads if self.whole else 1))
            self.norm_k = _norm(sizes, self.size * (self.kv_heads if self.whole else 1))
        else:
            self.norm_q = self.norm_k = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        q, k, v = self._heads(x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))  # [B, H, T, D]
        scores = softcap(q @ k.transpose(-2, -1) * self.scale, self.cap)
        scores = scores.masked_fill(self._hidden(x), -math.inf).to(torch.promote_types(x.dtype, torch.float32))
        mixed = scores.softmax(dim=-1).to(x.dtype) @ v
        return self.proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, T, C] to q [B, H, T, D] and k, v [B, K, T, D], q and k normed where the model does so."""
        rows, per = self.get_submodule(self.fused)(x), self.heads // self.kv_heads
        if self.fused == "attn":
            grouped = rows.unflatten(-1, (self.kv_heads, per + 2, self.size))
            q, k, v = (t.flatten(2) for t in grouped.split((per, 1, 1), dim=-2))
        else:
            q, k, v = rows.split([n * self.size for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        if self.whole:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        return (q, k, v) if self.whole else (self.norm_q(q), self.norm_k(k), v)

    def _hidden(self, x: Tensor) -> Tensor:
        """Which keys [T, T] a query may not see: later ones, and those before its window, which counts itself."""
        ones = torch.ones((x.shape[1], x.shape[1]), dtype=torch.bool, device=x.device)
        return ones.triu(1) | ones.tril(-self.window) if self.window else ones.triu(1)


class Plain(nn.Module):
    """fc, GELU, proj."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.approximate = sizes["gelu_approximate"]
        self.fc = Linear(sizes["hidden"], sizes["ffn"], bias=sizes["bias"])
        self.proj = Linear(sizes["ffn"], sizes["hidden"], bias=sizes["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.proj(functional.gelu(self.fc(x), approximate=self.approximate))


class Gated(nn.Module):
    """fc_1 is the gate, fc_2 the value, proj the way back."""

    def __init__(self, sizes: Sizes, *, gemma: bool = False) -> None:
        super().__init__()
        gelu: Callable[[Tensor], Tensor] = partial(functional.gelu, approximate=sizes["gelu_approximate"])
        self.activation = gelu if gemma else functional.silu
        self.fc_1 = Linear(sizes["hidden"], sizes["ffn"], bias=sizes["bias"])
        self.fc_2 = Linear(sizes["hidden"], sizes["ffn"], bias=sizes["bias"])
        self.proj = Linear(sizes["ffn"], sizes["hidden"], bias=sizes["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] to the same shape."""
        return self.proj(self.activation(self.fc_1(x)) * self.fc_2(x))


class Mixture(nn.Module):
    """Each token goes to the k experts that its router likes best, weighed by the softmax of those k scores."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.top = take(sizes, "experts_per_token", int)
        self.gate = Linear(sizes["hidden"], sizes["experts"], bias=False)
        self.experts = nn.ModuleList(Gated(sizes) for _ in range(sizes["experts"]))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        scores, chosen = self.gate(x).topk(self.top)
        shares = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = (shares * (chosen == index)).sum(-1, keepdim=True)  # 0 where the token goes elsewhere
            mixed = mixed + share * expert(x)
        return mixed


_MLPS: dict[str, Callable[[Sizes], nn.Module]] = {
    "GptNeoxMLP": Plain,
    "LLaMAMLP": Gated,
    "GemmaMLP": partial(Gated, gemma=True),
    "LLaMAMoE": Mixture,
}
