"""Everything before the first byte is written: open, recognise, measure, plan. What `inspect` and `plan` show."""

from __future__ import annotations

from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ..archs.base import Arch, Dim, Dims, Inventory, Match, Measure, boolean
from ..archs.given import ConfigFile, Given
from ..archs.own_file import left_open
from ..archs.refused import refuse
from ..archs.registry import detect, evidence, load_arch, mapping_path
from ..errors import input_error, usage_error
from ..mappings.expand import Expanded, expand, names_target
from ..mappings.parse import Mapping, load_mapping
from ..mappings.tensors import Target
from .config_file import refuse_unread, told_tied, with_extras, with_remark
from .expected import expected_target, expected_tensors
from .inventory import take_inventory, with_prefix_of
from .merge import refuse_tied, with_adapter
from .open import Checkpoint, open_checkpoint
from .pause import collector_paused
from .plan import Plan
from .planner import make_plan
from .strangers import refuse_strangers, with_what_is_open
from .ties import tied_of

DTYPES = ("float32", "bfloat16", "float16")
"""What ``dtype`` may ask for: float8 needs scales, and no engine serves float64."""


class Options(Struct, frozen=True):
    """What the user may say about a checkpoint that the checkpoint itself does not."""

    arch: str | None = None
    given: Map[str, str] = field(default_factory=dict[str, str])
    weights: str | None = None
    dtype: str | None = None
    config: ConfigFile | None = None
    merge_lora: str | None = None


class Recognised(Struct, frozen=True):
    """A checkpoint whose family and dims are known."""

    checkpoint: Checkpoint
    inventory: Inventory
    match: Match
    dims: Dims
    mapping: Mapping
    expanded: Expanded
    options: Options

    @property
    def arch(self) -> Arch:
        """The family."""
        return self.match.arch

    @property
    def target(self) -> str:
        """The class that serves it."""
        return str(self.arch.hf_config(self.dims)["architectures"][0])


class Prepared(Recognised, frozen=True):
    """A recognised checkpoint with its target config and plan."""

    config: Map[str, Any]
    plan: Plan


@collector_paused()
def recognise(path: Path, options: Options | None = None) -> Recognised:
    """Open, find the family, settle the dims. Raises MdlError with all that is wrong; reads no weights, except
    to compare two tensors that may be tied."""
    options = options or Options()
    checkpoint = open_checkpoint(path)
    inventory = take_inventory(checkpoint, weights=options.weights)
    if options.merge_lora:
        inventory = with_adapter(inventory, Path(options.merge_lora))
    config = Given(options.config) if options.config else None
    if config:
        inventory = with_extras(inventory, config)
    match = _match(inventory, options.arch)
    mapping = load_mapping(mapping_path(match.arch))
    refuse_strangers(mapping, inventory, match.arch)
    given = dict(options.given)
    tied = given.pop("tied", None)
    if config:
        config.forget()
    with with_what_is_open(match.arch, mapping, inventory):
        dims = _measured(match.arch, Measure(inventory, given, config))
    told = told_tied(config) if config else None
    if asked := _said_tied(tied):  # over what the family read itself, before the target is made of it
        dims = dims.having("tied", asked)
    if config:
        refuse_unread(config)
        inventory = with_remark(inventory, config)
    target = _target(match.arch, dims) if names_target(mapping) else None
    if target:
        inventory = with_prefix_of(inventory, target)
    expanded = expand(mapping, dims.sizes(), dims.flags(), target, dims.words())
    said = dims.entries.get("tied") or told  # a family that has its own has read --config already
    dims = dims.having("tied", tied_of(expanded, inventory, said, match.arch, dims))
    refuse_tied(inventory, expanded, tied=bool(dims["tied"]))
    return Recognised(checkpoint, inventory, match, dims, mapping, expanded, options)


@collector_paused()
def prepare(path: Path, options: Options | None = None) -> Prepared:
    """Recognise and plan. Problems of the plan are in ``plan.problems``: call ``plan.refuse()`` before writing."""
    options = options or Options()
    if options.dtype is not None and options.dtype not in DTYPES:
        raise usage_error(f"--dtype {options.dtype}: not a type to write", do=f"one of: {', '.join(DTYPES)}")
    r = recognise(path, options)
    config = r.arch.hf_config(r.dims)
    tied = bool(r.dims["tied"])
    expected = expected_tensors(config, r.arch, r.dims)
    plan = make_plan(r.expanded, r.inventory, expected, tied=tied, dtype=options.dtype)
    plan = replace(plan, open=tuple(left_open(r.arch)))
    config["dtype"] = plan.dtype
    return Prepared(r.checkpoint, r.inventory, r.match, r.dims, r.mapping, r.expanded, options, config, plan)


def _target(arch: Arch, dims: Dims) -> Target:
    """What the class holds, before it is known whether the head is the embedding."""
    config = {} if callable(arch.tensors) else arch.hf_config(dims)
    return expected_target(config, arch, dims)


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
    if not arch.file:  # a user's own family may well be one that mdl's can't be
        refuse(inventory)
    return Match(arch, evidence(arch, inventory) or (f"--arch {name} says so",))


def _said_tied(given: str | None) -> Dim | None:
    if given is None:
        return None
    try:
        return Dim(boolean(given), "user", f"--set tied={given}")
    except ValueError:
        raise usage_error(f"--set tied={given}: expected true or false") from None
