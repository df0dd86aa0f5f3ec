"""Weights of eight bits with a factor for each block of them, which become weights again."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .ops import Op, OpError
from .tensors import Shape

if TYPE_CHECKING:
    from .lazy import Lazy

_EIGHT_BITS = frozenset({"float8_e4m3fn", "float8_e5m2"})
_FACTORS = frozenset({"float32", "bfloat16"})


class Dequantize(Op, frozen=True):
    """A matrix of float8 [O, I] and the factors [⌈O/block⌉, ⌈I/block⌉] of its blocks become their product [O, I].

    The product is taken in float32 and rounded once, to ``to``: what DeepSeek's ``weight_dequant`` stores
    (deepseek-ai/DeepSeek-V3, inference/kernel.py). The factors are not kept, so a reversed plan stops here.
    """

    name: ClassVar[str] = "dequantize"
    block: int
    to: str = "bfloat16"

    @property
    def one_way(self) -> bool:
        return True

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        if len(shapes) != 2 or self.block < 1:
            raise OpError(f"dequantize takes a matrix and its blocks' factors, got {len(shapes)} tensors")
        matrix, factors = shapes
        wanted = tuple(-(-n // self.block) for n in matrix)
        if len(matrix) != 2 or factors != wanted:
            needed = f", which has {list(wanted)} blocks of {self.block} x {self.block}" if len(matrix) == 2 else ""
            raise OpError(f"dequantize: {list(factors)} factors do not fit a matrix of {list(matrix)}{needed}")
        return [matrix]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        matrix, factors = xs
        return [matrix.cast("float32").times(self._spread(factors, matrix.shape), self.to)]

    def _spread(self, factors: Lazy, shape: Shape) -> Lazy:
        """Each factor as often as its block has values: read at once, and a row of them stands for ``block`` rows."""
        import numpy as np

        rows, columns = shape
        lines = np.repeat(factors.cast("float32").read(), self.block, axis=1)[:, None, :columns]
        spread = np.broadcast_to(lines, (len(lines), self.block, columns))
        return factors.of(spread, "float32").flatten(0, 2).slice(0, 0, rows)

    def inverse(self, shapes: list[Shape]) -> Op:
        raise OpError("dequantize cannot be undone: the factors of the blocks are gone")

    def taken(self, dtypes: tuple[str, ...]) -> str:
        if len(dtypes) == 2 and dtypes[1] not in _FACTORS:
            raise OpError(f"are of types {' and '.join(dtypes)}: dequantize takes factors of float32")
        return dtypes[0]

    def dtype(self, dtype: str) -> str:
        if dtype not in _EIGHT_BITS:
            raise OpError(f"dequantize: {dtype} is no type of eight bits with factors")
        return self.to
