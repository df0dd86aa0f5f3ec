"""Which module of the reference answers to which of vLLM's, by the plan that says which tensor becomes which.

A rule that turns ``layers.0.attention.wq.weight`` into ``model.layers.0.self_attn.q_proj.weight`` pairs the two
modules, and what holds the one with what holds the other. Where the rule moves rows or columns, outputs or inputs
move alike: the plan's own operations, applied to indices instead of weights, say how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from ..convert.plan import Plan, Step
from ..mappings.lazy import Lazy
from ..mappings.ops import OpError
from ..mappings.parts import without
from ..mappings.values import Add, Cast, Scale
from .reference import Reference

if TYPE_CHECKING:
    import torch

Index = npt.NDArray[np.int64]


class Call(Struct, frozen=True):
    """One module of the reference with what it was called with, in the float64 run; ``at`` counts calls as they end."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    at: int


class Seen(Struct, frozen=True):
    """A reference that was watched: its outermost module, the path under which the mapping's names begin in it, and
    the calls of its modules by the mapping's names."""

    root: torch.nn.Module
    prefix: str
    calls: Mapping[str, Call]


class Move(Struct, frozen=True):
    """How the columns of the reference's output and input become those of the served module (with their signs)."""

    rows: Index
    factors: npt.NDArray[np.float64]
    columns: Index


class Unit(Struct, frozen=True):
    """A pair. ``modules`` are the reference's (several if they are stored as one), ``targets`` the stored tensors
    that name the served module, ``tensors`` all stored tensors in it; ``moves`` are per target, None where nothing
    moves."""

    modules: tuple[str, ...]
    targets: tuple[str, ...]
    tensors: tuple[str, ...]
    leaf: bool
    head: bool
    at: int
    moves: tuple[Move, ...] | None = None

    @property
    def key(self) -> str:
        """Its name."""
        return " + ".join(self.modules)


def watch(reference: Reference, ids: list[int], names: Sequence[str]) -> Seen | None:
    """Run the reference in float64 and note every call. None if it has no modules here, or none by these names."""
    from torch.nn.modules.module import register_module_forward_hook

    calls: dict[int, Call] = {}
    modules: list[torch.nn.Module] = []

    def note(module: Any, args: Any, kwargs: Any, _out: Any) -> None:
        modules.append(module)
        calls.setdefault(id(module), Call(module, args, dict(kwargs), len(modules)))

    handle = register_module_forward_hook(note, with_kwargs=True)
    try:
        reference.logits(ids, "float64")
    finally:
        handle.remove()
    if not modules:
        return None
    root = modules[-1]  # the outermost ends last
    own = {name: module for name, module in root.named_modules() if id(module) in calls}
    wanted = {name.rpartition(".")[0] for name in names}
    prefixes = Counter(found.removesuffix(name) for name in wanted for found in own if f".{found}".endswith(f".{name}"))
    if not prefixes:
        return None
    prefix = prefixes.most_common(1)[0][0]
    return Seen(root, prefix, {n.removeprefix(prefix): calls[id(m)] for n, m in own.items() if n.startswith(prefix)})


def make_units(plan: Plan, seen: Seen, vocab: int) -> list[Unit]:
    """Every pair that can be asked, in the order in which the reference's modules end."""
    leaves = [unit for steps in _by_modules(plan).values() for unit in _leaf(plan, steps, seen)]
    head = _head(seen, vocab, leaves)
    leaves = [unit for unit in leaves if head is None or unit.modules != head.modules] + ([head] if head else [])
    parents: list[Unit] = []
    for name, call in seen.calls.items():
        under = [u for u in leaves if not u.head and all(m.startswith(f"{name}.") for m in u.modules)]
        if name and under and stream(call) is not None:
            targets = [target for unit in under for target in unit.targets]
            tensors = dict.fromkeys([t for unit in under for t in unit.tensors] + _stored_under(plan, name))
            parents.append(Unit((name,), tuple(targets), tuple(tensors), leaf=False, head=False, at=call.at))
    return sorted([*leaves, *parents], key=lambda unit: unit.at)


def _stored_under(plan: Plan, module: str) -> list[str]:
    """Tensors made from the module's own, those too that no module here stands for (experts computed as one)."""
    under = f"{module}."
    return [t for step in plan.writes if any(s.name.startswith(under) for s in step.sources) for t in step.targets]


def stream(call: Call) -> torch.Tensor | None:
    """The hidden states among the arguments of a call, as [T, C]: its first floating tensor, unless ids come before."""
    import torch

    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.reshape(-1, value.shape[-1]) if value.is_floating_point() and value.dim() > 1 else None
    return None


def below(unit: Unit, units: Sequence[Unit]) -> Iterator[Unit]:
    """The units inside one."""
    for other in units:
        if other is not unit and not unit.leaf and all(m.startswith(f"{unit.key}.") for m in other.modules):
            yield other


