"""Copies arrays whose dimensions were reordered, at nearly the speed of memory.

numpy copies such a view row by row of the result, and so touches a cache line of the source for every single value;
where the distance between rows is a power of two, all those lines share a few places in the cache and are gone before
their neighbours are wanted: 4096 × 4096 values of float32 take 1.6 s per GB. Here a tile travels at a time: it is
copied as it lies into a buffer that stays in the cache, whose rows are padded, and numpy turns it from there. Tiles are
large, because every call of numpy's hands the interpreter's lock to another thread and waits to get it back.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from .scratch import Array, Scratch

TILE = 1 << 20
"""Bytes of a tile: a matrix's rows, as many as fit, because each of them adds a value to every run of the result."""

WIDE = 8192
"""Values of a row that a tile takes at most. Longer ones are cut, so that a tile still has many."""

_PADDING = 64
"""Bytes after each row of the buffer, so that rows don't share their place in the cache."""

_SMALL = 1 << 14
"""Bytes below which tiles gain nothing."""

_scratch = Scratch()


def copy_turned(view: Array, out: Array) -> None:
    """Copy ``view`` into ``out``: arrays of any strides, of the same shape and dtype, that share no memory."""
    if out.shape != view.shape or out.dtype != view.dtype:
        raise ValueError(f"{out.dtype} {out.shape} can't take {view.dtype} {view.shape}")
    source, target = _simplified(view, out)
    if source.ndim < 2 or source.nbytes <= _SMALL or source.strides[-1] == source.itemsize:
        np.copyto(target, source)
        return
    order = sorted(range(source.ndim), key=lambda k: -abs(source.strides[k]))
    sides = _sides(source.shape, order, TILE // source.itemsize)
    for corner in itertools.product(*(range(0, n, side) for n, side in zip(source.shape, sides, strict=True))):
        tile = tuple([slice(at, at + side) for at, side in zip(corner, sides, strict=True)])
        _turn(source[tile].transpose(order), target[tile].transpose(order))


def _simplified(view: Array, out: Array) -> tuple[Array, Array]:
    """The same copy in fewer dimensions: neighbours that are one run in both arrays become one dimension."""
    dims: list[tuple[int, int, int]] = []
    for size, one, other in zip(view.shape, view.strides, out.strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * one and dims[-1][2] == size * other:
            dims[-1] = dims[-1][0] * size, one, other
        else:
            dims.append((size, one, other))
    shape, ones, others = zip(*dims, strict=True) if dims else ((), (), ())
    source = np.lib.stride_tricks.as_strided(view, shape, ones, writeable=False)
    return _widened(source, np.lib.stride_tricks.as_strided(out, shape, others))


def _widened(source: Array, target: Array) -> tuple[Array, Array]:
    """Short runs side by side in both, such as the two halves of a rotary pair, become one value of their width."""
    run = source.shape[-1] * source.itemsize if source.ndim else 0
    if source.ndim < 2 or run not in (2, 4, 8) or not source.strides[-1] == target.strides[-1] == source.itemsize:
        return source, target
    wide = f"u{run}"
    return source.view(wide)[..., 0], target.view(wide)[..., 0]


def _sides(shape: tuple[int, ...], outer_first: list[int], count: int) -> list[int]:
    """How far a tile of at most ``count`` values reaches along each dimension: a row of the source, or WIDE values of
    it, then as far as it can along the result's."""
    sides = [1] * len(shape)
    for axes, most in ((reversed(outer_first), min(WIDE, count)), (range(len(shape) - 1, -1, -1), count)):
        for axis in axes:
            left = most // math.prod(sides) * sides[axis]
            sides[axis] = max(sides[axis], min(shape[axis], left))
    return sides


def _turn(source: Array, target: Array) -> None:
    """Copy one tile, both in the source's order, by way of the buffer."""
    pitch = source.shape[-1] + _PADDING // source.itemsize
    held = _scratch.take("tile", math.prod(source.shape[:-1]) * pitch, source.dtype)
    tile = held.reshape(*source.shape[:-1], pitch)[..., : source.shape[-1]]
    np.copyto(tile, source)
    np.copyto(target, tile)
