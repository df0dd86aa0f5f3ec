"""Mamba 1's forward pass on the names of mamba_ssm, token after token.

Sources of the formulas: Gu & Dao, arXiv 2312.00752, and state-spaces/mamba (models/mixer_seq_simple.py,
modules/mamba_simple.py, and ``selective_scan_ref`` of ops/selective_scan_interface.py). What they compute in float32
whatever the weights' type (the scan, the norms, by choice the residual stream) is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .llama_meta import RMSNorm
from .parts import Embedding, Linear, TiedHead, take


class Sizes(Struct, frozen=True):
    """What both Mambas are built from; ``residual_wide`` keeps the residual stream in float32 at least."""

    layers: int
    hidden: int
    inner: int
    state: int
    kernel: int
    vocab: int
    bias: bool
    conv_bias: bool
    norm_eps: float
    residual_wide: bool
    tied: bool


def sizes_of(dims: Mapping[str, Value]) -> Sizes:
    """The dims as a record. Raises MdlError (INPUT) when one is missing or of another type."""
    return Sizes(
        layers=take(dims, "layers", int),
        hidden=take(dims, "hidden", int),
        inner=take(dims, "inner", int),
        state=take(dims, "state", int),
        kernel=take(dims, "kernel", int),
        vocab=take(dims, "vocab", int),
        bias=take(dims, "bias", bool),
        conv_bias=take(dims, "conv_bias", bool),
        norm_eps=take(dims, "norm_eps", float),
        residual_wide=take(dims, "residual_in_fp32", bool),
        tied=take(dims, "tied", bool),
    )


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing or of another type.
    """
    rank = take(dims, "time_step_rank", int)
    return assemble(sizes_of(dims), lambda sizes: Mixer(sizes, rank))


def assemble(sizes: Sizes, mixer: Callable[[Sizes], nn.Module]) -> nn.Module:
    """The model whose blocks hold these mixers, on the meta device."""
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Model(sizes, mixer).eval()


class Model(nn.Module):
    """The whole model. ``lm_head`` holds a weight of its own only where the checkpoint's does."""

    def __init__(self, sizes: Sizes, mixer: Callable[[Sizes], nn.Module]) -> None:
        super().__init__()
        self.backbone = Backbone(sizes, mixer)
        self.lm_head = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]; T has no limit."""
        x = self.backbone(ids)
        if isinstance(self.lm_head, TiedHead):
            return self.lm_head(x, self.backbone.embedding.weight)
        return self.lm_head(x)


class Backbone(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, sizes: Sizes, mixer: Callable[[Sizes], nn.Module]) -> None:
        super().__init__()
        self.embedding = Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Block(sizes, mixer(sizes)) for _ in range(sizes.layers))
        self.norm_f = RMSNorm(sizes.hidden, sizes.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to hidden states [B, T, C]."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x).to(self.embedding.weight.dtype)


class Block(nn.Module):
    """The mixer on the normalised stream, added to it."""

    def __init__(self, sizes: Sizes, mixer: nn.Module) -> None:
        super().__init__()
        self.residual_wide = sizes.residual_wide
        self.norm = RMSNorm(sizes.hidden, sizes.norm_eps)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        if self.residual_wide:
            x = x.to(wide(x))
        return x + self.mixer(self.norm(x).to(self.norm.weight.dtype))


class Convolution(nn.Conv1d):
    """Each channel's own filter over the last positions, its own included, then SiLU."""

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__(channels, channels, kernel, groups=channels, padding=kernel - 1, bias=bias)

    def reset_parameters(self) -> None:
        """Leave the weights to the checkpoint."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name of it
        """Channels [B, T, D] to the same shape."""
        length = input.shape[1]
        return functional.silu(super().forward(input.transpose(1, 2))[..., :length]).transpose(1, 2)


class Mixer(nn.Module):
    """A selective state space: a state of N values for each channel, whose steps the input sizes."""

    def __init__(self, sizes: Sizes, rank: int) -> None:
        super().__init__()
        self.parts = [rank, sizes.state, sizes.state]
        self.A_log = nn.Parameter(torch.empty(sizes.inner, sizes.state))
        self.D = nn.Parameter(torch.empty(sizes.inner))
        self.in_proj = Linear(sizes.hidden, 2 * sizes.inner, bias=sizes.bias)
        self.conv1d = Convolution(sizes.inner, sizes.kernel, bias=sizes.conv_bias)
        self.x_proj = Linear(sizes.inner, sum(self.parts), bias=False)
        self.dt_proj = Linear(rank, sizes.inner, bias=True)
        self.out_proj = Linear(sizes.inner, sizes.hidden, bias=sizes.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x, gate = self.in_proj(u).chunk(2, dim=-1)
        x = self.conv1d(x)
        step, b, c = self.x_proj(x).split(self.parts, dim=-1)
        step = functional.linear(step, self.dt_proj.weight).to(wide(x))
        step = functional.softplus(step + self.dt_proj.bias.to(step.dtype))
        y = self._scan(x.to(step.dtype), step, b.to(step.dtype), c.to(step.dtype))
        return self.out_proj((y * functional.silu(gate.to(step.dtype))).to(u.dtype))

    def _scan(self, x: Tensor, step: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """x and step [B, T, D], b and c [B, T, N] to y [B, T, D]: h = exp(step·A)·h + step·b·x; y = c·h + D·x."""
        rate = -self.A_log.to(x.dtype).exp()
        state = x.new_zeros(x.shape[0], *rate.shape)
        rows: list[Tensor] = []
        for t in range(x.shape[1]):
            dt = step[:, t, :, None]
            state = (dt * rate).exp() * state + dt * b[:, t, None, :] * x[:, t, :, None]
            rows.append((state @ c[:, t, :, None]).squeeze(-1))
        return torch.stack(rows, dim=1) + self.D.to(x.dtype) * x


def wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)
