"""Operations that only move values: every one is exactly reversible."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from .ops import Op, OpError, Single
from .tensors import Shape

if TYPE_CHECKING:
    from .lazy import Lazy


class Transpose(Single, frozen=True):
    """Swap the two dimensions of a matrix: nn.Linear's [out, in] against Conv1D's [in, out]."""

    name: ClassVar[str] = "transpose"
    alike: ClassVar[bool] = True

    def shape1(self, shape: Shape) -> Shape:
        if len(shape) != 2:
            raise OpError(f"transpose takes a matrix, got {list(shape)}")
        return shape[1], shape[0]

    def apply1(self, x: Lazy) -> Lazy:
        return x.transpose(1, 0)

    def inverse(self, shapes: list[Shape]) -> Op:
        return self


class PermuteRope(Single, frozen=True):
    """Reorder the rows of each head from rotary pairs (2j, 2j+1) to rotary halves (j, j + R/2).

    ``rotary`` is R, the rotated rows of each head (all of them when 0): only these are moved. Works on weights
    [heads * D, C], biases [heads * D] and per-channel norm weights [D] (heads = 1). With ``back`` the other way.
    Formula: view [heads, R/2, 2, …], swap the middle two axes (RoFormer's pairing against GPT-NeoX's).
    """

    name: ClassVar[str] = "permute_rope"
    heads: int
    rotary: int = 0
    back: bool = False

    def shape1(self, shape: Shape) -> Shape:
        if self.heads < 1 or not shape or shape[0] % self.heads:
            raise OpError(f"permute_rope: {list(shape)} does not split into {self.heads} heads along dimension 0")
        head = shape[0] // self.heads
        rotary = self.rotary or head
        if not 0 <= rotary <= head or rotary % 2:
            raise OpError(f"permute_rope: cannot rotate {rotary} of the {head} rows of a head")
        return shape

    def apply1(self, x: Lazy) -> Lazy:
        head = x.shape[0] // self.heads
        rotary = self.rotary or head
        pairs = (2, rotary // 2) if self.back else (rotary // 2, 2)
        heads = x.unflatten(0, (self.heads, head))
        turned = heads.slice(1, 0, rotary).unflatten(1, pairs)
        turned = turned.transpose(0, 2, 1, *range(3, len(turned.shape))).flatten(1, 3)
        if rotary < head:
            turned = turned.concat([heads.slice(1, rotary, head)], 1)
        return turned.flatten(0, 2)

    def inverse(self, shapes: list[Shape]) -> Op:
        return PermuteRope(self.heads, self.rotary, not self.back)


class NegateHalf(Single, frozen=True):
    """Change the sign of the second half of each head's rows: R(-θ) = S R(θ) S for rotations of the other sense."""

    name: ClassVar[str] = "negate_half"
    heads: int

    def shape1(self, shape: Shape) -> Shape:
        if self.heads < 1 or not shape or shape[0] % (2 * self.heads):
            raise OpError(f"negate_half: {list(shape)} does not split into {self.heads} heads of even size")
        return shape

    def apply1(self, x: Lazy) -> Lazy:
        head = x.shape[0] // self.heads
        halves = x.unflatten(0, (self.heads, head))
        low, high = halves.slice(1, 0, head // 2), halves.slice(1, head // 2, head)
        return low.concat([high.scaled(-1.0)], 1).flatten(0, 2)

    def inverse(self, shapes: list[Shape]) -> Op:
        return self


class Reshape(Single, frozen=True):
    """Give the same values, in the same order, another shape. One size may be -1."""

    name: ClassVar[str] = "reshape"
    to: Shape

    def shape1(self, shape: Shape) -> Shape:
        total = math.prod(shape)
        known = math.prod(n for n in self.to if n >= 0)
        holes = sum(n < 0 for n in self.to)
        if holes > 1 or (holes and (known == 0 or total % known)) or (not holes and known != total):
            raise OpError(f"reshape: {list(shape)} has {total} values, {list(self.to)} does not")
        return tuple(total // known if n < 0 else n for n in self.to)

    def apply1(self, x: Lazy) -> Lazy:
        return x.reshape(self.shape1(x.shape))

    def inverse(self, shapes: list[Shape]) -> Op:
        return Reshape(shapes[0])


class Split(Op, frozen=True):
    """Cut one tensor into several along an axis."""

    name: ClassVar[str] = "split"
    axis: int
    sizes: Shape

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        if len(shapes) != 1:
            raise OpError(f"split takes one tensor, got {len(shapes)}")
        shape = shapes[0]
        if not 0 <= self.axis < len(shape) or sum(self.sizes) != shape[self.axis] or min(self.sizes, default=0) < 0:
            raise OpError(f"split: sizes {list(self.sizes)} do not add up to dimension {self.axis} of {list(shape)}")
        return [(*shape[: self.axis], n, *shape[self.axis + 1 :]) for n in self.sizes]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        ends = [sum(self.sizes[: k + 1]) for k in range(len(self.sizes))]
        return [xs[0].slice(self.axis, end - n, end) for n, end in zip(self.sizes, ends, strict=True)]

    def inverse(self, shapes: list[Shape]) -> Op:
        return Concat(self.axis)


class Concat(Op, frozen=True):
    """Join several tensors into one along an axis."""

    name: ClassVar[str] = "concat"
    axis: int

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        rests = {(*s[: self.axis], 0, *s[self.axis + 1 :]) for s in shapes}
        if len(rests) != 1 or not 0 <= self.axis < len(shapes[0]):
            raise OpError(f"concat: {[list(s) for s in shapes]} do not join along dimension {self.axis}")
        total = sum(s[self.axis] for s in shapes)
        return [(*shapes[0][: self.axis], total, *shapes[0][self.axis + 1 :])]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        return [xs[0].concat(xs[1:], self.axis)]

    def inverse(self, shapes: list[Shape]) -> Op:
        return Split(self.axis, tuple(s[self.axis] for s in shapes))


class DeinterleaveQkv(Single, frozen=True):
    """Rows stored group by group as [q … q, k, v] become all of Q, then all of K, then all of V.

    A group is one key/value head with the heads / kv_heads query heads that read it: per head for plain
    multi-head attention (GPT-NeoX, BLOOM, Megatron GPT), per group for grouped-query attention (litgpt's old
    layout, Megatron-core). Weights [(heads + 2 * kv_heads) * D, C] and biases.
    """

    name: ClassVar[str] = "deinterleave_qkv"
    heads: int
    kv_heads: int
    back: bool = False

    def shape1(self, shape: Shape) -> Shape:
        rows = self.heads + 2 * self.kv_heads
        if min(self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads or not shape or shape[0] % rows:
            raise OpError(
                f"deinterleave_qkv: {list(shape)} does not hold {self.heads} query and twice {self.kv_heads} key heads"
            )
        return shape

    def apply1(self, x: Lazy) -> Lazy:
        groups, per = self.kv_heads, self.heads // self.kv_heads
        head = x.shape[0] // (self.heads + 2 * self.kv_heads)
        if self.back:
            q, kv = self.heads * head, self.kv_heads * head
            bounds = [(0, q, per), (q, q + kv, 1), (q + kv, q + 2 * kv, 1)]
            parts = [x.slice(0, a, b).unflatten(0, (groups, n * head)) for a, b, n in bounds]
            return parts[0].concat(parts[1:], 1).flatten(0, 2)
        rows = x.unflatten(0, (groups, (per + 2) * head))
        cuts = [(0, per), (per, per + 1), (per + 1, per + 2)]
        parts = [rows.slice(1, a * head, b * head).flatten(0, 2) for a, b in cuts]
        return parts[0].concat(parts[1:], 0)

    def inverse(self, shapes: list[Shape]) -> Op:
        return DeinterleaveQkv(self.heads, self.kv_heads, not self.back)


class ReorderHeads(Single, frozen=True):
    """Regroup heads along an axis: strided grouping (head h reads key h mod K) becomes consecutive (h div H/K).

    The axis holds ``heads`` heads seen as [heads / groups, groups]; the two are swapped, so that the heads of
    one group lie side by side. Used for x-transformers' and repeat-style grouped-query attention.
    """

    name: ClassVar[str] = "reorder_heads"
    heads: int
    groups: int
    axis: int = 0

    def shape1(self, shape: Shape) -> Shape:
        fits = 0 <= self.axis < len(shape) and min(self.heads, self.groups) > 0 and self.heads % self.groups == 0
        if not fits or shape[self.axis] % self.heads:
            raise OpError(
                f"reorder_heads: {list(shape)} does not split into {self.heads} heads in {self.groups} groups"
            )
        return shape

    def apply1(self, x: Lazy) -> Lazy:
        head = x.shape[self.axis] // self.heads
        y = x.unflatten(self.axis, (self.heads // self.groups, self.groups, head))
        order = list(range(len(y.shape)))
        order[self.axis], order[self.axis + 1] = self.axis + 1, self.axis
        return y.transpose(*order).flatten(self.axis, self.axis + 3)

    def inverse(self, shapes: list[Shape]) -> Op:
        return ReorderHeads(self.heads, self.heads // self.groups, self.axis)


class Stack(Op, frozen=True):
    """Join each run of ``count`` equal tensors along a new axis: per-expert matrices into one."""

    name: ClassVar[str] = "stack"
    axis: int
    count: int

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        runs = [shapes[k : k + self.count] for k in range(0, len(shapes), self.count)]
        if any(len(run) != self.count or len(set(run)) != 1 or not 0 <= self.axis <= len(run[0]) for run in runs):
            raise OpError(f"stack: {[list(s) for s in shapes]} are not runs of {self.count} equal shapes")
        return [(*run[0][: self.axis], self.count, *run[0][self.axis :]) for run in runs]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        rows = [x.reshape((*x.shape[: self.axis], 1, *x.shape[self.axis :])) for x in xs]
        runs = [rows[k : k + self.count] for k in range(0, len(rows), self.count)]
        return [run[0].concat(run[1:], self.axis) for run in runs]

    def inverse(self, shapes: list[Shape]) -> Op:
        return Unstack(self.axis, self.count)


class Unstack(Op, frozen=True):
    """Take each tensor apart along an axis of size ``count``, which disappears."""

    name: ClassVar[str] = "unstack"
    axis: int
    count: int

    def shape(self, shapes: list[Shape]) -> list[Shape]:
        if any(not 0 <= self.axis < len(s) or s[self.axis] != self.count for s in shapes):
            raise OpError(f"unstack: dimension {self.axis} of {[list(s) for s in shapes]} is not {self.count}")
        return [(*s[: self.axis], *s[self.axis + 1 :]) for s in shapes for _ in range(self.count)]

    def apply(self, xs: list[Lazy]) -> list[Lazy]:
        self.shape([x.shape for x in xs])
        rows = [x.slice(self.axis, k, k + 1) for x in xs for k in range(self.count)]
        return [r.reshape((*r.shape[: self.axis], *r.shape[self.axis + 1 :])) for r in rows]

    def inverse(self, shapes: list[Shape]) -> Op:
        return Stack(self.axis, self.count)
