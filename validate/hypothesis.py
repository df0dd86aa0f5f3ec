"""Explanations put to the test: the reference is built again with one thing changed, and fed the same input.

If the changed reference answers what vLLM answered, that thing is the cause. Three sources of changes: what
config.json says otherwise than the checkpoint, values that are often mistaken for each other, and weights that are
in another order or in each other's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate, combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct, field

from ..archs.base import Dim, Dims, Value
from ..archs.guard import build_eager
from ..convert.config import BESIDE_THE_PLAN
from ..convert.prepare import Prepared
from ..errors import MdlError
from ..mappings.lazy import Lazy
from ..mappings.moves import PermuteRope, ReorderHeads, Split
from ..mappings.ops import Op, OpError
from ..mappings.values import Scale
from .asking import Answer, nmse, replay
from .pairing import Seen

if TYPE_CHECKING:
    import torch

MISTAKEN: dict[str, tuple[Value, ...]] = {
    "norm_eps": (1e-5, 1e-6, 1e-8, 1e-12),
    "rope_theta": (1e4, 5e5, 1e6),
    "rope_scaling": ("none",),
    "activation": ("gelu", "gelu_new", "silu", "relu"),
}
"""Values of a dim that one implementation has and another has not."""

_PAIRS = 60
"""Pairs of tensors that are looked at: those of one attention or MLP; a whole model's would take minutes."""

State = dict[str, Any]
Spans = dict[str, list[tuple[int, int]]]
"""Rows of raw tensors, from and to."""


class Change(Struct, frozen=True):
    """One hypothesis: dims that are other than the checkpoint says, or an edit of the weights, and its words."""

    words: str
    governed_by: str
    dims: Mapping[str, Value] = field(default_factory=dict[str, Value])
    edit: Callable[[State], State] | None = None


class Tried(Struct, frozen=True):
    """A hypothesis and the error that is left under it."""

    change: Change
    left: float


class Trials(Struct, frozen=True):
    """Everything a hypothesis is tried on: the checkpoint, the reference as it was watched, and the faulty module."""

    prepared: Prepared
    seen: Seen
    answer: Answer
    ids: list[int]

    def best(self, changes: Iterator[Change]) -> Tried | None:
        """The first that explains the error, or else the one that takes away most of it, if it takes 99 %."""
        limit = max(16 * self.answer.floor, 1e-11)
        found: Tried | None = None
        for change in changes:
            left = self._left(change)
            if left is not None and (found is None or left < found.left):
                found = Tried(change, left)
            if found is not None and found.left <= min(limit, 0.1 * self.answer.error):
                break
        return found if found is not None and found.left < 0.01 * self.answer.error else None

    def _left(self, change: Change) -> float | None:
        state = {
            name.removeprefix(self.seen.prefix): tensor
            for name, tensor in self.seen.root.state_dict().items()
            if name.startswith(self.seen.prefix)
        }
        try:
            root = _build(self.prepared, change.dims, change.edit(state) if change.edit else state)
        except (MdlError, RuntimeError, OpError, KeyError, TypeError, ZeroDivisionError):
            return None  # no such model: not the explanation
        exact = None if root is None else replay(root, self.answer.unit, self.seen, self.ids)
        if exact is None or exact.shape != self.answer.got.shape:
            return None
        return nmse(self.answer.got, exact)


def _build(prepared: Prepared, changed: Mapping[str, Value], state: State) -> torch.nn.Module | None:
    module = build_eager(prepared.arch, _having(prepared.dims, changed))
    module.load_state_dict(state, strict=False, assign=True)
    return None if any(p.is_meta for p in module.parameters()) else module.eval()


def _having(dims: Dims, changed: Mapping[str, Value]) -> Dims:
    for name, value in changed.items():
        dims = dims.having(name, Dim(value, "user", "a hypothesis"))
    return dims


