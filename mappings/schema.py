"""The mapping file's shape: pydantic models that refuse what they do not know.

Field names are the YAML's own keys. Sizes may be integers or expressions of the family's size names
(:mod:`.expr`); :mod:`.rules` turns what passes into records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from . import expr


class Strict(BaseModel):
    """Unknown keys are errors, values are immutable, and 1 is not "1"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _check_size(size: int | str) -> int | str:
    if isinstance(size, str):
        expr.parse(size)
    return size


def _name_or_list(value: object) -> str:
    """Which of the two is meant, so that an error speaks of that one alone."""
    return "list" if isinstance(value, tuple) else "name"


def _name_or_table(value: object) -> str:
    """Which of the two is meant."""
    return "table" if isinstance(value, dict) else "name"


Size: TypeAlias = Annotated[int | str, AfterValidator(_check_size)]


class OpSpec(Strict):
    """Base of the operations as YAML spells them: ``transpose`` or ``{permute_rope: {heads: heads}}``."""


class TransposeSpec(OpSpec):
    op: Literal["transpose"]


class PermuteRopeSpec(OpSpec):
    op: Literal["permute_rope"]
    heads: Size
    rotary: Size = 0


class NegateHalfSpec(OpSpec):
    op: Literal["negate_half"]
    heads: Size


class ReshapeSpec(OpSpec):
    op: Literal["reshape"]
    to: tuple[Size, ...]


class SplitSpec(OpSpec):
    op: Literal["split"]
    axis: int = 0
    sizes: tuple[Size, ...]


class ConcatSpec(OpSpec):
    op: Literal["concat"]
    axis: int = 0


class PartsSpec(OpSpec):
    """A list of operations for each tensor, in order; spelled ``{parts: [[…], […], []]}``."""

    op: Literal["parts"]
    parts: tuple[tuple[PartOp, ...], ...]


class DeinterleaveQkvSpec(OpSpec):
    op: Literal["deinterleave_qkv"]
    heads: Size
    kv_heads: Size


class ReorderHeadsSpec(OpSpec):
    op: Literal["reorder_heads"]
    heads: Size
    groups: Size
    axis: int = 0


class StackSpec(OpSpec):
    op: Literal["stack"]
    axis: int = 0
    over: str


class UnstackSpec(OpSpec):
    op: Literal["unstack"]
    axis: int = 0
    over: str


class SliceSpec(OpSpec):
    op: Literal["slice"]
    axis: int = 0
    stop: Size


class PadSpec(OpSpec):
    op: Literal["pad"]
    axis: int = 0
    to: Size


class AddSpec(OpSpec):
    op: Literal["add"]
    value: float


class ScaleSpec(OpSpec):
    op: Literal["scale"]
    value: float


class CastSpec(OpSpec):
    op: Literal["cast"]
    dtype: Literal["float32", "float16", "bfloat16", "float64"]


class DequantizeSpec(OpSpec):
    """Two tensors become one: values of eight bits, and a factor for each block of ``block`` × ``block`` of them."""

    op: Literal["dequantize"]
    block: Size
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


OneTensorSpec: TypeAlias = (
    TransposeSpec
    | PermuteRopeSpec
    | NegateHalfSpec
    | ReshapeSpec
    | SplitSpec
    | ConcatSpec
    | PartsSpec
    | DeinterleaveQkvSpec
    | ReorderHeadsSpec
    | SliceSpec
    | PadSpec
    | AddSpec
    | ScaleSpec
    | CastSpec
)
AnyOp = Annotated[OneTensorSpec | StackSpec | UnstackSpec | DequantizeSpec, Field(discriminator="op")]
PartOp = Annotated[OneTensorSpec, Field(discriminator="op")]
"""What a part may go through: a run of tensors, which ``stack`` and ``unstack`` are about, is no part, nor is a tensor
with its scales."""
PartsSpec.model_rebuild()

Names: TypeAlias = Annotated[
    Annotated[str, Tag("name")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("list")],
    Discriminator(_name_or_list),
]


class Transform(Strict):
    """Tensors that change on their way. ``to`` defaults to ``from``; ``each`` writes a rule several times."""

    from_: Names = Field(alias="from")
    to: Names | None = None
    each: tuple[str, ...] = ()
    ops: tuple[AnyOp, ...] = ()


class Tie(Strict):
    """A tensor that must equal another, bit for bit; ``otherwise`` names its target when it does not."""

    to: str
    otherwise: str


NameOrTie: TypeAlias = Annotated[
    Annotated[str, Tag("name")] | Annotated[Tie, Tag("table")],
    Discriminator(_name_or_table),
]


class Fill(Strict):
    """Targets that the source lacks."""

    zeros: tuple[str, ...] = ()


class Blocks(Strict):
    """Fused tensors of which each rank holds its own full set of blocks: cut in each rank, joined block by block.

    ``view`` is a shape that each rank's tensor is given before, and that of what is joined; one size may be -1.
    """

    names: tuple[str, ...]
    axis: int = 0
    sizes: tuple[Size, ...]
    view: tuple[Size, ...] = ()


class Shards(Strict):
    """How the rank files of one tensor become that tensor; needed only where there is more than one rank."""

    cat0: tuple[str, ...] = ()
    cat1: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    sum: tuple[str, ...] = ()
    mean: tuple[str, ...] = ()
    disjoint: tuple[str, ...] = ()
    blocks: tuple[Blocks, ...] = ()


Reason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Section(Strict):
    """The rules proper; the top level of a file is one section, ``when`` holds conditional ones."""

    keep: tuple[str, ...] = ()
    rename: dict[str, str] = Field(default_factory=dict)
    transform: tuple[Transform, ...] = ()
    fill: Fill = Fill()
    tie: dict[str, NameOrTie] = Field(default_factory=dict)
    drop: dict[str, Reason] = Field(default_factory=dict)
    shards: Shards = Shards()


class MappingFile(Section):
    """One mapping file."""

    format: Literal[1]
    title: Reason
    ranges: dict[str, Size] = Field(default_factory=dict)
    when: dict[str, Section] = Field(default_factory=dict)


def keys_of(place: Sequence[int | str]) -> list[str]:
    """The keys that the table at this place, as pydantic names places, may have; none if it is no table of ours."""
    words = tuple(part for part in place if isinstance(part, str))
    if not words or words[-2:-1] == ("when",):
        return _keys(Section if words else MappingFile)
    if "ops" in words:
        specs = {get_args(spec.model_fields["op"].annotation)[0]: spec for spec in OpSpec.__subclasses__()}
        return [key for key in _keys(specs[words[-1]]) if key != "op"] if words[-1] in specs else []
    tables = {"transform": Transform, "fill": Fill, "shards": Shards, "blocks": Blocks, "table": Tie}
    return _keys(tables[words[-1]]) if words[-1] in tables else []


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
