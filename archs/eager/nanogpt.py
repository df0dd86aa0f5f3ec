"""nanoGPT's forward pass on nanoGPT's own tensor names.

Learned positions, pre-norm blocks, one fused projection whose thirds are q, k and v, GELU, no dropout at inference.
Sources of the formulas: karpathy/nanoGPT and minGPT, model.py; build-nanogpt, train_gpt2.py. Module paths and
``state_dict()`` keys are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Value
from .gpt import Sizes, activation, attend, positions, sizes_of
from .parts import Embedding, Linear, TiedHead


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions. Raises MdlError (INPUT) when a dim is
    missing, has the wrong type, or describes a model that nanoGPT can't be.
    """
    sizes = sizes_of(dims, "nanoGPT")
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
        self.wte = Embedding(sizes.vocab, sizes.hidden)
        self.wpe = Embedding(sizes.context, sizes.hidden)
        self.h = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.ln_f = nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, bias=sizes.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to normalised hidden states [B, T, C]. Raises MdlError where T exceeds the context."""
        x = self.wte(ids) + positions(self.wpe, ids.shape[1])
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
        # the rows of c_attn are q, k and v one after the other, each head by head
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return self.c_proj(attend(q, k, v, self.heads))


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.c_fc = Linear(sizes.hidden, sizes.ffn, bias=sizes.bias)
        self.gelu = activation(sizes)
        self.c_proj = Linear(sizes.ffn, sizes.hidden, bias=sizes.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.c_proj(self.gelu(self.c_fc(x)))
