"""A product of two thin matrices whose values are worked out when they are read, tile by tile."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from .nodes import Node
from .rounding import Array
from .tensors import Shape

TILE = 1 << 15
"""Values that are worked out at a time: they stay in the CPU's cache while terms are added."""


class Product(Node, Struct, frozen=True):
    """``left[0] * right[0] + left[1] * right[1] + …`` in float64. Both arrays are [R, …], R terms of this shape: views
    in which a row or a column stands again and again.

    Terms are added one after another, value by value: what comes out is the same bits whatever the tile, which a
    matrix multiplication does not promise, and hashes are made of it.
    """

    left: Array
    right: Array

    @staticmethod
    def of(left: Array, right: Array) -> Product:
        """The product of ``left`` [R, N], transposed, and ``right`` [R, M]: [N, M]."""
        shape = (*left.shape, right.shape[1])
        return Product(np.broadcast_to(left[:, :, None], shape), np.broadcast_to(right[:, None, :], shape))

    @property
    def shape(self) -> Shape:  # type: ignore[override]  # computed here, a plain attribute in the base
        return self.left.shape[1:]

    def split(self, axis: int, sizes: Shape) -> Node:
        shape = (len(self.left), *self.shape[:axis], *sizes, *self.shape[axis + 1 :])
        return Product(self.left.reshape(shape), self.right.reshape(shape))  # splitting one dimension never copies

    def permute(self, order: Shape) -> Node:
        axes = (0, *(k + 1 for k in order))
        return Product(self.left.transpose(axes), self.right.transpose(axes))

    def slice(self, axis: int, start: int, stop: int) -> Product:
        kept = (slice(None),) * (axis + 1) + (slice(start, stop),)
        return Product(self.left[kept], self.right[kept])

    def read(self) -> Array:
        out = np.empty(self.shape)
        self.read_into(out)
        return out

    def read_into(self, out: Array) -> None:
        axis = next((k for k, n in enumerate(out.shape) if n > 1), None)
        if axis is None or out.size <= TILE:
            self._add_up(out)
            return
        rows = max(1, TILE * out.shape[axis] // out.size)
        for start in range(0, out.shape[axis], rows):
            stop = min(start + rows, out.shape[axis])
            self.slice(axis, start, stop)._add_up(out[(slice(None),) * axis + (slice(start, stop),)])

    def _add_up(self, out: Array) -> None:
        with np.errstate(all="ignore"):  # whoever looks at the values finds what is not finite
            np.multiply(self.left[0], self.right[0], out=out)
            term = np.empty(out.shape)
            for one, other in zip(self.left[1:], self.right[1:], strict=True):
                np.multiply(one, other, out=term)
                np.add(out, term, out=out)
