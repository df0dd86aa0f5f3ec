"""Mamba 2's forward pass on the names of mamba_ssm, token after token.

Sources of the formulas: Dao & Gu, arXiv 2405.21060, and state-spaces/mamba (modules/mamba2.py, and ``rms_norm_ref`` of
ops/triton/layernorm_gated.py). Heads share B and C in groups, and the gated norm is one of each group; in the class of
transformers it is one of all channels, which is the same for one group only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value
from .mamba import Convolution, Sizes, assemble, sizes_of, wide
from .parts import Linear, take


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing, of another type, or describes a model that this family can't be.
    """
    heads, groups = take(dims, "ssm_heads", int), take(dims, "groups", int)
    sizes = sizes_of(dims)
    if groups < 1 or heads % groups or heads < 1 or sizes.inner % heads:
        what = f"{sizes.inner} channels can't be {heads} heads in {groups} groups"
        raise input_error(what, "dims: inner, ssm_heads, groups", "check ngroups and headdim")
    return assemble(sizes, lambda sizes: Mixer(sizes, heads, groups))


class Mixer(nn.Module):
    """A state of [P, N] for each head, whose decay is one number; B and C are shared by the heads of a group."""

    def __init__(self, sizes: Sizes, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        shared = groups * sizes.state
        self.parts = [sizes.inner, sizes.inner + 2 * shared, heads]  # gate; what is convolved; time steps
        self.convolved = [sizes.inner, shared, shared]  # channels, B, C
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.in_proj = Linear(sizes.hidden, sum(self.parts), bias=sizes.bias)
        self.conv1d = Convolution(self.parts[1], sizes.kernel, bias=sizes.conv_bias)
        self.norm = GatedNorm(sizes.inner, groups, sizes.norm_eps)
        self.out_proj = Linear(sizes.inner, sizes.hidden, bias=sizes.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        gate, x, step = self.in_proj(u).split(self.parts, dim=-1)
        kind = wide(u)
        x, b, c = (part.to(kind) for part in self.conv1d(x).split(self.convolved, dim=-1))
        step = functional.softplus(step.to(kind) + self.dt_bias.to(kind))
        each = self.heads // self.groups
        b, c = (s.unflatten(-1, (self.groups, -1)).repeat_interleave(each, dim=2) for s in (b, c))
        y = self._scan(x.unflatten(-1, (self.heads, -1)), step, b, c)
        return self.out_proj(self.norm(y.flatten(-2).to(u.dtype), gate))

    def _scan(self, x: Tensor, step: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """x [B, T, H, P], step [B, T, H], b and c [B, T, H, N] to y like x.

        h = exp(step·A)·h + step·x·b; y = h·c + D·x.
        """
        decay = (step * -self.A_log.to(x.dtype).exp()).exp()
        state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1])
        rows: list[Tensor] = []
        for t in range(x.shape[1]):
            new = (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
            state = decay[:, t, :, None, None] * state + new
            rows.append((state @ c[:, t, :, :, None]).squeeze(-1))
        return torch.stack(rows, dim=1) + self.D.to(x.dtype)[:, None] * x


class GatedNorm(nn.Module):
    """The gate first, then division by the root mean square of each group of channels."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Channels [B, T, D] and their gate to the same shape."""
        kind = wide(x)
        gated = (x.to(kind) * functional.silu(gate.to(kind))).unflatten(-1, (self.groups, -1))
        normed = (gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return (normed * self.weight.to(kind)).to(x.dtype)
