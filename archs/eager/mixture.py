"""What the eager references of mixtures of experts share: tokens sent to their experts, and experts in stacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def mixed(
    tokens: Tensor, weights: Tensor, chosen: Tensor, count: int, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What its experts make of each token, weighed and added up: [N, C] of ``tokens`` [N, C].

    ``chosen`` [N, k] are the numbers of a token's experts, of ``count``, and ``weights`` [N, k] theirs.
    """
    made = torch.zeros_like(tokens)
    for index in range(count):
        rows, place = torch.where(chosen == index)
        made[rows] += weights[rows, place, None].to(tokens.dtype) * expert(index, tokens[rows])
    return made


def of_stacks(x: Tensor, index: int, count: int, gate: Tensor, value: Tensor, down: Tensor) -> Tensor:
    """What one expert makes of tokens [N, C], the same shape: its SwiGLU's matrices lie below those of others in stacks
    of ``count``, [E·F, C] each; ``down`` too, whose parts are applied from the right."""
    gate, value, down = (stack.chunk(count)[index] for stack in (gate, value, down))
    return (functional.silu(x @ gate.T) * (x @ value.T)) @ down
