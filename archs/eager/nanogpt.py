"""nanoGPT's forward pass on nanoGPT's own tensor names.

Learned positions, pre-norm blocks, one fused projection whose thirds are q, k and v, GELU, no dropout at inference.
Source of the formulas: karpathy/nanoGPT, model.py. Module paths and ``state_dict()`` keys are those of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import input_error
from ..base import Value
from .parts import Embedding, Linear, TiedHead, take

_APPROXIMATE = {"gelu": "none", "gelu_new": "tanh"}
"""Up to mid-2023 nanoGPT used the tanh form of GELU, since then the exact one (erf)."""


@dataclass(frozen=True)
class Sizes:
    """What the model is built from; ``context`` is the number of rows of the position table."""

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


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that nanoGPT can't be.
    """
    sizes = Sizes(
        layers=take(dims, "layers", int),
        heads=take(dims, "heads", int),
        hidden=take(dims, "hidden", int),
        ffn=take(dims, "ffn", int),
        vocab=take(dims, "vocab", int),
        context=take(dims, "context", int),
        bias=take(dims, "bias", bool),
        activation=take(dims, "activation", str),
        norm_eps=take(dims, "norm_eps", float),
        tied=take(dims, "tied", bool),
    )
    if sizes.activation not in _APPROXIMATE:
        raise input_error(
            f"nanoGPT has no activation {sizes.activation!r}", "dims: activation", "it must be gelu or gelu_new"
        )
    if sizes.hidden % sizes.heads:
        raise input_error(
            f"{sizes.hidden} channels can't be split into {sizes.heads} equal heads",
            "dims: hidden, heads",
            "check the number of heads that the checkpoint was trained with",
        )
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPT(sizes).eval()


class GPT(nn.Module):
    """The whole model. ``lm_head`` holds a weight of its own only where the checkpoint's does."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transformer = Trunk(sizes)
        self.lm_head = TiedHead() if sizes.tied else Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        x = self.transformer(ids)
        return self.lm_head(x, self.transformer.wte.weight) if isinstance(self.lm_head, TiedHead) else self.lm_head(x)


class Trunk(nn.Module):
    """Everything but the head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.context = sizes.context
        self.wte = Embedding(sizes.vocab, sizes.hidden)
        self.wpe = Embedding(sizes.context, sizes.hidden)
        self.h = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.ln_f = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=sizes.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to normalised hidden states [B, T, C]. Raises MdlError where T exceeds the context."""
        length = ids.shape[1]
        if length > self.context:
            raise input_error(
                f"{length} tokens do not fit a context of {self.context}",
                "input ids",
                "learned positions end there: use a shorter prompt",
            )
        x = self.wte(ids) + self.wpe(torch.arange(length, device=ids.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=sizes.bias)
        self.attn = Attention(sizes)
        self.ln_2 = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=sizes.bias)
        self.mlp = MLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal self-attention with as many key heads as query heads."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = Linear(sizes.hidden, 3 * sizes.hidden, bias=sizes.bias)
        self.c_proj = Linear(sizes.hidden, sizes.hidden, bias=sizes.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        B, T, C = x.shape
        # [3, B, H, T, D]: the rows of c_attn are q, k and v one after the other, each head by head
        q, k, v = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        # The fused kernel that nanoGPT calls keeps the scores of a bfloat16 run in float32; so does this.
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-2, -1) / math.sqrt(C // self.heads)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill_(future, -math.inf).softmax(dim=-1).to(x.dtype)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.c_fc = Linear(sizes.hidden, sizes.ffn, bias=sizes.bias)
        self.gelu = nn.GELU(approximate=_APPROXIMATE[sizes.activation])
        self.c_proj = Linear(sizes.ffn, sizes.hidden, bias=sizes.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.c_proj(self.gelu(self.c_fc(x)))
