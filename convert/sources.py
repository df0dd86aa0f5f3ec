"""From a planned source tensor to a lazy array over its files, rank files joined."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import input_error
from ..mappings.lazy import Array, Lazy, raw_dtype
from ..mappings.moves import Reshape
from ..mappings.tensors import TensorInfo
from .composed import composed
from .pieces import joined
from .plan import Source, by_rank
from .stored import check_end


class Tensors(Protocol):
    """Whatever makes lazy arrays of stored tensors: :class:`.stored.Files`, or :class:`Maps`."""

    def tensor(self, info: TensorInfo) -> Lazy:
        """A lazy view of one stored tensor."""
        ...


class Maps:
    """Read-only maps of files, for whoever keeps many tensors at hand without room for them. A context manager.

    Pages of a map belong to the file cache, not to this process. A file that is cut meanwhile ends the process, so
    this is for layouts, which are locked, and for what a user's own code runs on; a conversion reads through
    :class:`.stored.Files`.
    """

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def __enter__(self) -> Maps:
        return self

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:  # an array still looks into it; it is unmapped when that goes
                continue
        self._maps.clear()

    def tensor(self, info: TensorInfo) -> Lazy:
        """A lazy view of one stored tensor. Raises MdlError (INPUT) if the file has become too short for it."""
        raw = raw_dtype(info.dtype)
        if info.numel == 0:
            return Lazy.of(np.zeros(info.shape, raw), info.dtype)
        if info.pieces:
            return joined(info, self.tensor)
        if info.made:
            return composed(info, self.tensor)
        mapped = self._map(info.file)
        check_end(info, len(mapped))
        strides = tuple(s * raw.itemsize for s in info.stride)
        array: Array = np.ndarray(info.shape, raw, mapped, info.offset, strides)
        return Lazy.of(array, info.dtype)

    def _map(self, path: str) -> mmap.mmap:
        if path not in self._maps:
            with Path(path).open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


def lazy_source(files: Tensors, source: Source) -> Lazy:
    """The whole of one source tensor: its only file's view, or its rank files joined as the mapping says."""
    ranks = [_copies(source.name, [files.tensor(info) for info in copies]) for copies in by_rank(source.infos)]
    join = source.join
    if join is not None and join.view:
        ranks = [rank.reshape(Reshape(join.view).shape1(rank.shape)) for rank in ranks]
    first, rest = ranks[0], ranks[1:]
    if join is None or join.how == "disjoint" or not rest:
        return first
    if join.how == "cat":
        return first.concat(rest, join.axis)
    if join.how == "blocks":
        return _join_blocks(ranks, join.axis, join.sizes)
    if join.how == "equal":
        return first.combined(rest, _demand_equal(source.name))
    return first.summed(rest, mean=join.how == "mean")


def _copies(name: str, copies: list[Lazy]) -> Lazy:
    """What one rank holds in several files, for the experts are spread over them; compared while it is read."""
    return copies[0].combined(copies[1:], _demand_equal(name, "copy")) if copies[1:] else copies[0]


def _join_blocks(ranks: list[Lazy], axis: int, sizes: tuple[int, ...]) -> Lazy:
    """Each rank holds its share of every block: all shares of block 0 first, then of block 1, …"""
    parts: list[Lazy] = []
    at = 0
    for size in sizes:
        share = size // len(ranks)
        parts += [rank.slice(axis, at, at + share) for rank in ranks]
        at += share
    return parts[0].concat(parts[1:], axis)


def _demand_equal(name: str, kind: str = "rank") -> Callable[[list[Array]], Array]:
    def first_of(values: list[Array]) -> Array:
        for rank, other in enumerate(values[1:], start=1):
            if not same_bits(values[0], other):
                what = f"{name} should be the same in every {kind} file, but {kind} {rank} differs from {kind} 0"
                raise input_error(
                    what, do="these rank files are not of one checkpoint, or training let them drift apart"
                )
        return values[0]

    return first_of


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays of one type hold the same bytes: equal NaNs are equal, 0.0 and -0.0 are not."""
    one, other = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return a.shape == b.shape and bool(np.array_equal(one, other))


def same_values(a: Lazy, b: Lazy, limit: int = 1 << 20) -> bool:
    """Whether two arrays are equal bit for bit; stops at the first difference."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.shape:
        return same_bits(a.read(), b.read())
    rows = max(1, limit * a.shape[0] // max(a.nbytes, 1))
    for start in range(0, a.shape[0], rows):
        stop = min(start + rows, a.shape[0])
        if not same_bits(a.slice(0, start, stop).read(), b.slice(0, start, stop).read()):
            return False
    return True
