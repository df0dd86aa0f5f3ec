"""Tensors that were saved as blocks, each on its own: whether the blocks make up the whole, and the whole of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from msgspec import Struct

from ..mappings.tensors import Shape, TensorInfo

if TYPE_CHECKING:
    from ..mappings.lazy import Lazy  # numpy, which reading metadata does without

MAX_CUTS = 64
"""Cuts within each other. A tensor that is sharded along every dimension has one for each of them."""


class PiecesError(Exception):
    """The blocks do not make up the tensor; the text says why."""


class Box(Struct, frozen=True):
    """A block: where it starts and where it stops along every dimension."""

    start: Shape
    stop: Shape


class Cut(Struct, frozen=True):
    """Blocks side by side along one dimension, in their order; each is the number of one, or cut again."""

    axis: int
    parts: tuple[Cut | int, ...]


def arrange(shape: Shape, boxes: Sequence[Box]) -> Cut | int:
    """How blocks of at least one element each lie in a tensor of that shape. They may be of any sizes, as long as
    straight cuts part them, which holds for every way to shard a tensor. Raises PiecesError if a block reaches outside,
    two overlap, or one is missing."""
    for box in boxes:
        if any(start < 0 or stop > n for start, stop, n in zip(box.start, box.stop, shape, strict=True)):
            raise PiecesError(f"its piece at {list(box.start)} ends at {list(box.stop)}, outside of {list(shape)}")
    held = sum(math.prod(stop - start for start, stop in zip(b.start, b.stop, strict=True)) for b in boxes)
    if held != (whole := math.prod(shape)):
        why = "some overlap" if held > whole else "some are missing"
        raise PiecesError(f"its {len(boxes):,} pieces hold {held:,} values, the tensor has {whole:,}: {why}")
    return _arrange(range(len(boxes)), boxes, Box((0,) * len(shape), shape), MAX_CUTS)


def _arrange(members: Sequence[int], boxes: Sequence[Box], room: Box, cuts: int) -> Cut | int:
    if len(members) == 1 and boxes[members[0]] == room:
        return members[0]
    for axis in range(len(room.start)) if cuts and len(members) > 1 else ():
        parts = _apart(members, boxes, axis)
        if len(parts) > 1:
            edges = [room.start[axis], *(boxes[part[0]].start[axis] for part in parts[1:]), room.stop[axis]]
            rooms = [_within(room, axis, *edge) for edge in pairwise(edges)]
            return Cut(axis, tuple(_arrange(p, boxes, r, cuts - 1) for p, r in zip(parts, rooms, strict=True)))
    where = f"between {list(room.start)} and {list(room.stop)}"
    raise PiecesError(f"its pieces {where} overlap, leave a gap, or can't be parted by straight cuts")


def _apart(members: Sequence[int], boxes: Sequence[Box], axis: int) -> list[list[int]]:
    """The blocks in groups that share nothing of one dimension, in its order; each group begins with its first."""
    parts: list[list[int]] = []
    end = -1
    for member in sorted(members, key=lambda k: boxes[k].start[axis]):
        if not parts or boxes[member].start[axis] >= end:
            parts.append([])
        parts[-1].append(member)
        end = max(end, boxes[member].stop[axis])
    return parts


def _within(room: Box, axis: int, start: int, stop: int) -> Box:
    return Box((*room.start[:axis], start, *room.start[axis + 1 :]), (*room.stop[:axis], stop, *room.stop[axis + 1 :]))


def box_of(at: Shape, shape: Shape) -> Box:
    """The block of that shape that starts there."""
    return Box(at, tuple(start + n for start, n in zip(at, shape, strict=True)))


def joined(info: TensorInfo, tensor: Callable[[TensorInfo], Lazy]) -> Lazy:
    """The whole of a tensor in pieces, each of which ``tensor`` reads. Pieces of one dimension make up its values as
    they follow each other."""
    blocks = [tensor(piece.info) for piece in info.pieces]

    def build(part: Cut | int) -> Lazy:
        if isinstance(part, int):
            return blocks[part]
        first, *rest = [build(inner) for inner in part.parts]
        return first.concat(rest, part.axis)

    flat = all(len(piece.at) == 1 for piece in info.pieces)
    shape = (math.prod(info.shape),) if flat else info.shape
    whole = build(arrange(shape, [box_of(piece.at, piece.info.shape) for piece in info.pieces]))
    return whole.reshape(info.shape)
