"""Makes values of one element type into those of another, at nearly the speed of memory.

numpy and ml_dtypes convert most pairs with a 16-bit or 8-bit type value by value: 0.3 to 0.7 s per GB read, 7 s from
float8 (`python benchmarks/values.py`). What they give is the truth here nonetheless, NaN and all: a table of it is
looked up where the source has at most 65,536 different values, and the arithmetic that stands in for it is held to it
bit by bit in tests/test_rounding.py. Pairs that they convert fast are left to them, float32 to bfloat16 above all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from msgspec import Struct

from .scratch import Array, Scratch
from .tensors import FLOATING, ITEMSIZE
from .turning import copy_turned

TILE = 1 << 20
"""Values of one or two bytes handled at a time, and a quarter as many wider ones. Fewer would stay nearer to the
processor, but threads hand Python's lock to each other between the calls, and four of them would do that most of the
time: with a quarter of this, a conversion takes up to half as long again."""
LOOKED = 1 << 18
"""Values that are looked up at a time: the places to look at take eight bytes each."""

_RAW = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}

_SIMPLE = {("bfloat16", "float32"), ("bfloat16", "float64")}
"""What ml_dtypes converts faster than a table does, though the source is narrow."""

_scratch = Scratch()


def raw_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type that carries values of ``dtype`` when they are only moved."""
    return np.dtype(_RAW.get(dtype, dtype))


def value_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type (ml_dtypes' for bfloat16 and float8) in which values of ``dtype`` are numbers."""
    if dtype in _RAW:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype))
    return np.dtype(dtype)


Note = Callable[[Array, Array, str, str], None]
"""Told of a rounding: the raw values before and after, and the two element types. Finite values that become neither
infinite nor 0 may be left out, for they lost nothing."""

Told = list[tuple[Array, Array]]
"""Pieces of the raw values before and after, one dimension each."""


class Rounding(Struct, frozen=True):
    """Raw values of one element type made into those of another, to nearest even."""

    source: str
    target: str
    note: Note | None = None

    def __call__(self, values: Array, out: Array | None = None) -> Array:
        """The rounded values in C order: in ``out``, raw and contiguous and of the same shape, where it is given.

        ``out`` must not share memory with ``values``.
        """
        made: Array = np.empty(values.shape, raw_dtype(self.target)) if out is None else out
        if made.shape != values.shape or made.dtype != raw_dtype(self.target) or not made.flags.c_contiguous:
            raise ValueError(f"{made.dtype} {made.shape} can't take {self.target} {values.shape} in C order")
        if not values.flags.c_contiguous:
            turned = np.empty(values.shape, values.dtype)
            copy_turned(values, turned)
            values = turned
        with np.errstate(all="ignore"):  # whoever watches counts what is lost; a warning would name no tensor
            self._round(values.reshape(-1), made.reshape(-1))
        return made

    def _round(self, values: Array, made: Array) -> None:
        before, after = _bits(values), _bits(made)
        fast = _FAST.get((self.source, self.target))
        whole = len(values) // 8 * 8 if fast else 0
        told: Told = []
        if fast:
            step = TILE if before.itemsize <= 2 else TILE // 4
            for some, theirs in _tiles(before[:whole], after[:whole], step):
                told += fast(some, theirs)
        if whole < len(values):
            told += _plainly(before[whole:], after[whole:], self.source, self.target)
        if self.note is not None and told and not _holds_all(self.source, self.target):
            one, other = told[0] if len(told) == 1 else map(np.concatenate, zip(*told, strict=True))
            self.note(one.view(values.dtype), other.view(made.dtype), self.source, self.target)


def _bits(values: Array) -> Array:
    return values.view(f"u{values.itemsize}") if values.itemsize <= 8 else values  # complex128 is only carried


def _tiles(values: Array, made: Array, step: int) -> Iterator[tuple[Array, Array]]:
    for start in range(0, len(values), step):
        yield values[start : start + step], made[start : start + step]


@functools.cache
def _holds_all(source: str, target: str) -> bool:
    """Whether no finite value of ``source`` becomes infinite or 0."""
    if not {source, target} <= FLOATING:
        return False
    import ml_dtypes

    one, other = (ml_dtypes.finfo(value_dtype(dtype)) for dtype in (source, target))
    return bool(float(one.max) <= float(other.max) and float(one.smallest_subnormal) >= float(other.smallest_subnormal))


def _plainly(values: Array, made: Array, source: str, target: str) -> Told:
    """As numpy and ml_dtypes do it, or by a table of that. Both arrays are bits, here and below."""
    if ITEMSIZE[source] > 2 or (source, target) in _SIMPLE or not {source, target} <= FLOATING:
        np.copyto(made.view(value_dtype(target)), values.view(value_dtype(source)), casting="unsafe")
    else:
        _look_up(values, made, _table(source, target))
    return [(values, made)]


