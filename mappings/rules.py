"""A mapping's rules as plain records, and how an operation's words become an operation with integers.

:mod:`.schema` says what a file may hold and refuses the rest; what it has let pass becomes these. They need no
pydantic: a mapping that was checked once (see :mod:`.parse`) costs no imports the next time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Map
from typing import Any

from msgspec import Struct, field

from . import expr, moves, quantised, values
from .ops import Op
from .parts import Parts

Data = Map[str, Any]


class OpSpec(Struct, frozen=True):
    """An operation as YAML spells it: its name, and arguments that may be expressions of size names."""

    op: str
    arguments: Data

    @property
    def over(self) -> str:
        """The capture that ``stack`` consumes and ``unstack`` makes."""
        return str(self.arguments.get("over", ""))

    def bind(self, sizes: Map[str, int], ranges: Map[str, int]) -> Op:
        """The operation with integers. Raises ExprError for unknown names."""
        return _BINDERS[self.op](_Arguments(self.arguments, sizes, ranges))


class _Arguments(Struct, frozen=True):
    given: Data
    sizes: Map[str, int]
    ranges: Map[str, int]

    def size(self, name: str, default: int | None = None) -> int:
        return expr.evaluate(self.given[name] if default is None else self.given.get(name, default), self.sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(expr.evaluate(n, self.sizes) for n in self.given[name])

    def parts(self) -> tuple[tuple[Op, ...], ...]:
        return tuple(tuple(_spec(op).bind(self.sizes, self.ranges) for op in ops) for ops in self.given["parts"])

    @property
    def axis(self) -> int:
        return self.given.get("axis", 0)

    @property
    def count(self) -> int:
        return self.ranges[self.given["over"]]


_BINDERS: dict[str, Callable[[_Arguments], Op]] = {
    "transpose": lambda _: moves.Transpose(),
    "permute_rope": lambda a: moves.PermuteRope(a.size("heads"), a.size("rotary", 0)),
    "negate_half": lambda a: moves.NegateHalf(a.size("heads")),
    "reshape": lambda a: moves.Reshape(a.shape("to")),
    "split": lambda a: moves.Split(a.axis, a.shape("sizes")),
    "concat": lambda a: moves.Concat(a.axis),
    "parts": lambda a: Parts(a.parts()),
    "deinterleave_qkv": lambda a: moves.DeinterleaveQkv(a.size("heads"), a.size("kv_heads")),
    "reorder_heads": lambda a: moves.ReorderHeads(a.size("heads"), a.size("groups"), a.axis),
    "stack": lambda a: moves.Stack(a.axis, a.count),
    "unstack": lambda a: moves.Unstack(a.axis, a.count),
    "slice": lambda a: values.Slice(a.axis, a.size("stop")),
    "pad": lambda a: values.Pad(a.axis, a.size("to")),
    "add": lambda a: values.Add(float(a.given["value"])),
    "scale": lambda a: values.Scale(float(a.given["value"])),
    "cast": lambda a: values.Cast(a.given["dtype"]),
    "dequantize": lambda a: quantised.Dequantize(a.size("block"), a.given.get("dtype", "bfloat16")),
}

OPERATIONS = tuple(_BINDERS)
"""The names of all operations."""


class Transform(Struct, frozen=True):
    """Tensors that change on their way. ``to`` is None where it is the same as ``from_``."""

    from_: str | tuple[str, ...]
    to: str | tuple[str, ...] | None
    each: tuple[str, ...]
    ops: tuple[OpSpec, ...]


class Tie(Struct, frozen=True):
    """A tensor that must equal another, bit for bit; ``otherwise`` names its target when it does not."""

    to: str
    otherwise: str


class Blocks(Struct, frozen=True):
    """Fused tensors of which each rank holds its own full set of blocks, after it was seen in the shape ``view``."""

    names: tuple[str, ...]
    axis: int
    sizes: tuple[int | str, ...]
    view: tuple[int | str, ...]


class Section(Struct, frozen=True):
    """The rules proper. ``shards`` maps a kind of join to its patterns; ``zeros`` lists the targets to fill."""

    keep: tuple[str, ...]
    rename: Map[str, str]
    transform: tuple[Transform, ...]
    zeros: tuple[str, ...]
    tie: Map[str, str | Tie]
    drop: Map[str, str]
    shards: Map[str, tuple[str, ...]]
    blocks: tuple[Blocks, ...]


class MappingFile(Struct, frozen=True):
    """One mapping file: a section that always holds, and those that hold ``when`` a flag does."""

    title: str
    section: Section
    ranges: Map[str, int | str] = field(default_factory=dict[str, "int | str"])
    when: Map[str, Section] = field(default_factory=dict[str, Section])


def build(data: Data) -> MappingFile:
    """The records of a file's plain values, which :mod:`.schema` has checked."""
    when = {condition: _section(rules) for condition, rules in data.get("when", {}).items()}
    return MappingFile(data["title"], _section(data), data.get("ranges", {}), when)


def _section(data: Data) -> Section:
    shards = dict(data.get("shards", {}))
    blocks = tuple(
        Blocks(b["names"], b.get("axis", 0), b["sizes"], b.get("view", ())) for b in shards.pop("blocks", ())
    )
    ties = {name: tie if isinstance(tie, str) else Tie(**tie) for name, tie in data.get("tie", {}).items()}
    return Section(
        keep=data.get("keep", ()),
        rename=data.get("rename", {}),
        transform=tuple(_transform(rule) for rule in data.get("transform", ())),
        zeros=data.get("fill", {}).get("zeros", ()),
        tie=ties,
        drop={name: reason.strip() for name, reason in data.get("drop", {}).items()},
        shards=shards,
        blocks=blocks,
    )


def _transform(rule: Data) -> Transform:
    ops = tuple(_spec(op) for op in rule.get("ops", ()))
    return Transform(rule["from"], rule.get("to"), rule.get("each", ()), ops)


def _spec(op: Data) -> OpSpec:
    return OpSpec(op["op"], {k: v for k, v in op.items() if k != "op"})
