"""Arrays that are described first and read later, piece by piece.

A :class:`Lazy` is a tree of strided views into files, joins, zeros and element-wise arithmetic.
Reordering operations only change the description; :meth:`Lazy.blocks` then yields the values in C order in
pieces of bounded size. That is what lets a conversion run in constant memory, whatever the tensor.

Values of types that numpy lacks (bfloat16, float8) travel as unsigned integers of the same width and are
interpreted, with ml_dtypes, only where arithmetic needs them.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .nodes import Node, Strided, Zeros
from .rounding import Array, Note, Rounding, raw_dtype, value_dtype
from .scratch import Scratch
from .tensors import ITEMSIZE, Shape


class _Depth(threading.local):
    """How many computations this thread is in, each waiting for its operands."""

    value = 0


_depth = _Depth()
_operands = Scratch()


class Joined(Node, Struct, frozen=True):
    """Several arrays side by side along one dimension."""

    axis: int
    parts: tuple[Lazy, ...]

    @property
    def shape(self) -> Shape:  # type: ignore[override]  # computed here, a plain attribute in the base
        first = self.parts[0].shape
        total = sum(p.shape[self.axis] for p in self.parts)
        return (*first[: self.axis], total, *first[self.axis + 1 :])

    def split(self, axis: int, sizes: Shape) -> Node:
        if axis != self.axis:
            moved = self.axis + (len(sizes) - 1 if axis < self.axis else 0)
            return Joined(moved, tuple(p.unflatten(axis, sizes) for p in self.parts))
        inner, parts = math.prod(sizes[1:]), self.parts
        if any(p.shape[axis] % inner for p in parts):
            ends = itertools.accumulate((p.shape[axis] for p in parts), initial=0)
            edges = sorted({edge for end in ends for edge in (end // inner * inner, -(-end // inner) * inner)})
            parts = tuple(self._part(*edge) for edge in itertools.pairwise(edges))
        return Joined(axis, tuple(p.unflatten(axis, (p.shape[axis] // inner, *sizes[1:])) for p in parts))

    def _part(self, start: int, stop: int) -> Lazy:
        """What lies between two places of the axis; its values, where a boundary in between keeps it from a split."""
        held = self.slice(self.axis, start, stop)
        return held.parts[0] if len(held.parts) == 1 else Lazy.of(held.read(), held.parts[0].dtype)

    def permute(self, order: Shape) -> Node:
        return Joined(order.index(self.axis), tuple(p.transpose(*order) for p in self.parts))

    def slice(self, axis: int, start: int, stop: int) -> Joined:
        if axis != self.axis:
            return Joined(self.axis, tuple(p.slice(axis, start, stop) for p in self.parts))
        kept: list[Lazy] = []
        at = 0
        for part in self.parts:
            size = part.shape[axis]
            low, high = max(start - at, 0), min(stop - at, size)
            if low < high:
                kept.append(part.slice(axis, low, high))
            at += size
        return Joined(axis, tuple(kept) or (self.parts[0].slice(axis, 0, 0),))

    def read(self) -> Array:
        if len(self.parts) == 1:
            return self.parts[0].read()
        return np.concatenate([p.read() for p in self.parts], axis=self.axis)

    def read_into(self, out: Array) -> None:
        at = 0
        for part in self.parts:
            stop = at + part.shape[self.axis]
            part.read_into(out[(slice(None),) * self.axis + (slice(at, stop),)])
            at = stop

    @property
    def turned(self) -> int:
        return max(p.node.turned for p in self.parts)

    @property
    def computed(self) -> bool:
        return any(p.node.computed for p in self.parts)

    def watched(self, note: Note) -> Node:
        return Joined(self.axis, tuple(p.watched(note) for p in self.parts))


class Computed(Node, Struct, frozen=True):
    """Element-wise arithmetic over arrays of one shape and ``dtype``, then perhaps a rounding; structure passes to the
    operands."""

    function: Callable[[list[Array]], Array]
    parts: tuple[Node, ...]
    dtype: str
    rounding: Rounding | None = None

    @property
    def shape(self) -> Shape:  # type: ignore[override]  # computed here, a plain attribute in the base
        return self.parts[0].shape

    def split(self, axis: int, sizes: Shape) -> Node:
        return replace(self, parts=tuple(p.split(axis, sizes) for p in self.parts))

    def permute(self, order: Shape) -> Node:
        return replace(self, parts=tuple(p.permute(order) for p in self.parts))

    def slice(self, axis: int, start: int, stop: int) -> Node:
        return replace(self, parts=tuple(p.slice(axis, start, stop) for p in self.parts))

    def read(self) -> Array:
        made = self.function([p.read() for p in self.parts])
        return self.rounding(made) if self.rounding else made

    def read_into(self, out: Array) -> None:
        _depth.value += 1
        try:
            made = self.function([self._operand(k, out) for k in range(len(self.parts))])
        finally:
            _depth.value -= 1
        if self.rounding:
            self.rounding(made, out)
        else:
            out[...] = made

    def _operand(self, k: int, out: Array) -> Array:
        """An operand's values, in memory that nobody else uses at this depth."""
        dtype = raw_dtype(self.dtype)
        values = _operands.take(f"{_depth.value}.{k}", out.size, dtype).reshape(out.shape)
        self.parts[k].read_into(values)
        return values

    @property
    def turned(self) -> int:
        return 2 * max(p.turned for p in self.parts)  # operands take memory beside the result

    @property
    def computed(self) -> bool:
        return True

    def watched(self, note: Note) -> Node:
        parts = tuple(p.watched(note) for p in self.parts)
        return Computed(self.function, parts, self.dtype, self.rounding and replace(self.rounding, note=note))


