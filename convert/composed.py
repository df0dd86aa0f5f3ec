"""Tensors that lie in a checkpoint in parts, put together as they are read.

A composed tensor stands in the inventory under the name of the whole (:class:`~..mappings.tensors.Made`), so that
mappings, plans and checks need not know of its parts. All is computed in float64 and rounded once, to its own type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..mappings.tensors import Made, Shape, TensorInfo, dense

if TYPE_CHECKING:
    from ..mappings.lazy import Array, Lazy  # numpy, which reading metadata does without

WEIGHT_NORM, SPECTRAL_NORM, MASKED = "weight_norm", "spectral_norm", "pruned"
LORA, REPLACED = "merge LoRA", "replace by the adapter's"
"""What a whole may be made by; parts in this order: direction and length; matrix, left and right vector; values and
mask; weight, A and B; the new weight."""

_DIGITS = 52 - 23
_CUT = (1 << _DIGITS) - 1
"""Digits that float64 has and float32 has not."""

_ROWS = 4 << 20
"""Bytes of a weight that are read at a time to measure it."""

Reader = Callable[[TensorInfo], "Lazy"]


def whole_of(made: Made, like: TensorInfo, name: str, raw: str) -> TensorInfo:
    """The entry of a composed tensor, of the shape and the type of one of its parts."""
    storage = " + ".join(f"{part.storage}@{part.offset}" for part in made.parts)
    key = f"{made.how} {made.scale} {storage}"  # equal where all parts are: then the wholes are tied
    i = like
    return TensorInfo(name, i.shape, i.dtype, i.file, 0, dense(i.shape), key, i.rank, raw, (), made)


def made_by(infos: Sequence[TensorInfo]) -> tuple[str, ...]:
    """By what the wholes among some tensors are made, each once."""
    return tuple(dict.fromkeys(info.made.how for info in infos if info.made))


def composed(info: TensorInfo, tensor: Reader) -> Lazy:
    """The whole of a composed tensor, of whose parts ``tensor`` makes lazy arrays."""
    made = info.made
    if made is None:
        raise TypeError(f"{info.name} is not composed")
    return _RECIPES[made.how](made, [tensor(part) for part in made.parts], info.dtype)


def _weight_norm(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    """v · g / ‖v‖, the norm over every dimension but the one that g has."""
    import numpy as np

    v, g = parts
    length = g.cast("float64").read()
    kept = norm_axis(g.shape, v.shape)
    squares = np.zeros(length.shape)
    for start, block in _row_blocks(v):
        if kept == 0:
            squares[start : start + len(block)] = _sum_squares(block, 0)
        else:
            squares += _sum_squares(block, kept)
    with np.errstate(all="ignore"):  # a row of zeros has no direction: NaN, as torch has it, which is found later
        factor = length / np.sqrt(squares)
    return _by(v, factor, dtype, lambda x, y: x * y)


def _sum_squares(block: Array, kept: int | None) -> Array:
    if kept is None:
        return (block * block).sum()
    return (block * block).sum(axis=tuple(k for k in range(block.ndim) if k != kept), keepdims=True)


def norm_axis(length: Shape, direction: Shape) -> int | None:
    """The dimension that weight_norm's g keeps of v; None for one norm of the whole. Raises ValueError for shapes that
    no weight_norm has."""
    if not length:
        return None
    kept = [k for k, n in enumerate(length) if n != 1]
    fits = len(length) == len(direction) and all(length[k] == direction[k] for k in kept)
    if not fits or len(kept) > 1 or (not kept and 1 not in direction):
        raise ValueError(f"g is {list(length)}, v {list(direction)}")
    return kept[0] if kept else direction.index(1)


def _spectral_norm(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    """W / (u · W v): evaluation divides by the stored vectors' estimate of the largest singular value."""
    import numpy as np

    weight, left, right = parts
    u, v = (x.cast("float64").read() for x in (left, right))
    sigma = 0.0
    for start, block in _row_blocks(weight if weight.shape == (len(u), len(v)) else weight.transpose(1, 0)):
        sigma += float((u[start : start + len(block)] * (block * v).sum(axis=1)).sum())
    return _by(weight, np.array(sigma), dtype, lambda x, y: x / y)


def _masked(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    """The values that pruning left, and zeros."""
    weight, mask = (part.cast("float64") for part in parts)
    return _once(weight, mask, dtype, lambda x, y: x * y)


def _lora(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    """W + scale · (B A), or its transpose for a weight that is stored [in, out]."""
    import numpy as np

    from ..mappings.lazy import Lazy
    from ..mappings.products import Product

    weight, a, b = (part.cast("float64") for part in parts)
    down, up = np.ascontiguousarray(a.read()), np.ascontiguousarray(b.read().T)
    product = Product.of(down, up) if made.turned else Product.of(up, down)
    return _once(weight, Lazy(product, (1, 1), "float64"), dtype, lambda x, y: x + y * made.scale)


def _replaced(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    return parts[0].cast(dtype)


_RECIPES: dict[str, Callable[[Made, list[Lazy], str], Lazy]] = {
    WEIGHT_NORM: _weight_norm,
    SPECTRAL_NORM: _spectral_norm,
    MASKED: _masked,
    LORA: _lora,
    REPLACED: _replaced,
}


def _row_blocks(weight: Lazy) -> Iterator[tuple[int, Array]]:
    """A weight's rows as float64, some at a time, and the first one's number."""
    rows = max(1, _ROWS * weight.shape[0] // max(8 * math.prod(weight.shape), 1))
    for start in range(0, weight.shape[0], rows):
        yield start, weight.slice(0, start, min(start + rows, weight.shape[0])).cast("float64").read()


def _by(weight: Lazy, factor: Array, dtype: str, function: Callable[[Array, Array], Array]) -> Lazy:
    """A weight with a factor for each of its rows, columns, or for all."""
    import numpy as np

    from ..mappings.lazy import Lazy

    spread = Lazy.of(np.broadcast_to(factor, weight.shape), "float64")
    return _once(weight.cast("float64"), spread, dtype, function)


def _once(one: Lazy, other: Lazy, dtype: str, function: Callable[[Array, Array], Array]) -> Lazy:
    """A function of two float64 arrays, rounded once to ``dtype``.

    What becomes 0 by that is not told to whoever watches: sums come as near to 0 as they like, and it is an error of
    half a step, as everywhere. An infinity is found in the values.
    """
    import numpy as np

    from ..mappings.lazy import Rounding, raw_dtype
    from ..mappings.products import TILE

    narrow = dtype not in ("float32", "float64")
    rounding = Rounding("float32" if narrow else "float64", dtype)

    def made(xs: list[Array]) -> Array:
        one, other = (np.ascontiguousarray(x).reshape(-1) for x in xs)
        out: Array = np.empty(one.size, raw_dtype(dtype))
        with np.errstate(all="ignore"):
            for at in range(0, one.size, TILE):
                values = function(one[at : at + TILE], other[at : at + TILE])
                rounding(_to_odd(values) if narrow else values, out[at : at + TILE])
        return out.reshape(xs[0].shape)

    return replace(one.combined([other], made), dtype=dtype)


def _to_odd(values: Array) -> Array:
    """float64 cut to float32's digits, the last one set where something was cut off: the next rounding then comes out
    as if it were the first (Boldo and Melquiond, 2008). A cast to two bytes goes through float32 and rounds twice."""
    import numpy as np

    bits = values.view(np.int64)
    kept = bits & ~_CUT
    kept |= ((bits & _CUT) != 0).astype(np.int64) << _DIGITS
    return kept.view(np.float64).astype(np.float32)
