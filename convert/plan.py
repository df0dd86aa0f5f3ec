"""The plan: every tensor, from where, by which operations, to where. Metadata only, nothing is read or written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

from msgspec import Struct

from ..errors import Kind, MdlError, Problem
from ..mappings.expand import Join
from ..mappings.moves import Reshape
from ..mappings.ops import Op, OpError
from ..mappings.tensors import ITEMSIZE, Shape, TensorInfo
from .composed import made_by


class Source(Struct, frozen=True):
    """One source tensor of a step: its rank files' entries and how they join into ``shape``."""

    name: str
    infos: tuple[TensorInfo, ...]
    shape: Shape
    join: Join | None


class Step(Struct, frozen=True):
    """Sources become targets by ``ops``; a step of kind ``fill`` has no source, one of kind ``drop`` no target.

    ``dtype`` is the element type written, ``source_dtype`` the one stored; ``rule`` is file:line:col.
    """

    kind: str
    targets: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: str
    sources: tuple[Source, ...] = ()
    ops: tuple[Op, ...] = ()
    source_dtype: str = ""
    rule: str = ""
    reason: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that the step writes."""
        return _nbytes(self.dtype, self.shapes)

    @property
    def made(self) -> tuple[str, ...]:
        """How those of its sources that lie in parts are put together."""
        for source in self.sources:
            for info in source.infos:
                if info.made:  # of hardly any: a plan is asked for this of each of its steps
                    return made_by([info for source in self.sources for info in source.infos])
        return ()


class Plan(Struct, frozen=True):
    """All steps in the order they are written, and all problems; ``open`` is what a draft leaves to decide."""

    steps: tuple[Step, ...]
    problems: tuple[Problem, ...]
    dtype: str
    ranks: int
    open: tuple[Problem, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that the plan writes."""
        count = Counter(map(attrgetter("dtype", "shapes"), self.steps))
        return sum(times * _nbytes(dtype, shapes) for (dtype, shapes), times in count.items())

    @property
    def writes(self) -> tuple[Step, ...]:
        """The steps that produce a target."""
        return tuple(step for step in self.steps if step.targets)

    def refuse(self) -> None:
        """Raise MdlError (INPUT) with every problem and what is open, if there is anything."""
        if self.problems or self.open:
            raise MdlError(Kind.INPUT, [*self.open, *self.problems], whole=bool(self.open))


def by_rank(infos: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """The entries of one tensor, rank by rank; several of one rank are copies."""
    return [list(copies) for _, copies in groupby(infos, lambda info: info.rank)]


def joined_shape(join: Join, shapes: list[Shape]) -> Shape:
    """The shape of a tensor whose rank files have these shapes. Raises OpError where they do not fit together."""
    if join.view:
        shapes = [Reshape(join.view).shape1(shape) for shape in shapes]
    first = shapes[0]
    if join.how in ("cat", "blocks"):
        rests = {(*s[: join.axis], *s[join.axis + 1 :]) for s in shapes}
        if len(rests) != 1 or not 0 <= join.axis < len(first):
            raise OpError(f"rank files {[list(s) for s in shapes]} do not join along dimension {join.axis}")
        total = sum(s[join.axis] for s in shapes)
        if join.how == "blocks" and (sum(join.sizes) != total or any(n % len(shapes) for n in join.sizes)):
            raise OpError(f"blocks {list(join.sizes)} do not fit {len(shapes)} rank files of {list(first)}")
        return (*first[: join.axis], total, *first[join.axis + 1 :])
    if len(set(shapes)) != 1:
        raise OpError(f"rank files have different shapes: {[list(s) for s in shapes]}")
    return first


def _nbytes(dtype: str, shapes: Iterable[Shape]) -> int:
    return sum(map(math.prod, shapes)) * ITEMSIZE[dtype]
