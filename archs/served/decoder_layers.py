"""The composable decoder's attention and MLPs of vLLM's own layers: fused and sharded, with a paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.activation import get_act_and_mul_fn, get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope

from ..decoder.schema import Decoder, Mlp, Moe
from ..decoder.split import refuse_ranks
from ..decoder.tables import NormKind
from ..eager.bloom import slopes

if TYPE_CHECKING:
    from vllm.config import CacheConfig
    from vllm.model_executor.layers.quantization import QuantizationConfig

_FUSED = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
"""Activations that vLLM computes together with the product of gate and up."""
_ROUTED = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def norm_layer(norm: NormKind, size: int) -> nn.Module:
    """A norm of this kind; vLLM has one class for each."""
    if norm.kind == "layer":
        return nn.LayerNorm(size, eps=norm.eps, elementwise_affine=norm.weight, bias=norm.bias)
    if norm.unit_offset:
        return GemmaRMSNorm(size, eps=norm.eps)
    return RMSNorm(size, eps=norm.eps, has_weight=norm.weight)


class DecoderAttention(nn.Module):
    """Causal attention of one layer; this rank's heads of it."""

    mdl_alone = True  # as in DecoderLayer

    def __init__(
        self, d: Decoder, layer: int, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        a = d.attention
        self._plain(d, layer)
        tp, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        heads, keys = d.num_attention_heads, d.num_key_value_heads
        refuse_ranks(d, tp)
        self.heads, self.keys = heads // tp, max(1, keys // tp)
        self.first_key = rank * keys // tp
        self.qkv_proj = QKVParallelLinear(
            d.hidden_size, d.head_dim, heads, keys, bias=a.bias, quant_config=quant, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * d.head_dim, d.hidden_size, bias=a.out_bias, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = _rope(d, layer)
        if a.qk_norm:
            self.q_norm = norm_layer(a.qk_norm, d.head_dim if self.norms_heads else heads * d.head_dim)
            self.k_norm = norm_layer(a.qk_norm, d.head_dim if self.norms_heads else keys * d.head_dim)
        if a.gate:
            gates = heads if a.gate == "head" else heads * d.head_dim
            self.gate_proj = ColumnParallelLinear(
                d.hidden_size, gates, bias=False, quant_config=quant, prefix=f"{prefix}.gate_proj"
            )
        if self.mixes_values:
            self.value_lambdas = nn.Parameter(torch.empty(2))
        if a.value_embedding and d.value_embedded(layer):
            self.value_gate = ReplicatedLinear(
                a.value_embedding.channels, keys, bias=False, prefix=f"{prefix}.value_gate"
            )
        alibi = slopes(heads).tolist() if d.positions.kind == "alibi" else None
        self.attn = Attention(
            self.heads,
            d.head_dim,
            a.scale if a.scale is not None else d.head_dim**-0.5,
            num_kv_heads=self.keys,
            alibi_slopes=alibi[rank * self.heads : (rank + 1) * self.heads] if alibi else None,
            cache_config=cache,
            quant_config=quant,
            logits_soft_cap=a.softcap,
            per_layer_sliding_window=d.window(layer),
            prefix=f"{prefix}.attn",
        )

    def _plain(self, d: Decoder, layer: int) -> None:
        """What the forward asks of the config, as plain values: torch.compile can't look into pydantic's records."""
        norm, table = d.attention.qk_norm, d.attention.value_embedding
        self.size = d.head_dim
        self.gates = d.attention.gate or ""
        self.mixes_values = d.attention.value_residual and layer > 0
        self.norms = "" if norm is None else "after" if norm.after_rotary else "before"
        self.norms_heads = norm is not None and norm.over == "head"
        self.table_scale, self.table_channels = (table.scale, table.channels) if table else (0.0, 0)

    def forward(
        self, positions: Tensor, x: Tensor, embedded: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [T, C] to the same shape, and this layer's values [T, K·D] of this rank.

        ``embedded`` are the tokens' rows of this layer's value table [T, K·D], of all ranks; ``first`` the values of
        the first layer.
        """
        size = self.size
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([self.heads * size, self.keys * size, self.keys * size], dim=-1)
        q, k = self._turned(positions, q, k)
        if embedded is not None:
            v = self._embedded(x, v, embedded)
        if self.mixes_values and first is not None:
            v = self.value_lambdas[0] * v + self.value_lambdas[1] * first
        out = self.attn(q, k, v)
        if self.gates:
            gates = torch.sigmoid(self.gate_proj(x)[0])
            gates = gates.repeat_interleave(size, dim=-1) if self.gates == "head" else gates
            out = out * gates
        return self.o_proj(out)[0], v

    def _embedded(self, x: Tensor, v: Tensor, embedded: Tensor) -> Tensor:
        """Values with this layer's token embeddings added, head by head."""
        gates = self.table_scale * torch.sigmoid(self.value_gate(x[:, : self.table_channels].contiguous())[0])
        mine = slice(self.first_key, self.first_key + self.keys)
        rows = embedded.unflatten(-1, (-1, self.size))[:, mine]
        return v + (gates[:, mine, None] * rows).flatten(-2)

    def _turned(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys normed and rotated, in the config's order."""
        if self.norms == "before":
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if self.rotary_emb is not None:  # flat, not head by head: vLLM 0.32's CPU kernel is wrong for three axes
            q, k = self.rotary_emb(positions, q, k)
        if self.norms == "after":
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        return q, k

    def _normed(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One norm over each head, or over the heads of all ranks."""
        if self.norms_heads:
            return layer(x.reshape(-1, self.size)).view(x.shape)
        tp = get_tensor_model_parallel_world_size()
        if tp == 1:
            return layer(x.contiguous())
        return layer(tensor_model_parallel_all_gather(x.contiguous())).chunk(tp, dim=-1)[
            get_tensor_model_parallel_rank()
        ]


def _rope(d: Decoder, layer: int) -> nn.Module | None:
    """vLLM's rotary layer for this layer; None where nothing turns."""
    p = d.positions
    if not d.rotates(layer):
        return None
    local = d.turns_apart(layer)
    scaling = p.scaling.model_dump(exclude_none=True) if p.scaling and not local else {"rope_type": "default"}
    parameters = {**scaling, "rope_theta": p.sliding_theta if local else p.theta}
    parameters["rope_dim"] = d.rotated
    half = p.style == "half"
    return get_rope(d.head_dim, max_position=d.max_position_embeddings, rope_parameters=parameters, is_neox_style=half)


class DecoderMlp(nn.Module):
    """down(act(gate x) · up x), or down(act(up x)) without a gate."""

    def __init__(self, hidden: int, inner: int, mlp: Mlp, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gated = mlp.gated
        if mlp.gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden, [inner] * 2, bias=mlp.bias, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
            )
        else:
            self.up_proj = ColumnParallelLinear(
                hidden, inner, bias=mlp.bias, quant_config=quant, prefix=f"{prefix}.up_proj"
            )
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=mlp.out_bias, quant_config=quant, prefix=f"{prefix}.down_proj"
        )
        self.fused = mlp.gated and mlp.activation in _FUSED
        self.act = get_act_and_mul_fn(_FUSED[mlp.activation]) if self.fused else get_act_fn(mlp.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        if not self.gated:
            inner = self.act(self.up_proj(x)[0])
        elif self.fused:
            inner = self.act(self.gate_up_proj(x)[0])
        else:
            gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
            inner = self.act(gate.contiguous()) * up
        return self.down_proj(inner)[0]


class DecoderExperts(nn.Module):
    """A mixture of experts on vLLM's fused layer, and the expert that all tokens pass where there is one."""

    def __init__(self, d: Decoder, moe: Moe, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.moe = moe
        self.shared_gated = moe.shared_gate
        try:
            from vllm.model_executor.layers.fused_moe import FusedMoEFactory as FusedMoE
        except ImportError:  # an older vLLM
            from vllm.model_executor.layers.fused_moe import (
                FusedMoE,  # pyright: ignore[reportAttributeAccessIssue] - it stood where its factory does now
            )
        self.router = ReplicatedLinear(
            d.hidden_size, moe.experts, bias=moe.router_bias, quant_config=None, prefix=f"{prefix}.router"
        )
        if moe.selection_bias:
            self.selection_bias = nn.Parameter(torch.empty(moe.experts))
        self.experts = FusedMoE(
            num_experts=moe.experts,
            top_k=moe.experts_per_token,
            hidden_size=d.hidden_size,
            intermediate_size=moe.size,
            renormalize=moe.normalised,
            activation=_ROUTED[moe.activation],
            custom_routing_function=self._routed,
            quant_config=quant,
            prefix=f"{prefix}.experts",
        )
        self.shared_expert: DecoderMlp | None = None
        if moe.shared_size:
            dense = Mlp(gated=True, activation=moe.activation)
            self.shared_expert = DecoderMlp(d.hidden_size, moe.shared_size, dense, quant, f"{prefix}.shared_expert")
        if moe.shared_gate:
            self.shared_expert_gate = ReplicatedLinear(
                d.hidden_size, 1, bias=False, quant_config=None, prefix=f"{prefix}.shared_expert_gate"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        mixed = self.experts(hidden_states=x, router_logits=self.router(x)[0])
        if self.shared_expert is None:
            return mixed
        shared = self.shared_expert(x)
        return mixed + (torch.sigmoid(self.shared_expert_gate(x)[0]) * shared if self.shared_gated else shared)

    def _routed(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Router logits [T, E] to weights [T, k] in float32 and the numbers of experts [T, k]."""
        bias = self.selection_bias if self.moe.selection_bias else None
        return route(self.moe, gating_output, bias)


def route(moe: Moe, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and experts [T, k] of router logits [T, E], in float32."""
    logits = logits.float()
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    chosen = torch.topk(scores if bias is None else scores + bias.float(), moe.experts_per_token).indices
    weights = scores.gather(-1, chosen)
    if moe.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * moe.scaling, chosen.to(torch.int32)
