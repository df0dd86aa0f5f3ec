"""The leaves of a lazy array's description: views of memory, and zeros. :mod:`.lazy` builds on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct

from .rounding import Array, Note
from .tensors import Shape
from .turning import copy_turned


class Node:
    """Part of a description. Every node can be cut, split, turned and read; none of the first three reads data."""

    shape: Shape

    def split(self, axis: int, sizes: Shape) -> Node:
        """Replace one dimension by several whose product it is."""
        raise NotImplementedError

    def permute(self, order: Shape) -> Node:
        """Reorder the dimensions."""
        raise NotImplementedError

    def slice(self, axis: int, start: int, stop: int) -> Node:
        """Keep [start, stop) along one dimension."""
        raise NotImplementedError

    def read(self) -> Array:
        """The values, in raw form."""
        raise NotImplementedError

    def read_into(self, out: Array) -> None:
        """Put the values into a contiguous array of this shape."""
        copy_turned(self.read(), out)

    @property
    def turned(self) -> int:
        """Bytes of a value whose neighbours lie apart where they are stored, so that reading pays in large pieces only;
        0 where they don't."""
        return 0

    @property
    def computed(self) -> bool:
        """Whether reading does arithmetic, not moves alone."""
        return False

    def watched(self, note: Note) -> Node:
        """The same description, whose roundings are told to ``note`` when they are read."""
        return self


class Strided(Node, Struct, frozen=True):
    """A strided view of memory, usually of a mapped file."""

    array: Array

    @property
    def shape(self) -> Shape:  # type: ignore[override]  # read-only here, a plain attribute in the base
        return self.array.shape

    def split(self, axis: int, sizes: Shape) -> Node:
        shape = (*self.array.shape[:axis], *sizes, *self.array.shape[axis + 1 :])
        return Strided(self.array.reshape(shape))  # splitting one dimension never copies

    def permute(self, order: Shape) -> Node:
        return Strided(self.array.transpose(order))

    def slice(self, axis: int, start: int, stop: int) -> Node:
        return Strided(self.array[(slice(None),) * axis + (slice(start, stop),)])

    def read(self) -> Array:
        return self.array


class Zeros(Node, Struct, frozen=True):
    """Zeros that occupy no memory until read."""

    shape: Shape
    dtype: np.dtype[Any]

    def split(self, axis: int, sizes: Shape) -> Node:
        return Zeros((*self.shape[:axis], *sizes, *self.shape[axis + 1 :]), self.dtype)

    def permute(self, order: Shape) -> Node:
        return Zeros(tuple(self.shape[k] for k in order), self.dtype)

    def slice(self, axis: int, start: int, stop: int) -> Node:
        return Zeros((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), self.dtype)

    def read(self) -> Array:
        return np.zeros(self.shape, self.dtype)