class Lazy(Struct, frozen=True):
    """An array of logical ``shape``; each logical dimension is ``groups[k]`` neighbouring dimensions of ``node``.

    Keeping a dimension in pieces is what makes a permutation inside heads a plain view: nothing has to be
    flattened until the values are written in order.
    """

    node: Node
    groups: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(array: Array, dtype: str) -> Lazy:
        """A lazy view of values that are at hand or mapped, in the raw form of ``dtype``."""
        return Lazy(Strided(array), (1,) * array.ndim, dtype)

    @staticmethod
    def zeros(shape: Shape, dtype: str) -> Lazy:
        """Zeros of any shape."""
        return Lazy(Zeros(shape, raw_dtype(dtype)), (1,) * len(shape), dtype)

    @property
    def shape(self) -> Shape:
        """The logical shape."""
        return tuple(math.prod(self._sizes(k)) for k in range(len(self.groups)))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def unflatten(self, axis: int, sizes: Shape) -> Lazy:
        """Split a logical dimension into several; reads data only if a hidden boundary does not line up."""
        if 0 in self.shape:
            return Lazy.zeros((*self.shape[:axis], *sizes, *self.shape[axis + 1 :]), self.dtype)
        node, first = self.node, self._first(axis)
        pieces = self._sizes(axis)
        counts: list[int] = []
        at = first
        for size in sizes:
            begun, left = at, size
            while left > 1 or (left == 0 and at == begun):
                piece = pieces.pop(0) if pieces else 0
                if piece == left or (left and piece and left % piece == 0):
                    left = left // piece if piece else 1
                elif left and piece and piece % left == 0:
                    node = node.split(at, (left, piece // left))
                    pieces.insert(0, piece // left)
                    left = 1
                else:
                    return self._copied().unflatten(axis, sizes)
                at += 1
            counts.append(at - begun)
        counts[-1] += len(pieces)  # what is left over are dimensions of size 1
        return Lazy(node, (*self.groups[:axis], *counts, *self.groups[axis + 1 :]), self.dtype)

    def flatten(self, start: int, stop: int) -> Lazy:
        """Merge the logical dimensions [start, stop) into one."""
        return Lazy(self.node, (*self.groups[:start], sum(self.groups[start:stop]), *self.groups[stop:]), self.dtype)

    def reshape(self, shape: Shape) -> Lazy:
        """The same values in the same order under another logical shape."""
        if not shape or not self.groups:  # one value at most
            return Lazy.of(self.read().reshape(shape), self.dtype)
        return self.flatten(0, len(self.groups)).unflatten(0, shape)

    def transpose(self, *order: int) -> Lazy:
        """Reorder the logical dimensions."""
        spans = [range(self._first(k), self._first(k) + self.groups[k]) for k in order]
        axes = tuple(axis for span in spans for axis in span)
        return Lazy(self.node.permute(axes), tuple(self.groups[k] for k in order), self.dtype)

    def slice(self, axis: int, start: int, stop: int) -> Lazy:
        """Keep [start, stop) along a logical dimension."""
        if start >= stop:
            return Lazy.zeros((*self.shape[:axis], 0, *self.shape[axis + 1 :]), self.dtype)
        node, at, sizes = self.node, self._first(axis), self._sizes(axis)
        low, high = start, stop  # within what is left of the dimension
        while len(sizes) > 1:
            inner = math.prod(sizes[1:])
            if low % inner == 0 and high % inner == 0:
                return self._with(node.slice(at, low // inner, high // inner))
            row = low // inner
            if (high - 1) // inner != row:  # a head's end, its middle, another's beginning: whole rows in between
                inside = (x for x in (-(-low // inner) * inner, high // inner * inner) if low < x < high)
                cuts = [start + x - low for x in sorted({low, high, *inside})]
                parts = [self.slice(axis, one, other) for one, other in itertools.pairwise(cuts)]
                return parts[0].concat(parts[1:], axis)
            node = node.slice(at, row, row + 1)
            low, high, at, sizes = low - row * inner, high - row * inner, at + 1, sizes[1:]
        return self._with(node.slice(at, low, high)) if sizes else self

    def concat(self, others: list[Lazy], axis: int) -> Lazy:
        """Join along a logical dimension."""
        return Lazy(Joined(axis, (self, *others)), (1,) * len(self.groups), self.dtype)

    def combined(
        self, others: list[Lazy], function: Callable[[list[Array]], Array], rounding: Rounding | None = None
    ) -> Lazy:
        """Element-wise arithmetic with other arrays of the same shape; ``function`` sees and returns raw values."""
        dtype = rounding.target if rounding else self.dtype
        if all(x.groups == self.groups and x.node.shape == self.node.shape for x in others):
            nodes = (self.node, *(x.node for x in others))
            return Lazy(Computed(function, nodes, self.dtype, rounding), self.groups, dtype)
        joined = tuple(Joined(0, (x,)) for x in (self, *others))
        return Lazy(Computed(function, joined, self.dtype, rounding), (1,) * len(self.shape), dtype)

    def cast(self, dtype: str) -> Lazy:
        """Round to another element type."""
        return self if dtype == self.dtype else self.combined([], lambda xs: xs[0], Rounding(self.dtype, dtype))

    def scaled(self, factor: float) -> Lazy:
        """Multiply by a constant, in float32 (float64 stays float64), rounded back."""
        return self._computed([], lambda xs: xs[0] * xs[0].dtype.type(factor))

    def shifted(self, value: float) -> Lazy:
        """Add a constant, in float32 (float64 stays float64), rounded back."""
        return self._computed([], lambda xs: xs[0] + xs[0].dtype.type(value))

    def times(self, other: Lazy, dtype: str) -> Lazy:
        """The product with another array of this type, float32 or float64, rounded once to ``dtype``."""

        def function(xs: list[Array]) -> Array:
            with np.errstate(all="ignore"):
                return xs[0] * xs[1]

        return self.combined([other], function, Rounding(self.dtype, dtype) if dtype != self.dtype else None)

    def summed(self, others: list[Lazy], *, mean: bool) -> Lazy:
        """The sum or mean with other arrays, in float32 (float64 stays float64), rounded once."""
        count = len(others) + 1

        def function(xs: list[Array]) -> Array:
            total = xs[0]
            for x in xs[1:]:
                total = total + x
            return total / total.dtype.type(count) if mean else total

        return self._computed(others, function)

    def watched(self, note: Note) -> Lazy:
        """The same array, every rounding in it told to ``note`` when its values are read.

        Values that an operation had to read while the description was made (see :meth:`unflatten`) were rounded
        before anybody watched.
        """
        return self._with(self.node.watched(note))

    def read(self) -> Array:
        """All values at once, in raw form and logical shape."""
        return self.node.read().reshape(self.shape)

    def read_into(self, out: Array) -> None:
        """Put all values, in raw form, into an array of the logical shape."""
        place = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        self.node.read_into(place.reshape(self.node.shape))
        if place is not out:
            out[...] = place

    def blocks(self, limit: int = 1 << 20, room: Scratch | None = None, turned: int = 0) -> Iterator[Array]:
        """The values in C order, in contiguous raw pieces of at most about ``limit`` bytes.

        Where neighbours lie apart in the file, pieces take up to ``turned`` bytes there: the more rows a piece has, the
        longer is each run of them. Every piece lies in ``room``, where the next one overwrites it; without one, each is
        an array of its own.
        """
        raw = raw_dtype(self.dtype)
        stored = self.node.turned
        limit = max(limit, turned * raw.itemsize // stored) if stored else limit
        for node in _cut(self.node, limit, raw.itemsize):
            count = math.prod(node.shape)
            out: Array = (np.empty(count, raw) if room is None else room.take("block", count, raw)).reshape(node.shape)
            node.read_into(out)
            yield out

    def _computed(self, others: list[Lazy], function: Callable[[list[Array]], Array]) -> Lazy:
        """Arithmetic on numbers, at least in float32, rounded back to this element type."""
        value = value_dtype(self.dtype)
        wide = "float64" if self.dtype == "float64" else "float32"

        def widened(xs: list[Array]) -> Array:
            with np.errstate(all="ignore"):
                return function([x.view(value).astype(wide) for x in xs])

        return self.combined(others, widened, Rounding(wide, self.dtype))

    def _with(self, node: Node) -> Lazy:
        return Lazy(node, self.groups, self.dtype)

    def _first(self, axis: int) -> int:
        return sum(self.groups[:axis])

    def _sizes(self, axis: int) -> list[int]:
        first = self._first(axis)
        return list(self.node.shape[first : first + self.groups[axis]])

    def _copied(self) -> Lazy:
        return Lazy.of(np.ascontiguousarray(self.read()), self.dtype)


def _cut(node: Node, limit: int, itemsize: int) -> Iterator[Node]:
    """The node in pieces of at most ``limit`` bytes that follow each other in C order; none that is empty."""
    size = math.prod(node.shape) * itemsize
    axis = next((k for k, n in enumerate(node.shape) if n > 1), None)
    if size <= limit or axis is None:
        if size:
            yield node
        return
    rows = max(1, limit // (size // node.shape[axis]))
    for start in range(0, node.shape[axis], rows):
        yield from _cut(node.slice(axis, start, min(start + rows, node.shape[axis])), limit, itemsize)
