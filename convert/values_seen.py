"""What the values of a tensor look like, seen while they are copied: NaN and Inf, constants, and what rounding lost.

Looking costs two reductions over the bits of each block while it is in the CPU's cache, about 0.02 s per GB: read as
integers, the numbers that are not finite are the largest ones of either sign. Nothing is converted, so bfloat16 and
float8 cost what float32 costs. Only a block that holds such a number is looked at again, to count and to place it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from msgspec import Struct

from ..mappings.lazy import Array, raw_dtype, value_dtype
from ..mappings.tensors import ITEMSIZE, Shape

_INFINITE = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7C,
}
"""The bits of infinity; what lies above is NaN. float8_e4m3fn has no infinity, and one NaN of either sign."""


class Values(Struct, frozen=True):
    """What was seen of one tensor.

    ``first`` is the index of the first value that is not finite. ``overflowed`` counts finite values that a rounding
    made infinite (or NaN, where the type has no infinity), ``flushed`` those other than 0 that it made 0.
    ``constant`` is the value that all of the tensor's values have, if they do.
    """

    count: int
    nan: int = 0
    inf: int = 0
    first: Shape | None = None
    overflowed: int = 0
    flushed: int = 0
    constant: float | None = None


class Seen:
    """Collects :class:`Values` of one tensor: feed it every block, then ask for :meth:`result`.

    A block is raw values in C order. Blocks follow each other unless ``at`` says where one begins, so that the parts
    of a tensor may come in any order. Not safe for several threads: give each tensor to one.
    """

    def __init__(self, shape: Shape, dtype: str) -> None:
        self._shape, self._dtype = shape, dtype
        self._count = self._nan = self._inf = self._overflowed = self._flushed = self._next = 0
        self._first: int | None = None
        self._bits: int | None = None
        self._zero = self._constant = True

    def feed(self, block: Array, at: int | None = None) -> None:
        """Look at a block; ``at`` is the position of its first value in the tensor, in elements."""
        start = self._next if at is None else at
        self._next = start + block.size
        self._count += block.size
        if not block.size or self._dtype not in _INFINITE:
            return
        bits = _unsigned(block.reshape(-1))
        highest, lowest = _extremes(bits)
        if _beyond(highest, lowest, self._dtype):
            self._count_nonfinite(bits, start)
        sign = 1 << (8 * bits.itemsize - 1)
        self._zero = self._zero and (lowest == 0 or (lowest == sign and highest <= 0))
        if self._bits is None:
            self._bits = int(bits[0])
        # Where the largest is not the first, the smallest is not asked for: that spares a pass.
        self._constant = self._constant and lowest == self._bits == int(bits.min())

    def rounded(self, before: Array, after: Array, source: str, target: str) -> None:
        """Count what a rounding lost. For :meth:`~mdl.mappings.lazy.Lazy.watched`.

        Two reductions tell whether anything is infinite now and two whether anything is 0; only then is it counted.
        """
        if ITEMSIZE[target] > ITEMSIZE[source] or not after.size:
            return  # a wider type holds everything
        one, other = _unsigned(before), _unsigned(after)
        if _beyond(*_extremes(other), target):
            self._overflowed += int(np.count_nonzero(_nonfinite(other, target) & ~_nonfinite(one, source)))
        if _has_zero(other):
            self._flushed += _zeros(other) - _zeros(one)  # zero stays zero

    def result(self) -> Values:
        """What was seen so far."""
        first = None if self._first is None else _index(self._first, self._shape)
        lost = self._overflowed, self._flushed
        return Values(self._count, self._nan, self._inf, first, *lost, self._constant_value())

    def _count_nonfinite(self, bits: Array, start: int) -> None:
        bad = np.flatnonzero(_nonfinite(bits, self._dtype))
        inf = int(np.count_nonzero(_magnitude(bits[bad]) == _INFINITE[self._dtype]))
        inf = 0 if self._dtype == "float8_e4m3fn" else inf
        self._inf += inf
        self._nan += len(bad) - inf
        first = start + int(bad[0])
        self._first = first if self._first is None else min(first, self._first)

    def _constant_value(self) -> float | None:
        if self._bits is None:
            return None
        if self._zero:
            return 0.0  # whatever their signs
        if not self._constant:
            return None
        one: Array = np.array([self._bits], f"u{ITEMSIZE[self._dtype]}")
        return float(one.view(raw_dtype(self._dtype)).view(value_dtype(self._dtype))[0])


def _unsigned(values: Array) -> Array:
    return values.view(f"u{values.itemsize}")


def _extremes(bits: Array) -> tuple[int, int]:
    """The largest as signed and as unsigned integers: the positive and the negative number farthest from 0."""
    return int(bits.view(f"i{bits.itemsize}").max()), int(bits.max())


def _beyond(highest: int, lowest: int, dtype: str) -> bool:
    limit = _INFINITE[dtype]
    return highest >= limit or lowest >= limit | (1 << (8 * ITEMSIZE[dtype] - 1))


def _magnitude(bits: Array) -> Array:
    return bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)


def _nonfinite(bits: Array, dtype: str) -> Array:
    return _magnitude(bits) >= bits.dtype.type(_INFINITE[dtype])


def _has_zero(bits: Array) -> bool:
    """Whether either zero is there: one is the smallest unsigned integer, the other the smallest signed one."""
    signed = bits.view(f"i{bits.itemsize}")
    return int(bits.min()) == 0 or int(signed.min()) == np.iinfo(signed.dtype).min


def _zeros(bits: Array) -> int:
    return bits.size - int(np.count_nonzero(bits << bits.dtype.type(1)))  # the shift drops the sign


def _index(position: int, shape: Shape) -> Shape:
    found: list[int] = []
    for k in range(len(shape)):
        inner = math.prod(shape[k + 1 :])
        found.append(position // inner)
        position %= inner
    return tuple(found)


def describe(values: Values) -> dict[str, Any]:
    """The counts of what is not finite, as the manifest holds them."""
    return {"nan": values.nan, "inf": values.inf, "of": values.count, "first": list(values.first or ())}
