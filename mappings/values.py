"""Operations that change values, or what is kept of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from .ops import Op, OpError, Single
from .tensors import FLOATING, Shape

if TYPE_CHECKING:
    from .lazy import Lazy


class Slice(Single, frozen=True):
    """Keep the first ``stop`` rows (the real vocabulary of a padded one). The rest is lost."""

    name: ClassVar[str] = "slice"
    axis: int
    stop: int

    @property
    def one_way(self) -> bool:
        return True

    def shape1(self, shape: Shape) -> Shape:
        if not 0 <= self.axis < len(shape) or not 0 <= self.stop <= shape[self.axis]:
            raise OpError(f"slice: cannot keep {self.stop} of dimension {self.axis} of {list(shape)}")
        return (*shape[: self.axis], self.stop, *shape[self.axis + 1 :])

    def apply1(self, x: Lazy) -> Lazy:
        return x.slice(self.axis, 0, self.stop)

    def inverse(self, shapes: list[Shape]) -> Op:
        return Pad(self.axis, shapes[0][self.axis])


class Pad(Single, frozen=True):
    """Append zeros up to size ``to``."""

    name: ClassVar[str] = "pad"
    axis: int
    to: int

    def shape1(self, shape: Shape) -> Shape:
        if not 0 <= self.axis < len(shape) or self.to < shape[self.axis]:
            raise OpError(f"pad: cannot grow dimension {self.axis} of {list(shape)} to {self.to}")
        return (*shape[: self.axis], self.to, *shape[self.axis + 1 :])

    def apply1(self, x: Lazy) -> Lazy:
        missing = list(x.shape)
        missing[self.axis] = self.to - x.shape[self.axis]
        return x.concat([x.zeros(tuple(missing), x.dtype)], self.axis) if missing[self.axis] else x

    def inverse(self, shapes: list[Shape]) -> Op:
        return Slice(self.axis, shapes[0][self.axis])


class Add(Single, frozen=True):
    """Add a constant: a zero-centred norm weight w becomes 1 + w. Computed in float32, then rounded back.

    Not exactly reversible: rounding after the addition loses low bits, so a reversed plan stops here.
    """

    name: ClassVar[str] = "add"
    value: float

    @property
    def one_way(self) -> bool:
        return True

    def apply1(self, x: Lazy) -> Lazy:
        return x.shifted(self.value)

    def inverse(self, shapes: list[Shape]) -> Op:
        return Add(-self.value)


class Scale(Single, frozen=True):
    """Multiply by a constant. Exact, and so reversible, when it is a power of two."""

    name: ClassVar[str] = "scale"
    value: float

    @property
    def one_way(self) -> bool:
        return self.value == 0 or abs(math.frexp(self.value)[0]) != 0.5  # only powers of two lose no bits

    def apply1(self, x: Lazy) -> Lazy:
        return x.scaled(self.value)

    def inverse(self, shapes: list[Shape]) -> Op:
        return Scale(1.0 / self.value)


class Cast(Single, frozen=True):
    """Change the element type, rounding to nearest even."""

    name: ClassVar[str] = "cast"
    to: str

    @property
    def one_way(self) -> bool:
        return True

    def apply1(self, x: Lazy) -> Lazy:
        return x.cast(self.to)

    def inverse(self, shapes: list[Shape]) -> Op:
        raise OpError(f"cast to {self.to} cannot be undone: the rounded bits are gone")

    def dtype(self, dtype: str) -> str:
        if dtype not in FLOATING or self.to not in FLOATING:
            raise OpError(f"cast: {dtype} to {self.to} is not a cast between floating types")
        return self.to
