"""The composable decoder's recurrences under vLLM. Formulas: archs/decoder/recurrence.py.

Plain PyTorch between vLLM's parallel projections: right on every device, and no kernel of its own. Mamba 2 is vLLM's
own layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from ...errors import input_error
from ..decoder.recurrence import Gated, LinearAttention, Mamba2, Recurrence
from ..decoder.schema import Decoder
from .decoder_layers import norm_layer
from .state import Batch, StateLayer, convolved, scan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

_CHUNK = 16
"""Tokens of one request that linear attention takes at once: its decays within them fill [16, 16, H, K]."""


def mixer_layer(d: Decoder, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """What this decoder has in the place of attention. Raises MdlError (INPUT) where ranks can't share it."""
    match d.recurrence:
        case Gated() as r:
            return GatedLayer(r, d.hidden_size, vllm_config, prefix)
        case LinearAttention() as r:
            return LinearAttentionLayer(r, d.hidden_size, vllm_config, prefix)
        case Mamba2() as r:
            return Mamba2Layer(r, d.hidden_size, vllm_config, prefix)
        case None:
            raise AssertionError("no layer of this decoder has a recurrence")


def state_shapes(r: Recurrence, ranks: int) -> tuple[tuple[int, ...], ...]:
    """The states of one request, on one of so many ranks. Raises MdlError (INPUT) where they can't share them."""
    size = r.width if isinstance(r, Gated) else r.heads
    if size % ranks:
        what = f"{size} {'channels' if isinstance(r, Gated) else 'heads'} can't be split over {ranks} ranks"
        raise input_error(what, do="use a --tensor-parallel-size that divides them")
    share = size // ranks
    if isinstance(r, Gated):
        return ((share,), (r.conv - 1, share)) if r.conv else ((share,),)
    if isinstance(r, LinearAttention):
        return ((share, r.key_size, r.value_size),)
    return MambaStateShapeCalculator.mamba2_state_shape(ranks, r.inner, r.groups, r.heads, r.head_size, r.state, r.conv)


