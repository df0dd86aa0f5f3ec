"""The record that stands for one stored tensor, and the names of the element types."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct, field

Shape = tuple[int, ...]

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element, by torch's name of the dtype without ``torch.``."""

FLOATING = frozenset({"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"})
"""The dtypes that model weights come in."""

MAX_DIMS = 64
"""Dimensions that a tensor may have; torch itself stops at about as many."""


class TensorInfo(Struct, frozen=True):
    """Where one tensor lies, known without reading it.

    ``offset`` is the byte position in ``file`` of the element at index (0, 0, …); ``stride`` counts elements.
    ``storage`` is equal for tensors that share memory in the checkpoint (tied weights). ``raw`` is the path of
    the tensor inside the file as its writer named it, wrapper and prefixes included. A tensor that was saved in
    ``pieces`` lies where they lie; ``file`` is then the one that lists them, and ``offset`` and ``stride`` say nothing.
    The same holds for one that is ``made`` of others; ``raw`` is then what its writer would have called the whole.
    """

    name: str
    shape: Shape
    dtype: str
    file: str
    offset: int
    stride: Shape
    storage: str
    rank: int = 0
    raw: str = ""
    pieces: tuple[Piece, ...] = ()
    made: Made | None = None

    @property
    def numel(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values alone, whatever the strides."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether the values lie in C order without gaps."""
        return self.numel == 0 or (
            not self.pieces
            and self.made is None
            and all(
                n == 1 or s == expected
                for n, s, expected in zip(self.shape, self.stride, dense(self.shape), strict=True)
            )
        )


class Piece(Struct, frozen=True):
    """A block of a tensor that was saved on its own: the position in the tensor of its first element, and its place."""

    at: Shape
    info: TensorInfo


class Made(Struct, frozen=True):
    """How a tensor that lies nowhere as a whole is computed from others: what :mod:`mdl.convert.composed` calls it, and
    the ``parts`` in the order that it wants. ``scale``, ``turned`` and ``settings`` are LoRA's: the factor of its
    product, whether that is transposed, and the file that said so."""

    how: str
    parts: tuple[TensorInfo, ...]
    scale: float = 1.0
    turned: bool = False
    settings: str = ""


def dense(shape: Shape) -> Shape:
    """The strides, in elements, of a C-contiguous tensor of this shape."""
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


class Target(Struct, frozen=True):
    """What a target class holds: its parameters' names and shapes, tied ones once.

    ``ties`` maps each parameter that is left out because it is tied to the one that stands for it.
    """

    shapes: Mapping[str, Shape]
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