@functools.cache
def _table(source: str, target: str) -> Array:
    """What each bit pattern of ``source`` becomes."""
    patterns = np.arange(1 << (8 * ITEMSIZE[source])).astype(f"u{ITEMSIZE[source]}").view(value_dtype(source))
    with np.errstate(all="ignore"):
        return patterns.astype(value_dtype(target)).view(f"u{ITEMSIZE[target]}")


def _look_up(values: Array, made: Array, table: Array) -> None:
    for some, theirs in _tiles(values, made, LOOKED):
        places = _scratch.take("places", len(some), "intp")
        np.copyto(places, some)
        table.take(places, out=theirs, mode="wrap")  # every place exists; the mode that checks works on a copy


def _bfloat16_to_float16(values: Array, made: Array) -> Told:
    """Where float16 has a normal number, it keeps every bit; the few others are looked up.

    The exponent's bias falls by 112, and three zeros follow the mantissa. Of the exponents 113 to 142, the upper three
    bits are 011 or 100: shifted by three, the last two of them are the upper bits, and equal. Adding 2^14 clears the
    first and turns the second round, which is what the bias does to it. The number of values is a multiple of 8.
    """
    shifted = np.add(values, values, out=_scratch.take("shifted", len(values), "uint16"))  # without the sign
    np.subtract(shifted, np.uint16(113 << 8), out=shifted)  # 0 is the smallest normal number; what is less wraps
    other = np.greater(shifted, np.uint16((30 << 8) - 1), out=_scratch.take("other", len(values), "bool"))
    np.multiply(values, np.uint16(8), out=shifted)
    np.add(shifted, np.uint16(1 << 14), out=shifted)
    np.bitwise_and(values, np.uint16(0x8000), out=made)
    np.bitwise_or(made, shifted, out=made)
    # Eight neighbours at a time: looking for single ones takes longer than all of the above.
    rows = np.flatnonzero(np.not_equal(other.view("uint64"), 0))
    table = _table("bfloat16", "float16")
    if len(rows) > len(values) // 64:  # by now a table for all is faster
        _look_up(values, made, table)
        return [(values, made)]
    before = values.view("V16")[rows].view("uint16")  # numpy moves eight values as one faster than as eight
    after = table.take(before)
    made.view("V16")[rows] = after.view("V16")
    return [(before, after)]


def _float32_to_float16(values: Array, made: Array) -> Told:
    """Lets the processor round: added to a power of two 2^13 times its own, a number keeps the 11 bits of a float16.

    So do numbers that become subnormal: what is added to them is what the smallest normal number gets. The sum less
    what was added is then an integer, to which the exponent is added in its place.
    """
    size = np.bitwise_and(values, np.uint32(0x7FFF_FFFF), out=_scratch.take("size", len(values), "uint32"))
    if size.max() >= 0x477F_F000:  # 65520, from where on infinity is nearest: such tiles are rare
        return _plainly(values, made, "float32", "float16")
    flushes = size.min() <= 0x3300_0000  # half of the smallest subnormal number, which rounds to the even 0
    power = np.bitwise_and(size, np.uint32(0x7F80_0000), out=_scratch.take("power", len(values), "uint32"))
    np.maximum(power, _smallest_normal()[: len(values)], out=power)
    np.add(power, np.uint32(13 << 23), out=power)
    total = size.view("float32")
    np.add(total, power.view("float32"), out=total)
    np.subtract(size, power, out=size)
    np.right_shift(power, np.uint32(13), out=power)
    np.add(size, power, out=size)
    np.right_shift(values, np.uint32(16), out=power)
    np.bitwise_and(power, np.uint32(0x8000), out=power)
    np.add(size, power, out=size)
    np.copyto(made, size, casting="unsafe")
    np.subtract(made, np.uint16(126 << 10 & 0xFFFF), out=made)
    return [(values, made)] if flushes else []


@functools.cache
def _smallest_normal() -> Array:
    """The bits of float16's smallest normal number, for each value of a tile: numpy takes the maximum of two arrays at
    five times the speed of that of an array and a number."""
    return np.full(TILE // 4, np.float32(2**-14).view("uint32"))


_FAST: dict[tuple[str, str], Callable[[Array, Array], Told]] = {
    ("bfloat16", "float16"): _bfloat16_to_float16,
    ("float32", "float16"): _float32_to_float16,
}
"""Arithmetic for what no table serves as well: bits before and after, a multiple of 8 of them. Returns what may have
lost something."""
