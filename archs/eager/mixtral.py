"""Mixtral's forward pass on the names of Mistral's own checkpoints, with experts one by one or stacked.

Source: mistralai/mistral-inference, moe.py: each token goes to the k experts with the largest router logits, and the
softmax over those k weighs what they return. Everything else is Meta Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Value
from .llama_meta import Block, FeedForward, Sizes, assemble, sizes_of
from .mixture import mixed, of_stacks
from .parts import Linear, take


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing or describes a model that this family can't be.
    """
    experts, chosen = take(dims, "experts", int), take(dims, "experts_per_token", int)
    stacked = take(dims, "stacked", bool)

    def block(sizes: Sizes) -> Block:
        if stacked:
            return Block(sizes, StackedExperts(sizes, experts, chosen), "block_sparse_moe")
        return Block(sizes, Experts(sizes, experts, chosen))

    return assemble(sizes_of(dims), block)


class Router(nn.Module):
    """Sends each token to the ``chosen`` experts of largest logit, weighed by the softmax over these."""

    def __init__(self, hidden: int, count: int, chosen: int) -> None:
        super().__init__()
        self.count, self.chosen = count, chosen
        self.gate = Linear(hidden, count, bias=False)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens [N, C]: the same shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        tokens = x.flatten(0, -2)
        logits, experts = self.gate(tokens).topk(self.chosen)
        weights = logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1).to(x.dtype)
        return mixed(tokens, weights, experts, self.count, self.expert).view_as(x)


class Experts(Router):
    """One SwiGLU per expert, under its number."""

    def __init__(self, sizes: Sizes, count: int, chosen: int) -> None:
        super().__init__(sizes.hidden, count, chosen)
        self.experts = nn.ModuleList(FeedForward(sizes.hidden, sizes.ffn) for _ in range(count))

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens [N, C]: the same shape."""
        return self.experts[index](x)


class StackedExperts(Router):
    """The experts' matrices below one another, each [E·F, C]; w2 too, whose parts are applied from the right."""

    def __init__(self, sizes: Sizes, count: int, chosen: int) -> None:
        super().__init__(sizes.hidden, count, chosen)
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.empty(count * sizes.ffn, sizes.hidden)) for _ in range(3))

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens [N, C]: the same shape."""
        return of_stacks(x, index, self.count, self.w1, self.w3, self.w2)
