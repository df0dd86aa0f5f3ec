"""What both sides are fed: every token once, one long sequence, and the user's own prompts; all from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LOGITS_BUDGET = 1 << 27
"""Tokens x vocabulary of the covering inputs: bounds time and disk where the vocabulary is large."""


@dataclass(frozen=True)
class Input:
    """One sequence of token ids. ``kind`` is ``vocabulary``, ``long`` or ``prompt``."""

    kind: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Inputs:
    """All sequences of a run, and how much of the vocabulary they touch."""

    sequences: tuple[Input, ...]
    vocab: int
    seed: int

    @property
    def covered(self) -> int:
        """How many distinct token ids occur."""
        return len({token for one in self.sequences for token in one.ids})

    @property
    def tokens(self) -> int:
        """Positions in all."""
        return sum(len(one.ids) for one in self.sequences)


def make_inputs(vocab: int, context: int, *, seed: int = 0, prompts: Sequence[Sequence[int]] = ()) -> Inputs:
    """Inputs for a model of ``vocab`` embedding rows and ``context`` positions.

    The vocabulary is dealt out as a seeded permutation in sequences of up to 256 tokens, so that every embedding
    row and every special token is used once (or as many as the budget allows). The long sequence of up to 512
    tokens is where rotary scaling, windows and learned positions show.
    """
    rng = random.Random(seed)  # noqa: S311  (reproducible inputs, not secrets)
    order = list(range(vocab))
    rng.shuffle(order)
    order = order[: max(1024, LOGITS_BUDGET // vocab)]
    width = max(1, min(256, context - 1))
    dealt = [Input("vocabulary", tuple(order[k : k + width])) for k in range(0, len(order), width)]
    length = max(1, min(512, context - 1))
    long = Input("long", tuple(rng.randrange(vocab) for _ in range(length)))
    own = [Input("prompt", tuple(prompt)) for prompt in prompts if prompt]
    return Inputs((*dealt, long, *own), vocab, seed)