def level(unit: Unit, units: Sequence[Unit]) -> int:
    """How many levels of units there are inside."""
    return 1 + max((level(other, units) for other in below(unit, units)), default=-1)


def _by_modules(plan: Plan) -> dict[tuple[str, ...], list[Step]]:
    groups: dict[tuple[str, ...], list[Step]] = {}
    for step in plan.writes:
        if step.sources:
            modules = tuple(dict.fromkeys(source.name.rpartition(".")[0] for source in step.sources))
            groups.setdefault(modules, []).append(step)
    return groups


def _leaf(plan: Plan, steps: list[Step], seen: Seen) -> Iterator[Unit]:
    main = max(steps, key=lambda s: (len(s.sources[0].shape), s.sources[0].name.endswith(".weight")))
    modules = tuple(dict.fromkeys(source.name.rpartition(".")[0] for source in main.sources))
    if not all(name in seen.calls for name in modules):
        return
    homes = {target.rpartition(".")[0] for target in main.targets}
    fills = [t for s in plan.writes if not s.sources for t in s.targets if t.rpartition(".")[0] in homes]
    tensors = (*(t for step in steps for t in step.targets), *fills)
    at = max(seen.calls[name].at for name in modules)
    linear = len(main.sources[0].shape) == 2 and stream(seen.calls[modules[0]]) is not None
    moves = _moves(main) if linear else None
    if linear and moves is None and (main.ops or len(modules) > 1):
        return
    yield Unit(modules, main.targets, tensors, leaf=True, head=False, at=at, moves=moves)


def _head(seen: Seen, vocab: int, leaves: Sequence[Unit]) -> Unit | None:
    """The module that makes the logits: the last to end of those that hold no others, if it answers over the
    vocabulary. A tied one has no tensor of its own; then it stands for the embedding's."""
    import torch

    ends = [n for n in seen.calls if not any(other.startswith(f"{n}.") for other in seen.calls) and n]
    name = max(ends, key=lambda n: seen.calls[n].at)
    call = seen.calls[name]
    with torch.inference_mode():
        out = call.module(*call.args, **call.kwargs)
    if stream(call) is None or not isinstance(out, torch.Tensor) or out.shape[-1] != vocab:
        return None
    own = next((unit for unit in leaves if unit.modules == (name,)), None)
    if own is None:
        embeddings = [u for u in leaves if _rows(seen.calls[u.modules[0]].module) == vocab]
        own = embeddings[0] if embeddings else None
    return Unit((name,), ("lm_head.weight",), own.tensors if own else (), leaf=True, head=True, at=call.at)


def _rows(module: torch.nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return 0 if weight is None else len(weight)


def _moves(step: Step) -> tuple[Move, ...] | None:
    """Run the plan's operations on row numbers, column numbers and ones; None where they do not stay matrices."""
    scaling = without(step.ops, Add, Cast)
    moving = without(scaling, Scale)
    rows: list[Lazy] = []
    columns: list[Lazy] = []
    ones: list[Lazy] = []
    begin = 1  # zero would be padding
    for source in step.sources:
        n, m = source.shape
        down = np.arange(begin, begin + n, dtype=np.float64)[:, None]
        along = np.arange(1, m + 1, dtype=np.float64)[None]
        rows.append(Lazy.of(np.broadcast_to(down, source.shape), "float64"))
        columns.append(Lazy.of(np.broadcast_to(along, source.shape), "float64"))
        ones.append(Lazy.of(np.broadcast_to(np.float64(1), source.shape), "float64"))
        begin += n
    try:
        for op in moving:
            rows, columns = op.apply(rows), op.apply(columns)
        for op in scaling:
            ones = op.apply(ones)
    except OpError:
        return None
    found = [_move(*three) for three in zip(rows, columns, ones, strict=True)]
    return tuple(move for move in found if move is not None) if all(found) else None


def _move(rows: Lazy, columns: Lazy, ones: Lazy) -> Move | None:
    if len(rows.shape) != 2:
        return None
    down, along = np.ravel(rows.slice(1, 0, 1).read()), np.ravel(rows.slice(0, 0, 1).read())
    turned = len(down) > 1 and bool((down == down[0]).all())  # stored transposed: vLLM turns it back
    out = along if turned else down
    into = np.ravel(columns.slice(1, 0, 1).read() if turned else columns.slice(0, 0, 1).read())
    if not (out.all() and into.all()):  # padding: rows that no source has
        return None
    index = np.abs(out).astype(np.int64) - 1
    factors = np.ravel((ones.slice(0, 0, 1) if turned else ones.slice(1, 0, 1)).read())
    return Move(index, factors, np.abs(into).astype(np.int64) - 1)
