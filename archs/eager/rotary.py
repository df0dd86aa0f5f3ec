"""Rotary positions: the table of angles, and the two ways in which channels are paired.

Sources of the formulas: RoFormer (arXiv 2104.09864) and meta-llama/llama-models, models/llama3/model.py.
"""

from __future__ import annotations

import math

import torch
from msgspec import Struct
from torch import Tensor


class Scaling(Struct, frozen=True):
    """How Llama 3.1 and later stretch the slow rotations, so that a longer context stays within trained angles."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


class Yarn(Struct, frozen=True):
    """YaRN (arXiv 2309.00071): fast rotations are kept, slow ones stretched, with a ramp between in pairs of channels.

    The ramp begins at the pair that turns ``beta_fast`` times within original_context, and ends at that which turns
    ``beta_slow`` times. Cosines and sines are multiplied by ``0.1 · ln(factor) + 1``.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int


class Rotary(Struct, frozen=True):
    """What the rotary table is computed from."""

    head_dim: int
    theta: float
    scaling: Scaling | None = None
    factor: float = 1.0
    """By which all rotations alike are slowed down, as with linear scaling."""
    yarn: Yarn | None = None


def rotary_table(rotary: Rotary, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2] of the angle by which pair j is turned at position t: ``t · theta^(-2j/D) / factor``.

    float32 on the CPU whatever the model's dtype and device: the rounding of the table is part of the model.
    With scaling, wavelengths beyond original_context / low_freq_factor are stretched by factor, those below
    original_context / high_freq_factor are kept, those between are blended (llama-models, models/llama3/model.py).
    """
    pairs = torch.arange(0, rotary.head_dim, 2, dtype=torch.float32, device="cpu")
    freqs = 1.0 / (rotary.theta ** (pairs / rotary.head_dim)) / rotary.factor
    if rotary.scaling is not None:
        freqs = stretched(freqs, rotary.scaling)
    if rotary.yarn is not None:
        freqs = ramped(freqs, rotary, rotary.yarn)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), freqs)
    louder = 0.1 * math.log(rotary.yarn.factor) + 1.0 if rotary.yarn is not None else 1.0
    return angles.cos() * louder, angles.sin() * louder


def ramped(freqs: Tensor, rotary: Rotary, yarn: Yarn) -> Tensor:
    """YaRN's mixture of the frequencies [D/2] and of those frequencies divided by its factor."""
    last = len(freqs) - 1
    places = [
        rotary.head_dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    ]
    begin, end = max(math.floor(places[0]), 0), min(math.ceil(places[1]), last)
    pairs = torch.arange(last + 1, dtype=torch.float32, device=freqs.device)
    slow = ((pairs - begin) / max(end - begin, 1e-3)).clamp(0, 1)
    return freqs / yarn.factor * slow + freqs * (1 - slow)


def stretched(freqs: Tensor, scaling: Scaling) -> Tensor:
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    waves = 2 * math.pi / freqs
    kept = (context / waves - low) / (high - low)
    blended = (1 - kept) * freqs / scaling.factor + kept * freqs
    ends = torch.where(waves > context / low, freqs / scaling.factor, freqs)
    return torch.where((waves >= context / high) & (waves <= context / low), blended, ends)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels (2j, 2j+1) of x [B, T, heads, D] by the table's angles [T, D/2].

    Computed in float32 at least, then cast back to the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.device, wide)[:, None, :], sin.to(x.device, wide)[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels (j, j + D/2) of x [B, T, heads, D] by the table's angles [T, D/2], as GPT-NeoX pairs them.

    Computed in float32 at least, then cast back to the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    low, high = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(x.device, wide)[:, None, :], sin.to(x.device, wide)[:, None, :]
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1).to(x.dtype)
