"""Sizes of weight files, as people write them."""

from __future__ import annotations

import pytest

from mdl.convert.shards import parse_size
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
