"""The composable decoder's recurrences in plain PyTorch, token after token. Formulas: archs/decoder/recurrence.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..decoder.recurrence import Gated, LinearAttention, Mamba2
from ..decoder.schema import Decoder
from .decoder_parts import Norm, activated
from .mamba import Sizes
from .mamba2 import Mixer
from .parts import Linear


def mixer_of(d: Decoder) -> nn.Module:
    """What this decoder has in the place of attention: hidden states [B, T, C] to the same shape."""
    match d.recurrence:
        case Gated() as r:
            return GatedMixer(r, d.hidden_size)
        case LinearAttention() as r:
            return LinearAttentionMixer(r, d.hidden_size)
        case Mamba2() as r:
            return Mixer(_sizes(d, r), r.heads, r.groups)
        case None:
            raise AssertionError("no layer of this decoder has a recurrence")


def _sizes(d: Decoder, r: Mamba2) -> Sizes:
    return Sizes(
        layers=d.num_hidden_layers,
        hidden=d.hidden_size,
        inner=r.inner,
        state=r.state,
        kernel=r.conv,
        vocab=d.vocab_size,
        bias=r.bias,
        conv_bias=r.conv_bias,
        norm_eps=r.norm_eps,
        residual_wide=False,
        tied=d.tie_word_embeddings,
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Conv(nn.Module):
    """Each channel's own filter over the last positions, its own the last of them; zeros before the first."""

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Channels [B, T, W] to the same shape."""
        padded = functional.pad(x.transpose(1, 2), (self.weight.shape[-1] - 1, 0))
        return functional.conv1d(padded, self.weight, self.bias, groups=x.shape[-1]).transpose(1, 2)


class GatedMixer(nn.Module):
    """One number for each channel."""

    def __init__(self, r: Gated, hidden: int) -> None:
        super().__init__()
        self.r = r
        seen = hidden if r.gates_from == "stream" else r.width
        self.value_proj = Linear(hidden, r.width, bias=r.bias)
        self.conv = Conv(r.width, r.conv, bias=r.conv_bias) if r.conv else None
        self.decay_proj = Linear(seen, r.width, bias=r.gate_bias)
        self.decay_rate = nn.Parameter(torch.empty(r.width)) if r.decay == "power" else None
        self.decay_floor = nn.Parameter(torch.empty(r.width)) if r.decay_floor else None
        self.input_proj = Linear(seen, r.width, bias=r.gate_bias) if r.input_gate else None
        self.norm = Norm(r.norm, r.width) if r.norm else None
        self.gate_proj = Linear(hidden, r.width, bias=r.bias) if r.output_gate else None
        self.o_proj = Linear(r.width, hidden, bias=r.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        kind = _wide(x)
        v = self.value_proj(x)
        v = v if self.conv is None else self.conv(v)
        seen = x if self.r.gates_from == "stream" else v
        decay = self._decay(self.decay_proj(seen).to(kind))
        new = self._scale(decay) * self._activated(v.to(kind))
        if self.input_proj is not None:
            new = torch.sigmoid(self.input_proj(seen).to(kind)) * new
        h = torch.zeros_like(new[:, 0])
        rows: list[Tensor] = []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + new[:, t]
            rows.append(h)
        y = torch.stack(rows, dim=1).to(x.dtype)
        y = y if self.norm is None else self.norm(y)
        if self.gate_proj is not None and self.r.output_gate:
            y = y * activated(self.r.output_gate, self.gate_proj(x))
        return self.o_proj(y)

    def _decay(self, f: Tensor) -> Tensor:
        gate = torch.sigmoid(f)
        if self.decay_rate is not None:
            return torch.exp(-(self.r.power or 0.0) * gate * functional.softplus(self.decay_rate.to(f.dtype)))
        a = 1 - gate if self.r.decay == "update" else gate
        return a if self.decay_floor is None else self.decay_floor.to(f.dtype) * (1 - a) + a

    def _scale(self, a: Tensor) -> Tensor:
        if self.r.input_scale == "complement":
            return 1 - a
        if self.r.input_scale == "one":
            return torch.ones_like(a)
        scale = torch.sqrt(1 - a.square())
        if self.r.input_scale == "root_after_first":
            scale = torch.cat((torch.ones_like(scale[:, :1]), scale[:, 1:]), dim=1)
        return scale

    def _activated(self, v: Tensor) -> Tensor:
        name = self.r.value_activation
        if name is None:
            return v
        return torch.where(v >= 0, v + 0.5, torch.sigmoid(v)) if name == "mingru" else activated(name, v)


class LinearAttentionMixer(nn.Module):
    """One matrix for each head."""

    def __init__(self, r: LinearAttention, hidden: int) -> None:
        super().__init__()
        self.r = r
        keys, values = r.heads * r.key_size, r.heads * r.value_size
        self.q_proj = Linear(hidden, keys, bias=r.bias)
        self.k_proj = Linear(hidden, keys, bias=r.bias)
        self.v_proj = Linear(hidden, values, bias=r.bias)
        self.decay_proj = None
        if r.decay != "fixed":
            self.decay_proj = Linear(hidden, r.heads if r.decay == "head" else keys, bias=r.decay_bias)
        self.norm = Norm(r.norm, r.value_size if r.norm_over == "head" else values) if r.norm else None
        self.gate_proj = Linear(hidden, values, bias=r.bias) if r.output_gate else None
        self.o_proj = Linear(values, hidden, bias=r.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        r, kind = self.r, _wide(x)
        q, k = (self._featured(p(x).to(kind)).unflatten(-1, (r.heads, -1)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).to(kind).unflatten(-1, (r.heads, -1))
        decay = self._decay(x)
        state = x.new_zeros(x.shape[0], r.heads, r.key_size, r.value_size, dtype=kind)
        rows: list[Tensor] = []
        for t in range(x.shape[1]):
            state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            rows.append((q[:, t, :, None] @ state).squeeze(-2))
        scale = r.key_size**-0.5 if r.scale is None else r.scale
        y = (torch.stack(rows, dim=1) * scale).to(x.dtype)
        if self.norm is not None:
            y = self.norm(y) if r.norm_over == "head" else self.norm(y.flatten(-2)).view_as(y)
        y = y.flatten(-2)
        if self.gate_proj is not None and r.output_gate:
            y = y * activated(r.output_gate, self.gate_proj(x))
        return self.o_proj(y)

    def _decay(self, x: Tensor) -> Tensor:
        """Of the state's rows [B, T, H, K], or of all rows of a head [B, T, H, 1]."""
        r, kind = self.r, _wide(x)
        if self.decay_proj is None:
            return torch.tensor(r.rates, dtype=kind, device=x.device)[:, None].expand(*x.shape[:2], -1, 1)
        gate = torch.sigmoid(self.decay_proj(x).to(kind)).pow(1 / (r.temperature or 1.0))
        return gate.unflatten(-1, (r.heads, -1))

    def _featured(self, x: Tensor) -> Tensor:
        if self.r.feature == "elu":
            return functional.elu(x) + 1
        return x if self.r.feature is None else activated(self.r.feature, x)
