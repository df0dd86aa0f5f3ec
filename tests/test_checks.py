"""Verdicts on greedy tokens: equal, tied, wrong, and against a recording that knows one continuation only."""

from __future__ import annotations

import pytest
import torch

from mdl.validate.checks import generate_check, recorded_check
from mdl.validate.compare import Distance

FLOOR = Distance((1e-12,) * 4, (1.0,) * 4)


def logits(*best: int, second: int = 9, gap: float = 1.0) -> torch.Tensor:
    """[N, 10]: at each position ``best`` is likeliest, and ``second`` comes after it by ``gap``."""
    rows = torch.zeros(len(best), 10, dtype=torch.float64)
    for row, token in zip(rows, best, strict=True):
        row[token], row[second] = 5.0, 5.0 - gap
    return rows


def test_equal_tokens() -> None:
    check = recorded_check([1, 2, 3, 4], [1, 2, 3, 4], logits(1, 2, 3, 4), FLOOR)

    assert (check.ok, check.measured) == (True, "4 greedy tokens equal")


@pytest.mark.parametrize("at", range(4))
def test_a_wrong_token_fails(at: int) -> None:
    tokens = [1, 2, 3, 4]
    tokens[at] = 9

    check = recorded_check(tokens, [1, 2, 3, 4], logits(1, 2, 3, 4), FLOOR)

    assert check.ok is False
    assert f"token {at} is 9, the reference's is {at + 1}" in check.detail[0]


def test_after_a_tie_the_recording_knows_no_more() -> None:
    """The tokens after it belong to another text: they are neither right nor wrong."""
    check = recorded_check([1, 9, 0, 0], [1, 2, 3, 4], logits(1, 2, 3, 4, gap=1e-9), FLOOR)

    assert check.ok is True
    assert check.measured == "1 of 4 greedy tokens equal, then a tie"
    assert "token 1 is a tie" in check.detail[0]
    assert "2 tokens were not judged" in check.detail[1]


def test_a_tie_at_the_end_leaves_nothing_unjudged() -> None:
    check = recorded_check([1, 2, 3, 9], [1, 2, 3, 4], logits(1, 2, 3, 4, gap=1e-9), FLOOR)

    assert (check.ok, check.measured) == (True, "4 greedy tokens equal")


def test_a_live_reference_judges_every_token() -> None:
    right, wrong = logits(1, 2, 3, 4), logits(1, 2, 3, 4)
    wrong[3, 4] = 0.0

    assert generate_check([1, 2, 3, 4], right, FLOOR).ok is True
    assert generate_check([1, 2, 3, 4], wrong, FLOOR).ok is False
