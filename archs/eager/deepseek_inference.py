"""DeepSeek-V3's forward pass on the names of DeepSeek's inference code.

Source of every formula: deepseek-ai/DeepSeek-V3, inference/model.py (its "naive" attention, which computes keys and
values in full). Keys and values come from one low-rank vector, positions from extra channels, which all heads share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Value
from ..deepseek_inference import stretched
from .llama_meta import FeedForward, RMSNorm, attend
from .mixture import mixed
from .parts import Embedding, Linear, taken
from .rotary import rotate

_KINDS: dict[type, tuple[str, ...]] = {
    int: (
        *("layers", "hidden", "vocab", "heads", "q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim", "ffn", "context"),
        *("dense_layers", "experts", "expert_ffn", "shared_experts", "experts_per_token", "expert_groups"),
        *("limited_groups", "rope_beta_fast", "rope_beta_slow", "rope_original_context"),
    ),
    bool: ("scaled",),
    float: ("norm_eps", "rope_theta", "rope_factor", "rope_mscale", "route_scale"),
}
Sizes = Mapping[str, Any]


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing or of another type.
    """
    sizes = taken(dims, _KINDS)
    if sizes["scaled"]:
        sizes |= taken(dims, {int: ("block",)})
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Transformer(sizes).eval()


def frequencies(sizes: Sizes) -> Tensor:
    """Angles per position of each pair [R/2]; beyond the trained length the slow ones are divided (YaRN)."""
    size, base, context = sizes["rope_dim"], sizes["rope_theta"], sizes["rope_original_context"]
    freqs = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size))
    if not stretched(sizes):
        return freqs
    low, high = (
        size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (sizes["rope_beta_fast"], sizes["rope_beta_slow"])
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    pairs = torch.arange(size // 2, dtype=torch.float32, device="cpu")
    slow = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return freqs / sizes["rope_factor"] * slow + freqs * (1 - slow)


class Transformer(nn.Module):
    """The whole model."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = Embedding(sizes["vocab"], sizes["hidden"])
        self.layers = nn.ModuleList(Block(sizes, dense=k < sizes["dense_layers"]) for k in range(sizes["layers"]))
        self.norm = RMSNorm(sizes["hidden"], sizes["norm_eps"])
        self.head = Linear(sizes["hidden"], sizes["vocab"], bias=False)
        for matrix in self._scaled():
            blocks = [-(-size // sizes["block"]) for size in matrix.weight.shape]
            matrix.scale = nn.Parameter(torch.empty(blocks))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load; float8 weights then become what DeepSeek's linear makes of them before it computes: the product with
        their blocks' factors, in bfloat16. From then on they are weights like any other."""
        done = super().load_state_dict(state_dict, strict, assign)
        for matrix in self._scaled():
            (rows, columns), block = matrix.weight.shape, self.sizes["block"]
            scale: Any = matrix.scale
            factors = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
            product = (matrix.weight * factors).bfloat16()
            matrix.weight = nn.Parameter(product.to(matrix.weight.dtype))
            del matrix.scale
        return done

    def _scaled(self) -> list[Linear]:
        """The matrices of the blocks, where they are float8: the head is none of them, nor is the gate."""
        return [one for one in self.layers.modules() if isinstance(one, Linear) and self.sizes["scaled"]]

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32, device="cpu"), frequencies(self.sizes))
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention and a feed-forward network or a mixture, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes, *, dense: bool) -> None:
        super().__init__()
        self.attn = Attention(sizes)
        self.ffn = FeedForward(sizes["hidden"], sizes["ffn"]) if dense else Mixture(sizes)
        self.attn_norm = RMSNorm(sizes["hidden"], sizes["norm_eps"])
        self.ffn_norm = RMSNorm(sizes["hidden"], sizes["norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Latent attention: queries through a low rank or straight, keys and values through one always."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, heads, rank = sizes["hidden"], sizes["heads"], sizes["q_rank"]
        self.heads, self.rank = heads, rank
        self.split_q = [sizes["nope_dim"], sizes["rope_dim"]]
        self.split_kv = [sizes["nope_dim"], sizes["v_dim"]]
        self.split_a = [sizes["kv_rank"], sizes["rope_dim"]]
        if rank:
            self.wq_a = Linear(hidden, rank, bias=False)
            self.q_norm = RMSNorm(rank, sizes["norm_eps"])
            self.wq_b = Linear(rank, heads * sum(self.split_q), bias=False)
        else:
            self.wq = Linear(hidden, heads * sum(self.split_q), bias=False)
        self.wkv_a = Linear(hidden, sum(self.split_a), bias=False)
        self.kv_norm = RMSNorm(sizes["kv_rank"], sizes["norm_eps"])
        self.wkv_b = Linear(sizes["kv_rank"], heads * sum(self.split_kv), bias=False)
        self.wo = Linear(heads * sizes["v_dim"], hidden, bias=False)
        more = 0.1 * sizes["rope_mscale"] * math.log(sizes["rope_factor"]) + 1.0
        self.sharper = more * more if stretched(sizes) else 1.0

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, R/2] to hidden states."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.rank else self.wq(x)
        q, turned = q.unflatten(-1, (self.heads, -1)).split(self.split_q, dim=-1)
        low, shared = self.wkv_a(x).split(self.split_a, dim=-1)
        k, v = self.wkv_b(self.kv_norm(low)).unflatten(-1, (self.heads, -1)).split(self.split_kv, dim=-1)
        shared = rotate(shared[:, :, None], cos, sin).expand(-1, -1, self.heads, -1)
        q = torch.cat([q, rotate(turned, cos, sin)], dim=-1)
        return self.wo(attend(q * self.sharper, torch.cat([k, shared], dim=-1), v))


class Gate(nn.Module):
    """Scores by sigmoid; the bias takes part in the choice only, first of groups by their two best, then of experts."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.chosen, self.scale = sizes["experts_per_token"], sizes["route_scale"]
        self.groups, self.limit = sizes["expert_groups"], sizes["limited_groups"]
        self.weight = nn.Parameter(torch.empty(sizes["experts"], sizes["hidden"]))
        self.bias = nn.Parameter(torch.empty(sizes["experts"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, C] to weights and experts [N, K]."""
        scores = nn.functional.linear(x, self.weight).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        biased = scores + self.bias.to(scores.dtype)
        if self.groups > 1:
            grouped = biased.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.limit, dim=-1).indices
            left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, value=False)
            biased = grouped.masked_fill(left_out[..., None], -math.inf).flatten(-2)
        experts = biased.topk(self.chosen, dim=-1).indices
        weights = scores.gather(-1, experts)
        return weights / weights.sum(dim=-1, keepdim=True) * self.scale, experts


class Mixture(nn.Module):
    """The chosen experts, weighed, and the shared ones as they are."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        inner = sizes["expert_ffn"]
        self.gate = Gate(sizes)
        self.experts = nn.ModuleList(FeedForward(sizes["hidden"], inner) for _ in range(sizes["experts"]))
        self.shared_experts = FeedForward(sizes["hidden"], sizes["shared_experts"] * inner)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.gate(tokens)
        routed = mixed(tokens, weights, chosen, len(self.experts), lambda index, x: self.experts[index](x))
        return routed.view_as(x) + self.shared_experts(x)
