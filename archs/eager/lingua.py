"""lingua's LMTransformer: Meta's forward, but for its norm, whose weight multiplies before the cast back.

Source: facebookresearch/lingua, lingua/transformer.py and apps/main/transformer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Value
from .llama_meta import Block as MetaBlock
from .llama_meta import RMSNorm, Sizes, Transformer, sizes_of


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights: token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT)."""
    sizes = sizes_of(dims)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Transformer(sizes, Block, Norm(sizes.hidden, sizes.norm_eps)).eval()


class Norm(RMSNorm):
    """Division by the root mean square, times the weight, in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)


class Block(MetaBlock):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.attention_norm = Norm(sizes.hidden, sizes.norm_eps)
        self.ffn_norm = Norm(sizes.hidden, sizes.norm_eps)
