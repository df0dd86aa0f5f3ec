"""What both sides are fed: every token once, one long sequence, and the user's own prompts; all from one seed."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from .record import deal


class Input(Struct, frozen=True):
    """One sequence of token ids. ``kind`` is ``vocabulary``, ``long``, ``prompt``, or ``greedy`` for what a recorded
    reference itself went on with."""

    kind: str
    ids: tuple[int, ...]


class Inputs(Struct, frozen=True):
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
    dealt = [Input(one["kind"], tuple(one["ids"])) for one in deal(vocab, context, seed)]
    own = [Input("prompt", tuple(prompt)) for prompt in prompts if prompt]
    return Inputs((*dealt, *own), vocab, seed)
