"""What the kernel is asked for depends on the memory that is free, and on nothing else."""

from __future__ import annotations

import pytest

from mdl.convert import file_cache
from mdl.convert.file_cache import call_size, too_large

GB = 10**9


def memory(monkeypatch: pytest.MonkeyPatch, free: int, available: int) -> None:
    monkeypatch.setattr(file_cache, "_memory", {"MemFree": free, "MemAvailable": available}.__getitem__)


def test_long_writes_only_where_free_memory_takes_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, free=4 * GB, available=20 * GB)
    assert (call_size(3 * GB), call_size(5 * GB)) == (1 << 20, 256 << 10)


def test_a_layout_stays_in_the_cache_where_it_fits_beside_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, free=0, available=20 * GB)
    assert not too_large([], 9 * GB)
    assert too_large([], 11 * GB)
    assert not too_large([], 19 * GB, sync=False)
    assert too_large([], 21 * GB, sync=False)


def test_the_kernels_own_words_are_read() -> None:
    assert call_size(0) == 1 << 20
    assert call_size(1 << 61) == 256 << 10
    assert too_large([], 1 << 61)
