"""The closed vocabulary of operations: each knows its shape, how to apply itself, and its inverse.

An operation is bound: its sizes are integers (:mod:`.schema` holds the unbound form that YAML spells with names).
``apply`` works on :class:`~.lazy.Lazy` arrays, which move no data until they are read, so a plan can be carried
out tile by tile whatever the tensor's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from msgspec import Struct, field

from .tensors import Shape

if TYPE_CHECKING:
    from .lazy import Lazy


class OpError(ValueError):
    """An operation does not fit the shapes it is given. The text says which size does not fit which."""


class Op(Struct, frozen=True):
    """Base of all operations."""

    name: ClassVar[str] = ""

    @property
    def inner(self) -> tuple[Op, ...]:
        """The operations that this one is made of; none for most."""
        return ()

    @property
    def one_way(self) -> bool:
        """Whether the operation loses something, so that no plan can be reversed through it."""
        return False

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        """Shapes out for shapes in; raises OpError."""
        raise NotImplementedError

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        """The operation itself, lazily."""
        raise NotImplementedError

    def inverse(self, shapes: list[Shape]) -> Op:
        """The operation that undoes this one on outputs, given the shapes it was applied to."""
        raise NotImplementedError

    def taken(self, dtypes: tuple[str, ...]) -> str:
        """The element type in, of those of several tensors. Raises OpError where they don't go together."""
        return one_type(dtypes)

    def dtype(self, dtype: str) -> str:
        """Element type out for element type in."""
        return dtype


def one_type(dtypes: tuple[str, ...]) -> str:
    """The element type that all of them are. Raises OpError if they are several."""
    if len(set(dtypes)) != 1:
        raise OpError(f"they are of different types: {', '.join(sorted(set(dtypes)))}")
    return dtypes[0]


class Single(Op, frozen=True):
    """An operation on one tensor.

    Sizes and factors are one tensor's own: the heads of q are not those of k, and v has no rotary pairs. So several
    tensors are refused, unless the operation has no arguments, as ``alike`` says.
    """

    alike: ClassVar[bool] = False

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        if len(shapes) != 1 and not self.alike:
            raise OpError(f"{self.name} takes one tensor, got {len(shapes)}: give each its own operations with parts")
        return [self.shape1(shape) for shape in shapes]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        return [self.apply1(x) for x in xs]

    def shape1(self, shape: Shape) -> Shape:
        """Shape out for shape in."""
        return shape

    def apply1(self, x: Lazy) -> Lazy:
        """The operation on one tensor."""
        raise NotImplementedError


class Trace(Struct, frozen=True):
    """What a pipeline does to shapes and dtype, step by step; ``shapes[k]`` goes into operation k."""

    shapes: list[list[Shape]] = field(default_factory=list[list[Shape]])
    dtype: str = ""


def trace(ops: tuple[Op, ...], shapes: list[Shape], dtype: str = "") -> Trace:
    """Follow shapes, and a dtype if there is one, through a pipeline. Raises OpError at the first that does not fit."""
    steps = [shapes]
    for op in ops:
        steps.append(op.shape(steps[-1]))
        dtype = op.dtype(dtype) if dtype else ""
    return Trace(steps, dtype)


def invert(ops: tuple[Op, ...], shapes: list[Shape], dtype: str = "") -> tuple[Op, ...]:
    """The pipeline that undoes ``ops`` on tensors of these input shapes. Raises OpError at a one-way operation."""
    steps = trace(ops, shapes, dtype).shapes
    for op in ops:
        if op.one_way:
            names = ", ".join(dict.fromkeys(o.name for o in op.inner if o.one_way)) or op.name
            raise OpError(f"{names} cannot be undone exactly")
    return tuple(op.inverse(steps[k]) for k, op in reversed(list(enumerate(ops))))
