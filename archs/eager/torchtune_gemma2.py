"""torchtune's Gemma 2 on its own names: Gemma with windows, capped scores, and norms behind attention and MLP.

Source: meta-pytorch/torchtune 0.6.1, models/gemma2/{_component_builders,_attention}.py. The dim ``softcap_of`` says
what the last tanh limits: ``logits`` as in Google's Gemma 2, ``hidden`` for the last hidden state as in torchtune.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from msgspec import Struct
from torch import Tensor, nn

from ..base import Value
from .llama_meta import Sizes, attend, sizes_of
from .parts import softcap, take
from .torchtune import Attention, Block, Decoder, Norm, Style

_STYLE = Style(interleaved=True, gemma=True)


class Caps(Struct, frozen=True):
    """What Gemma 2 has beside Gemma's sizes."""

    window: int
    scalar: float
    scores: float
    last: float
    of_logits: bool


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    sizes = sizes_of(dims)
    caps = Caps(
        window=take(dims, "sliding_window", int),
        scalar=take(dims, "attention_scalar", float),
        scores=take(dims, "attention_softcap", float),
        last=take(dims, "logit_softcap", float),
        of_logits=take(dims, "softcap_of", str) == "logits",
    )
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Decoder2(sizes, caps).eval()


class Decoder2(Decoder):
    """The whole model."""

    def __init__(self, sizes: Sizes, caps: Caps) -> None:
        super().__init__(sizes, _STYLE)
        self.caps = caps
        self.layers = nn.ModuleList(Block2(sizes, caps, i) for i in range(sizes.layers))
        self.norm = FinalNorm(sizes, 0.0 if caps.of_logits else caps.last)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        return softcap(super().forward(ids), self.caps.last if self.caps.of_logits else 0.0)


class FinalNorm(nn.Module):
    """The norm under the name that torchtune's own final norm gives it, with its cap, if that is not 0."""

    def __init__(self, sizes: Sizes, cap: float) -> None:
        super().__init__()
        self.cap = cap
        self.rms_norm = Norm(sizes.hidden, sizes, _STYLE)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return softcap(self.rms_norm(x), self.cap)


class Block2(Block):
    """Attention and MLP, each between two norms, each added to the stream."""

    def __init__(self, sizes: Sizes, caps: Caps, index: int) -> None:
        super().__init__(sizes, _STYLE)
        self.attn = Attention2(sizes, caps, 0 if index % 2 else caps.window)
        self.sa_scale = Norm(sizes.hidden, sizes, _STYLE)
        self.mlp_scale = Norm(sizes.hidden, sizes, _STYLE)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        x = x + self.sa_scale(self.attn(self.sa_norm(x), cos, sin))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class Attention2(Attention):
    """Causal self-attention with capped scores, in a window where there is one."""

    def __init__(self, sizes: Sizes, caps: Caps, window: int) -> None:
        super().__init__(sizes, _STYLE)
        self.window, self.scalar, self.cap = window, caps.scalar, caps.scores

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [B, T, H, D] and k, v [B, T, K, D] to what the heads gather [B, T, H·D]."""
        return attend(q, k, v, self.window, scalar=self.scalar, cap=self.cap)