def state_types(r: Recurrence, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """Their types: float32; of Mamba 2 what vLLM's options say."""
    if isinstance(r, Mamba2):
        cache = vllm_config.cache_config
        types = (cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype)
        return MambaStateDtypeCalculator.mamba2_state_dtype(vllm_config.model_config.dtype, *types)
    return (torch.float32,) * len(state_shapes(r, 1))


class Mixer(StateLayer):
    """What both of our own kinds have: projections of this rank's share, a norm and an output gate."""

    def __init__(self, r: Gated | LinearAttention, vllm_config: VllmConfig, prefix: str) -> None:
        self.ranks = get_tensor_model_parallel_world_size()
        super().__init__(state_shapes(r, self.ranks), vllm_config, prefix)
        self.quant = vllm_config.quant_config
        self.act = get_act_fn(r.output_gate) if r.output_gate else None

    def _column(self, name: str, columns: int, rows: int, bias: bool) -> ColumnParallelLinear:
        at = f"{self.prefix}.{name}"
        return ColumnParallelLinear(columns, rows, bias=bias, quant_config=self.quant, prefix=at)

    def _row(self, name: str, columns: int, rows: int, bias: bool) -> RowParallelLinear:
        at = f"{self.prefix}.{name}"
        return RowParallelLinear(columns, rows, bias=bias, quant_config=self.quant, prefix=at)

    def _everywhere(self, x: Tensor) -> Tensor:
        """The channels of all ranks, of this rank's [T, W / ranks]."""
        return x if self.ranks == 1 else tensor_model_parallel_all_gather(x.contiguous())

    def _over_all(self, norm: nn.Module, y: Tensor) -> Tensor:
        """A norm over the channels of all ranks, and this rank's share of what it gives."""
        return norm(self._everywhere(y).contiguous()).chunk(self.ranks, dim=-1)[get_tensor_model_parallel_rank()]


def _share(*shape: int) -> nn.Parameter:
    """A parameter of which each rank loads its part of the first axis."""
    made = nn.Parameter(torch.empty(*shape))
    set_weight_attrs(made, {"weight_loader": sharded_weight_loader(0)})
    return made


class Conv(nn.Module):
    """The weights of a filter of each channel; what it computes depends on the step (:func:`.state.convolved`)."""

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = _share(channels, 1, kernel)
        self.bias = _share(channels) if bias else None


class GatedLayer(Mixer):
    """One number for each channel."""

    def __init__(self, r: Gated, hidden: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(r, vllm_config, prefix)
        self.r, width = r, r.width
        share = width // self.ranks
        seen = hidden if r.gates_from == "stream" else width
        self.value_proj = self._column("value_proj", hidden, width, r.bias)
        self.conv = Conv(share, r.conv, bias=r.conv_bias) if r.conv else None
        self.decay_proj = self._column("decay_proj", seen, width, r.gate_bias)
        self.decay_rate = _share(share) if r.decay == "power" else None
        self.decay_floor = _share(share) if r.decay_floor else None
        self.input_proj = self._column("input_proj", seen, width, r.gate_bias) if r.input_gate else None
        self.norm = norm_layer(r.norm, width) if r.norm else None
        self.gate_proj = self._column("gate_proj", hidden, width, r.bias) if r.output_gate else None
        self.o_proj = self._row("o_proj", width, hidden, r.out_bias)
        plain = r.value_activation is not None and r.value_activation != "mingru"
        self.value_act = get_act_fn(str(r.value_activation)) if plain else None

    def mixed(self, positions: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        r = self.r
        v = self._convolved(self.value_proj(x)[0], batch)
        seen = x if r.gates_from == "stream" else self._everywhere(v)
        decay = self._decay(self.decay_proj(seen)[0].float())
        new = self._scaled(decay, positions, self._activated(v.float()))
        if self.input_proj is not None:
            new = torch.sigmoid(self.input_proj(seen)[0].float()) * new
        h = scan(decay, new, batch.load(self.kv_cache[0], self.shapes[0]), batch)
        batch.store(self.kv_cache[0], h[batch.begins[1:] - 1])
        y = h.to(x.dtype)
        if self.norm is not None:
            y = self._over_all(self.norm, y)
        if self.gate_proj is not None and self.act is not None:
            y = y * self.act(self.gate_proj(x)[0])
        return self.o_proj(y)[0]

    def _convolved(self, v: Tensor, batch: Batch) -> Tensor:
        if self.conv is None:
            return v
        cache, shape = self.kv_cache[1], self.shapes[1]
        weight, bias = self.conv.weight[:, 0].float(), self.conv.bias
        out, last = convolved(v.float(), weight, bias, batch.load(cache, shape), batch)
        batch.store(cache, last)
        return out.to(v.dtype)

    def _decay(self, f: Tensor) -> Tensor:
        r = self.r
        if self.decay_rate is not None and r.power:
            return torch.exp(-r.power * torch.sigmoid(f) * functional.softplus(self.decay_rate.float()))
        a = torch.sigmoid(-f if r.decay == "update" else f)
        return a if self.decay_floor is None else torch.lerp(a, torch.ones_like(a), self.decay_floor.float())

    def _scaled(self, a: Tensor, positions: Tensor, v: Tensor) -> Tensor:
        r = self.r
        if r.input_scale == "one":
            return v
        if r.input_scale == "complement":
            return (1 - a) * v
        root = torch.sqrt((1 - a) * (1 + a)) * v
        return root if r.input_scale == "root" else torch.where(positions[:, None] == 0, v, root)

    def _activated(self, v: Tensor) -> Tensor:
        if self.r.value_activation == "mingru":
            return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        return v if self.value_act is None else self.value_act(v)


class LinearAttentionLayer(Mixer):
    """One matrix for each head."""

    def __init__(self, r: LinearAttention, hidden: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(r, vllm_config, prefix)
        self.r, self.heads = r, r.heads // self.ranks
        keys, values = r.heads * r.key_size, r.heads * r.value_size
        self.q_proj = self._column("q_proj", hidden, keys, r.bias)
        self.k_proj = self._column("k_proj", hidden, keys, r.bias)
        self.v_proj = self._column("v_proj", hidden, values, r.bias)
        self.decay_proj = None
        if r.decay != "fixed":
            decays = r.heads if r.decay == "head" else keys
            self.decay_proj = self._column("decay_proj", hidden, decays, r.decay_bias)
        self.norm = norm_layer(r.norm, r.value_size if r.norm_over == "head" else values) if r.norm else None
        self.gate_proj = self._column("gate_proj", hidden, values, r.bias) if r.output_gate else None
        self.o_proj = self._row("o_proj", values, hidden, r.out_bias)
        rank = get_tensor_model_parallel_rank()
        self.rates = r.rates[rank * self.heads : (rank + 1) * self.heads] if r.rates else None
        self.scale = r.key_size**-0.5 if r.scale is None else r.scale

    def mixed(self, positions: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        each = (self.heads, -1)
        q, k = (self._featured(p(x)[0].float()).unflatten(-1, each) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x)[0].float().unflatten(-1, each)
        states = batch.load(self.kv_cache[0], self.shapes[0])
        y, states = attended(q * self.scale, k, v, self._logs(x), states, batch.starts)
        batch.store(self.kv_cache[0], states)
        y = y.to(x.dtype)
        if self.norm is not None and self.r.norm_over == "head":
            y = self.norm(y.contiguous())
        y = y.flatten(-2)
        if self.norm is not None and self.r.norm_over == "all":
            y = self._over_all(self.norm, y)
        if self.gate_proj is not None and self.act is not None:
            y = y * self.act(self.gate_proj(x)[0])
        return self.o_proj(y)[0]

    def _logs(self, x: Tensor) -> Tensor:
        """The logarithms of the decays of a head's rows [T, H, K], or of all its rows [T, H, 1]."""
        if self.decay_proj is None:
            return torch.tensor(self.rates, device=x.device).log()[:, None].expand(len(x), -1, 1)
        logs = functional.logsigmoid(self.decay_proj(x)[0].float()) / (self.r.temperature or 1.0)
        return logs.unflatten(-1, (self.heads, -1))

    def _featured(self, x: Tensor) -> Tensor:
        if self.r.feature == "elu":
            return functional.elu(x) + 1
        return x if self.r.feature is None else get_act_fn(self.r.feature)(x)


def attended(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, states: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t for all requests of a step, S_t = diag(exp(logs_t)) S_(t-1) + k_t v_tᵀ, and their last states.

    q, k [T, H, K], v [T, H, V], logs [T, H, K or 1], states [R, H, K, V]. Requests of one token each, which come first,
    are one step together; the others follow one by one, in chunks.
    """
    singles = next((r for r in range(len(starts) - 1) if starts[r + 1] - starts[r] > 1), len(starts) - 1)
    states, one = states.clone(), slice(0, singles)
    out = torch.empty_like(v)
    if singles:
        states[one] = logs[one, ..., None].exp() * states[one] + k[one, ..., None] * v[one, :, None]
        out[one] = (q[one, :, None] @ states[one]).squeeze(-2)
    for r in range(singles, len(starts) - 1):
        for begin in range(starts[r], starts[r + 1], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, starts[r + 1]))
            out[part], states[r] = _chunk(q[part], k[part], v[part], logs[part], states[r])
    return out, states


def _chunk(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same for C tokens of one request after the state [H, K, V]: by matrices, not token after token.

    between[t, s] is the sum of the logarithms after s, up to t: sums of their own, for the difference of two long ones
    would lose digits.
    """
    size = len(q)
    after = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    spread = logs[:, None].expand(-1, size, -1, -1).masked_fill(~after[..., None, None], 0.0)
    between = spread.cumsum(0)
    seen = after | torch.eye(size, dtype=torch.bool, device=q.device)
    decays = between.exp().masked_fill(~seen[..., None, None], 0.0)
    scores = (q[:, None] * k[None] * decays).sum(-1)
    whole = logs.cumsum(0).exp()
    out = torch.einsum("tsh,shv->thv", scores, v) + torch.einsum("thk,hkv->thv", q * whole, state)
    last = whole[-1, ..., None] * state + torch.einsum("shk,shv->hkv", k * decays[-1], v)
    return out, last


class Mamba2Layer(MambaMixer2):
    """vLLM's own mixer, called as ours are."""

    def __init__(self, r: Mamba2, hidden: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            hidden,
            r.state,
            r.conv,
            r.inner,
            r.conv_bias,
            r.bias,
            r.groups,
            r.heads,
            r.head_size,
            r.norm_eps,
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # ours are given positions
        self, positions: Tensor, hidden_states: Tensor
    ) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        return super().forward(hidden_states)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """What is cached. On a CPU without the states inside a step, for prefixes: vLLM 0.32's scan there gives none.

        Then the scheduler ends steps where a block of states does, as it does for our own kinds.
        """
        if current_platform.is_cpu():
            return MambaBase.get_kv_cache_spec(self, vllm_config)
        return super().get_kv_cache_spec(vllm_config)
