"""What the eager references of GPT-2's shape share: sizes, activations, the position table, causal attention.

Learned positions, pre-norm blocks, as many key heads as query heads. The families differ in names, in how q, k and v
are stored, and in the activation; each spells out its own modules, so that ``state_dict()`` keys are the checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from msgspec import Struct
from torch import Tensor, nn

from ...errors import input_error
from ..base import Value
from .parts import LEARNED, Embedding, check_length, take

GELUS = ("gelu", "gelu_new")
"""The exact form (erf) and the tanh form."""


class Sizes(Struct, frozen=True):
    """What a model is built from; ``context`` is the number of rows of the position table.

    ``bias`` is whether the family's optional biases are there; which ones those are, the family says.
    """

    layers: int
    heads: int
    hidden: int
    ffn: int
    vocab: int
    context: int
    bias: bool
    activation: str
    norm_eps: float
    tied: bool


def sizes_of(dims: Mapping[str, Value], family: str, activations: tuple[str, ...] = GELUS) -> Sizes:
    """The dims as a record; a family without the dim ``bias`` has its biases always.

    Raises MdlError (INPUT) when a dim is missing, has the wrong type, or describes a model that ``family`` can't be.
    """
    sizes = Sizes(
        layers=take(dims, "layers", int),
        heads=take(dims, "heads", int),
        hidden=take(dims, "hidden", int),
        ffn=take(dims, "ffn", int),
        vocab=take(dims, "vocab", int),
        context=take(dims, "context", int),
        bias=take(dims, "bias", bool) if "bias" in dims else True,
        activation=take(dims, "activation", str),
        norm_eps=take(dims, "norm_eps", float),
        tied=take(dims, "tied", bool),
    )
    if sizes.activation not in activations:
        what = f"{family} has no activation {sizes.activation!r}"
        raise input_error(what, "dims: activation", f"it must be {' or '.join(activations)}")
    if sizes.heads < 1 or sizes.hidden % sizes.heads:
        raise input_error(
            f"{sizes.hidden} channels can't be split into {sizes.heads} equal heads",
            "dims: hidden, heads",
            "check the number of heads that the checkpoint was trained with",
        )
    return sizes


def activation(sizes: Sizes) -> nn.Module:
    """ReLU, or GELU: exact (erf) or, for ``gelu_new``, the tanh approximation of Hendrycks & Gimpel (2016)."""
    if sizes.activation == "relu":
        return nn.ReLU()
    return nn.GELU(approximate="tanh" if sizes.activation == "gelu_new" else "none")


def positions(table: Embedding | nn.Parameter, length: int) -> Tensor:
    """The first ``length`` rows [T, C] of a table of positions, or [1, T, C] of one that is kept in that shape.

    Raises MdlError (INPUT) where T exceeds the context.
    """
    weight = table.weight if isinstance(table, nn.Embedding) else table
    check_length(length, weight.shape[-2], LEARNED)
    if isinstance(table, nn.Embedding):  # called, so that whoever watches the model's modules sees it
        return table(torch.arange(length, device=weight.device))
    return weight[..., :length, :]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Causal attention of ``heads`` heads: q, k, v [B, T, C] to [B, T, C], softmax(q·k / √D) v in each head.

    The channels of a head lie together, head after head. A fused kernel keeps the scores of a bfloat16 run in float32;
    so does this, which can only make a reference sharper where the original spells its softmax out.
    """
    B, T, C = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.view(B, T, heads, C // heads).transpose(1, 2) for x in (q, k, v))
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) / math.sqrt(C // heads)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill_(future, -math.inf).softmax(dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).reshape(B, T, C)
