"""Sizes of weight files, as people write them."""

from __future__ import annotations

import itertools
import random

import pytest

from mdl.convert.shards import _even_cuts, parse_size
from mdl.errors import MdlError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("100B", 100), ("7", 7)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "five", "5XB", "-1GB", "0", "nan", "inf", "5 G B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(MdlError):
        parse_size(text)


def test_files_are_as_few_as_fit_and_nearly_of_one_size() -> None:
    rng = random.Random(0)  # noqa: S311 - sizes to try, not secrets
    for _ in range(300):
        sizes = [rng.choice([0, 10, 1_000, rng.randrange(1, 60_000)]) for _ in range(rng.randrange(1, 60))]
        limit = rng.randrange(60_000, 200_000)
        cuts = _even_cuts(list(itertools.accumulate(sizes)), limit)
        assert [k for start, stop in cuts for k in range(start, stop)] == list(range(len(sizes)))
        filled = [sum(sizes[start:stop]) for start, stop in cuts]
        assert max(filled) <= limit
        assert len(filled) == greedy(sizes, limit)
        assert greedy(sizes, max(filled) - (limit >> 10) - 1) > len(filled) or max(filled) <= limit >> 10


def greedy(sizes: list[int], limit: int) -> int:
    """How many files it takes when each is filled before the next is begun; too many where a tensor doesn't fit."""
    files, used = 1, 0
    for size in sizes:
        if size > limit:
            return len(sizes) + 1
        if used + size > limit:
            files, used = files + 1, 0
        used += size
    return files


def test_a_tensor_above_the_limit_has_a_file_of_its_own() -> None:
    assert _even_cuts([10, 110, 120], 50) == [(0, 1), (1, 2), (2, 3)]
    assert _even_cuts([], 50) == [(0, 0)]
