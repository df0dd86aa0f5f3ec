"""One pipeline per tensor: what a fused tensor's parts need before they join, or after they were cut apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from .ops import Op, OpError, invert, trace
from .tensors import Shape

if TYPE_CHECKING:
    from .lazy import Lazy


class Parts(Op, frozen=True):
    """Tensor k goes through the operations of ``parts[k]``, in order; an empty list leaves it as it is.

    Each part is one tensor before and after. In between it may be cut and joined again.
    """

    name: ClassVar[str] = "parts"
    parts: tuple[tuple[Op, ...], ...]

    @property
    def inner(self) -> tuple[Op, ...]:
        return tuple(op for ops in self.parts for op in ops)

    @property
    def one_way(self) -> bool:
        return any(op.one_way for op in self.inner)

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        return [self._through(k, shape) for k, shape in enumerate(self._counted(shapes))]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        out: list[Lazy] = []
        for x, ops in zip(xs, self.parts, strict=True):
            values = [x]
            for op in ops:
                values = op.apply(values)
            out += values
        return out

    def inverse(self, shapes: list[Shape]) -> Op:
        return Parts(tuple(invert(ops, [s]) for ops, s in zip(self.parts, self._counted(shapes), strict=True)))

    def dtype(self, dtype: str) -> str:
        made = dict.fromkeys(_dtype(ops, dtype) for ops in self.parts)
        if len(made) > 1:
            raise OpError(f"parts: one comes out as {', another as '.join(made)}")
        return next(iter(made), dtype)

    def _counted(self, shapes: list[Shape]) -> list[Shape]:
        if len(shapes) != len(self.parts):
            raise OpError(f"parts: {len(self.parts)} lists of operations for {len(shapes)} tensors")
        return shapes

    def _through(self, k: int, shape: Shape) -> Shape:
        try:
            out = trace(self.parts[k], [shape]).shapes[-1]
        except OpError as error:
            raise OpError(f"parts: in list {k + 1}, {error}") from None
        if len(out) != 1:
            raise OpError(f"parts: list {k + 1} makes {len(out)} tensors of one")
        return out[0]


def _dtype(ops: tuple[Op, ...], dtype: str) -> str:
    for op in ops:
        dtype = op.dtype(dtype)
    return dtype


def without(ops: tuple[Op, ...], *kinds: type[Op]) -> tuple[Op, ...]:
    """The pipeline without the operations of these kinds, inside parts too."""

    def kept() -> Iterator[Op]:
        for op in ops:
            if isinstance(op, Parts):
                yield Parts(tuple(without(part, *kinds) for part in op.parts))
            elif not isinstance(op, kinds):
                yield op

    return tuple(kept())
