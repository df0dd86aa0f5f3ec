"""Everything before the first byte is written: open, recognise, measure, plan. What `inspect` and `plan` show."""

from __future__ import annotations

from collections.abc import Mapping as Map
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..archs.base import Arch, Dim, Dims, Inventory, Match, Measure, boolean
from ..archs.registry import detect, evidence, load_arch, mapping_path
from ..errors import input_error, usage_error
from ..mappings.expand import Expanded, expand, names_target
from ..mappings.ops import OpError
from ..mappings.parse import Mapping, load_mapping
from ..mappings.tensors import TensorInfo
from .expected import expected_target, expected_tensors
from .inventory import take_inventory, with_prefix_of
from .open import Checkpoint, open_checkpoint
from .plan import Plan, Source, joined_shape, make_plan

DTYPES = ("float32", "bfloat16", "float16")
"""What ``dtype`` may ask for: float8 needs scales, and no engine serves float64."""


@dataclass(frozen=True)
class Options:
    """What the user may say about a checkpoint that the checkpoint itself does not."""

    arch: str | None = None
    given: Map[str, str] = field(default_factory=dict[str, str])
    weights: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Recognised:
    """A checkpoint whose family and dims are known."""

    checkpoint: Checkpoint
    inventory: Inventory
    match: Match
    dims: Dims
    mapping: Mapping
    expanded: Expanded

    @property
    def arch(self) -> Arch:
        """The family."""
        return self.match.arch

    @property
    def target(self) -> str:
        """The class that serves it."""
        return str(self.arch.hf_config(self.dims)["architectures"][0])


@dataclass(frozen=True)
class Prepared(Recognised):
    """A recognised checkpoint with its target config and plan."""

    config: Map[str, Any]
    plan: Plan


def recognise(path: Path, options: Options | None = None) -> Recognised:
    """Open, find the family, settle the dims. Raises MdlError with all that is wrong; reads no weights, except
    to compare two tensors that may be tied."""
    options = options or Options()
    checkpoint = open_checkpoint(path)
    inventory = take_inventory(checkpoint, weights=options.weights)
    match = _match(inventory, options.arch)
    mapping = load_mapping(mapping_path(match.arch))
    given = dict(options.given)
    tied = given.pop("tied", None)
    measure = Measure(inventory, given)
    dims = _measured(match.arch, measure)
    target = expected_target(match.arch.hf_config(dims)) if names_target(mapping) else None
    if target:
        inventory = with_prefix_of(inventory, target)
    expanded = expand(mapping, dims.sizes(), dims.flags(), target)
    said = dims.entries.get("tied") or _said_tied(tied)
    dims = dims.having("tied", _tied(expanded, inventory, said))
    return Recognised(checkpoint, inventory, match, dims, mapping, expanded)


def prepare(path: Path, options: Options | None = None) -> Prepared:
    """Recognise and plan. Problems of the plan are in ``plan.problems``: call ``plan.refuse()`` before writing."""
    options = options or Options()
    if options.dtype is not None and options.dtype not in DTYPES:
        raise usage_error(f"--dtype {options.dtype}: not a type to write", do=f"one of: {', '.join(DTYPES)}")
    r = recognise(path, options)
    config = r.arch.hf_config(r.dims)
    tied = bool(r.dims["tied"])
    plan = make_plan(r.expanded, r.inventory, expected_tensors(config), tied=tied, dtype=options.dtype)
    config["dtype"] = plan.dtype
    return Prepared(r.checkpoint, r.inventory, r.match, r.dims, r.mapping, r.expanded, config, plan)


def _measured(arch: Arch, measure: Measure) -> Dims:
    """The dims. A family reads the shapes that its own checkpoints have; a stranger's tensors
    may have any, with fewer dimensions than it unpacks."""
    try:
        arch.dims(measure)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise input_error(
            f"{arch.title} can't take its sizes from these tensors ({type(error).__name__}: {error}): "
            "one of them is missing or has another number of dimensions",
            measure.inventory.path,
            "compare the shapes with `mdl inspect`; if they are right, pass another --arch",
        ) from error
    return measure.done()


def _match(inventory: Inventory, name: str | None) -> Match:
    if name is None:
        return detect(inventory)
    arch = load_arch(name)
    return Match(arch, evidence(arch, inventory) or (f"--arch {name} says so",))


def _said_tied(given: str | None) -> Dim | None:
    if given is None:
        return None
    try:
        return Dim(boolean(given), "user", f"--set tied={given}")
    except ValueError:
        raise usage_error(f"--set tied={given}: expected true or false") from None


def _tied(expanded: Expanded, inventory: Inventory, said: Dim | None) -> Dim:
    """Whether the output head is the embedding: by absence, by shared memory, or by comparing every bit. Who says that
    it is must be right."""
    if said is not None and not said.value:
        return said
    found = _compare_ties(expanded, inventory)
    if said is not None and not found.value:
        do = "set it to false: both will be written"
        raise input_error(f"{said.because}, but {found.because}", inventory.path, do)
    return said or found


def _compare_ties(expanded: Expanded, inventory: Inventory) -> Dim:
    if not expanded.ties:
        return Dim(False, "default", "the family ties nothing")
    present = [tie for tie in expanded.ties if tie.source in inventory]
    first = (present or expanded.ties)[0]
    if not present:
        return Dim(True, "shapes", f"there is no {first.source}: the head is {first.twin}")
    because = "share one storage"
    for tie in present:
        if tie.twin not in inventory:
            return Dim(False, "shapes", f"there is {tie.source}, but no {tie.twin}")
        if _one_storage(inventory.tensors[tie.source], inventory.tensors[tie.twin]):
            continue
        if not _equal(expanded, inventory, tie.source, tie.twin):
            return Dim(False, "values", f"{tie.source} and {tie.twin} differ")
        because = "are equal, bit for bit"
    return Dim(True, "values", f"{first.source} and {first.twin} {because}")


def _one_storage(a: tuple[TensorInfo, ...], b: tuple[TensorInfo, ...]) -> bool:
    """Whether two tensors are one piece of memory, rank by rank: tied in the checkpoint itself."""
    keys = [[(i.storage, i.offset, i.shape, i.stride, i.dtype) for i in infos] for infos in (a, b)]
    return keys[0] == keys[1]


def _equal(expanded: Expanded, inventory: Inventory, a: str, b: str) -> bool:
    """Compare two tensors of different storages, rank files joined; stops at the first difference."""
    infos = inventory.tensors[a], inventory.tensors[b]
    joins = [expanded.joins.get(name) if inventory.ranks > 1 else None for name in (a, b)]
    try:
        shapes = [
            joined_shape(join, [i.shape for i in info]) if join else info[0].shape
            for join, info in zip(joins, infos, strict=True)
        ]
    except OpError:
        return False  # the plan names what does not fit
    if shapes[0] != shapes[1] or infos[0][0].dtype != infos[1][0].dtype:
        return False
    from .sources import Files, lazy_source, same_values

    with Files() as files:
        one, other = (Source(n, i, s, j) for n, i, s, j in zip((a, b), infos, shapes, joins, strict=True))
        return same_values(lazy_source(files, one), lazy_source(files, other))