def differences(config: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which a layout's config.json is not what the checkpoint's would be: (there, planned)."""
    theirs, ours = dict(_flat(config)), dict(_flat(planned))
    known = [path for path in {**ours, **theirs} if path in ours or path not in BESIDE_THE_PLAN]
    return {path: (theirs.get(path), ours.get(path)) for path in known if theirs.get(path) != ours.get(path)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(cast("Mapping[str, Any]", item), f"{prefix}{name}.")
        else:
            yield prefix + name, item


def from_config(prepared: Prepared, config: Mapping[str, Any]) -> Iterator[Change]:
    """What config.json says otherwise: each field alone, then all together."""
    found = differences(config, prepared.config)
    together: dict[str, Value] = {}
    for path, (there, planned) in found.items():
        for name, value in _implied(prepared, config, path, there):
            together |= {name: value}
            words = f"{path} is {there!r} where the checkpoint's is {planned!r}"
            yield Change(words, f"config.json: {path}", {name: value})
    together |= _new(prepared, config, together)
    if len(found) > 1:
        words = ", ".join(f"{path} is {a!r} for {b!r}" for path, (a, b) in found.items())
        yield Change(words, "config.json: " + ", ".join(found), together)


def _implied(prepared: Prepared, config: Mapping[str, Any], path: str, there: Any) -> Iterator[tuple[str, Value]]:
    """Which dims, at which value, would put this into the config. Words for "nothing" differ between the two."""
    for name, dim in prepared.dims.entries.items():
        for value in (there, "none"):  # not as keys: what config.json says may be a list
            if value != dim.value and dict(_config(prepared, {name: value}, config)).get(path, _unset) == there:
                yield name, value


_unset = object()


class _Open(dict[str, Any]):
    """Dims in which a value that nobody gave is a marker of its name."""

    def __missing__(self, name: str) -> _Marker:
        return _Marker(name)


class _Marker(Struct, frozen=True):
    name: str


def _config(prepared: Prepared, changed: Mapping[str, Value], _like: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        dims: Any = _Open({**prepared.dims, **changed})
        yield from _flat(prepared.arch.hf_config(dims))
    except (TypeError, ValueError, KeyError, MdlError, ZeroDivisionError):
        return  # this family has no config for such dims


def _new(prepared: Prepared, config: Mapping[str, Any], changed: Mapping[str, Value]) -> dict[str, Value]:
    """Dims that the checkpoint has not, but that the changed config needs (a scaling's factor)."""
    theirs = dict(_flat(config))
    markers = ((path, v) for path, v in _config(prepared, changed, config) if isinstance(v, _Marker))
    return {marker.name: theirs[path] for path, marker in markers if path in theirs}


def field_of(prepared: Prepared, dims: Mapping[str, Value]) -> str:
    """The fields of config.json that these dims decide."""
    before, after = dict(_config(prepared, {}, {})), dict(_config(prepared, dims, {}))
    paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    if paths:
        return "config.json: " + ", ".join(paths)
    written = _written(before, dims)
    if not written:
        return "config.json: a value that it does not hold"
    return f"config.json: {', '.join(written)}, written by {_author(prepared.arch.hf_config)}"


def _written(config: Mapping[str, Any], dims: Mapping[str, Value]) -> list[str]:
    """Fields that hold such a value although no dim decides them: the family's hf_config wrote it, whatever the dims
    say. A field of the dim's own name goes before others that happen to hold the same."""
    own = [path for path in config if path.rpartition(".")[2] in dims]
    same = [path for path, value in config.items() if not isinstance(value, bool | None) and value in dims.values()]
    return [path for path in own if path in same] or same or own


def _author(function: Callable[..., Any]) -> str:
    compiled = getattr(function, "__code__", None)
    name = getattr(function, "__name__", "hf_config")
    return f"{Path(compiled.co_filename).name}'s {name}" if compiled else f"the family's {name}"


def often_mistaken(prepared: Prepared) -> Iterator[Change]:
    """Values that are taken for each other, one dim at a time."""
    for name, values in MISTAKEN.items():
        now = prepared.dims.get(name, _unset)
        for value in values:
            if now is not _unset and value != now:
                words = f"with {name} {value} in place of {now}"
                yield Change(words, field_of(prepared, {name: value}), {name: value})


def reordered(prepared: Prepared, inside: Mapping[str, tuple[str, str]]) -> Iterator[Change]:
    """Rows of the query and key projections in another order. ``inside`` maps a raw tensor to (target, rule)."""
    head = prepared.dims.get("head_dim")
    queries = _rows_of(prepared, inside, ("q_proj.weight", "k_proj.weight"))
    if not isinstance(head, int) or not queries:
        return
    where = "mapping: " + ", ".join(dict.fromkeys(inside[n][1] for n in queries))
    for back in (True, False):
        words = f"with the rows of q and k {'not ' if back else ''}moved from rotary pairs to rotary halves"
        yield Change(words, where, edit=_editor(queries, head, lambda heads, b=back: PermuteRope(heads, 0, b)))
    groups = prepared.dims.get("kv_heads")
    q = _rows_of(prepared, inside, ("q_proj.weight",))
    if isinstance(groups, int):
        words = "with query heads grouped the other way round (h mod K for h div H/K)"
        yield Change(words, where, edit=_editor(q, head, lambda heads: ReorderHeads(heads, groups)))
    for factor, words in ((head**0.5, "without the attention scale"), (head**-0.5, "with a scale of 1/D for 1/√D")):
        yield Change(words, where, edit=_editor(q, head, lambda _, f=factor: Scale(f)))


def _rows_of(prepared: Prepared, inside: Mapping[str, tuple[str, str]], ends: tuple[str, ...]) -> Spans:
    """Which rows of each raw tensor become a target that ends so: all, or those that a rule first of all cuts off."""
    found: Spans = {}
    for step, source in ((one, s) for one in prepared.plan.writes for s in one.sources if s.name in inside):
        split = step.ops[0] if step.ops else None
        if isinstance(split, Split) and split.axis == 0 and len(split.sizes) == len(step.targets):
            cuts = zip(accumulate(split.sizes), split.sizes, step.targets, strict=True)
            found[source.name] = [(stop - size, stop) for stop, size, target in cuts if target.endswith(ends)]
        elif inside[source.name][0].endswith(ends):
            found[source.name] = [(0, source.shape[0])]
    return {name: spans for name, spans in found.items() if spans}


def exchanged(prepared: Prepared, inside: Mapping[str, tuple[str, str]]) -> Iterator[Change]:
    """Two tensors of one shape taken for each other, or two equal parts of a tensor that a rule splits first of all."""
    shapes = {source.name: source.shape for step in prepared.plan.writes for source in step.sources}
    for a, b in islice(combinations(sorted(inside), 2), _PAIRS):
        if shapes[a] == shapes[b]:
            where = "mapping: " + ", ".join(dict.fromkeys((inside[a][1], inside[b][1])))
            yield Change(f"with {a} and {b} exchanged", where, edit=lambda s, a=a, b=b: s | {a: s[b], b: s[a]})
    for step in prepared.plan.writes:
        name = step.sources[0].name if step.sources else ""
        split = step.ops[0] if step.ops else None
        if name in inside and isinstance(split, Split) and len(split.sizes) == len(step.targets):
            for i, j in combinations(range(len(split.sizes)), 2):
                if split.sizes[i] == split.sizes[j]:
                    parts = " and ".join(step.targets[k].split(".")[-2] for k in (i, j))
                    words = f"with the parts of {name} that become {parts} exchanged"
                    edit = partial(_exchange, name, split, i, j)
                    yield Change(words, f"mapping: {step.rule}", edit=edit)


def _exchange(name: str, split: Split, i: int, j: int, state: State) -> State:
    import torch

    parts = list(state[name].split(list(split.sizes), split.axis))
    parts[i], parts[j] = parts[j], parts[i]
    return state | {name: torch.cat(parts, split.axis)}


def _editor(names: Spans, head: int, make: Callable[[int], Op]) -> Callable[[State], State]:
    """Puts these rows through the operation that ``make`` makes for their number of heads."""
    import torch

    def edit(state: State) -> State:
        changed: State = {}
        for name, spans in names.items():
            weight = state[name].double().cpu().numpy().copy()
            for start, stop in spans:
                rows = weight[start:stop].copy()
                moved = make((stop - start) // head).apply([Lazy.of(rows, "float64")])[0]
                weight[start:stop] = moved.reshape(rows.shape).read()
            changed[name] = torch.from_numpy(weight)
        return state | changed

    return edit
