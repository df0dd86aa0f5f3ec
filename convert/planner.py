"""Makes the plan: holds what a mapping says against what is there and what must come out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Map
from itertools import groupby
from operator import attrgetter

from ..archs.base import Inventory
from ..errors import Problem
from ..mappings.expand import Expanded, Rule
from ..mappings.ops import Op, OpError, one_type, trace
from ..mappings.tensors import FLOATING, ITEMSIZE, Shape
from .plan import Plan, Source, Step, by_rank, joined_shape

UNCLAIMED = "is in the checkpoint, but no rule claims it"
_LEFT = (
    "if it is no weight of the model (a counter, a buffer), save without it; if it is one, the model computes more "
    "than this family does: describe it as a family of your own (docs/architectures.md)"
)


def make_plan(
    expanded: Expanded, inventory: Inventory, expected: Map[str, Shape], *, tied: bool, dtype: str | None = None
) -> Plan:
    """Check a mapping against what is there and what must come out; every problem is collected.

    ``tied`` says whether the sources under ``tie`` were found equal to their twins; ``dtype`` casts every
    floating tensor, None keeps what is stored.
    """
    work = _Planner(expanded, inventory, expected, dtype)
    rules = [*expanded.rules, *work.ties(tied)]
    steps = work.run(rules)
    main = dtype or _majority(steps)
    steps += work.fills(main)
    work.leftovers()
    last = len(expected)
    order = {name: k for k, name in enumerate(expected)}
    steps.sort(key=lambda step: order.get(step.targets[0], last) if step.targets else last + 1)
    steps += work.drops()
    return Plan(tuple(steps), tuple(work.problems), main, inventory.ranks)


_Traced = tuple[str, tuple[Shape, ...], str]


class _Planner:
    def __init__(self, expanded: Expanded, inventory: Inventory, expected: Map[str, Shape], dtype: str | None) -> None:
        self.expanded = expanded
        self.inventory = inventory
        self.expected = expected
        self.dtype = dtype
        self.claimed: dict[str, str] = {}
        self.made: dict[str, str] = {}
        self.problems: list[Problem] = list(expanded.problems)
        self._sources: dict[str, Source] = {}
        self._joins = inventory.ranks > 1 or any(join.view for join in expanded.joins.values())
        self._source = self._found if self._joins else self._plain
        self._known: dict[tuple[object, ...], _Traced] = {}

    def run(self, rules: Sequence[Rule]) -> list[Step]:
        """The steps of all rules, of which those of one line of the mapping follow one another."""
        if self._take_all(rules):
            return [step for _, alike in groupby(rules, attrgetter("kind", "ops")) for step in self._alike(alike)]
        steps: list[Step] = []
        for rule in rules:
            there = self._claim(rule.sources, rule.where, rule.reason)
            self._make(rule.targets, rule.where)
            if there and (step := self._step(rule)):
                steps.append(step)
        return steps

    def _take_all(self, rules: Sequence[Rule]) -> bool:
        """Note what all rules take and make at once, where there is nothing to say about any of it."""
        takes = {name: rule.where for rule in rules for name in rule.sources}
        makes = {name: rule.where for rule in rules for name in rule.targets}
        if (
            self.claimed
            or len(takes) < sum([len(rule.sources) for rule in rules])
            or len(makes) < sum([len(rule.targets) for rule in rules])
            or not takes.keys() <= self.inventory.tensors.keys()
        ):
            return False
        self.claimed, self.made = takes, makes
        return True

    def _alike(self, alike: Iterable[Rule]) -> Iterator[Step]:
        """The steps of rules that share their kind and operations. Layers are alike: what becomes of one tensor that is
        stored as it is meant is worked out once for each shape and type."""
        tensors, expected, plain = self.inventory.tensors, self.expected, not self._joins
        known: dict[tuple[Shape, str], Step] = {}
        for rule in alike:
            infos = tensors[rule.sources[0]] if plain and len(rule.sources) == 1 and rule.targets else ()
            key = (infos[0].shape, infos[0].dtype) if len(infos) == 1 else None
            like = known.get(key) if key else None
            if like and tuple(map(expected.get, rule.targets)) == like.shapes:
                sources = (Source(rule.sources[0], infos, like.sources[0].shape, None),)
                yield Step(
                    rule.kind, rule.targets, like.shapes, like.dtype, sources, rule.ops, like.source_dtype, rule.where
                )
            elif step := self._step(rule):
                yield step
                if key:
                    known[key] = step

    def ties(self, tied: bool) -> list[Rule]:
        """Ties that hold claim their source; those that do not become a rename, or a problem."""
        rules: list[Rule] = []
        for tie in self.expanded.ties:
            if tie.source not in self.inventory:
                continue
            if tied:
                rules.append(Rule("tie", (tie.source,), (), (), tie.where, f"equal to {tie.twin}"))
            elif tie.otherwise:
                rules.append(Rule("rename", (tie.source,), (tie.otherwise,), (), tie.where))
            else:
                self._claim((tie.source,), tie.where)
                self._problem(f"{tie.source} differs from {tie.twin}, which it should equal bit for bit", tie.where)
        return rules

    def fills(self, dtype: str) -> list[Step]:
        steps: list[Step] = []
        for name, where in self.expanded.fills.items():
            if name not in self.expected:
                self._problem(f"fill makes {name}, which the target class does not have", where)
                continue
            self._make((name,), where)
            steps.append(Step("fill", (name,), (self.expected[name],), dtype, rule=where, reason="zeros"))
        return steps

    def drops(self) -> list[Step]:
        steps: list[Step] = []
        for name, (reason, where) in self.expanded.drops.items():
            if name in self.inventory:
                steps.append(Step("drop", (), (), "uint8", (self._plain(name),), rule=where, reason=reason))
        return steps

    def leftovers(self) -> None:
        """Whatever the rules did not speak of, on either side."""
        for name, (_, where) in self.expanded.drops.items():
            if name in self.inventory:
                self._claim((name,), where)
        tensors, expected = self.inventory.tensors, self.expected
        left = [] if self.claimed.keys() >= tensors.keys() else [name for name in tensors if name not in self.claimed]
        for name in left:
            shape = list(tensors[name][0].shape)
            do = _LEFT if name == left[-1] else ""
            self._problem(f"{name} {shape} {UNCLAIMED}", self.inventory.path, do)
        for name, shape in {} if self.made.keys() >= expected.keys() else expected.items():
            if name not in self.made:
                self._problem(f"nothing makes {name} {list(shape)}, which the target class needs", self.inventory.path)

    def _claim(self, names: Iterable[str], where: str, because: str = "") -> bool:
        """Note that a rule takes these tensors; whether all of them are there."""
        tensors, claimed, there = self.inventory.tensors, self.claimed, True
        for name in names:
            if name not in tensors:
                self._problem(f"{name} is missing", self.inventory.path, because or f"the mapping needs it ({where})")
                there = False
            elif name in claimed:
                self._problem(f"{name} is claimed twice", f"{claimed[name]} and {where}")
            claimed[name] = where
        return there

    def _make(self, names: Iterable[str], where: str) -> None:
        for name in names:
            if name in self.made:
                self._problem(f"{name} is made twice", f"{self.made[name]} and {where}")
            self.made[name] = where

    def _step(self, rule: Rule) -> Step | None:
        sources = tuple([self._source(name) for name in rule.sources])
        try:
            stored, shapes, dtype = self._traced(rule, sources)
        except OpError as error:
            self._problem(f"{', '.join(rule.sources)}: {error}", rule.where)
            return None
        if rule.kind == "tie":
            return Step("tie", (), (), stored, sources, source_dtype=stored, rule=rule.where, reason=rule.reason)
        if not self._fits(rule, shapes, dtype):
            return None
        return Step(rule.kind, rule.targets, shapes, self.dtype or dtype, sources, rule.ops, stored, rule.where)

    def _traced(self, rule: Rule, sources: tuple[Source, ...]) -> _Traced:
        """The type that goes in, shapes and type that come out. Layers are alike: what one rule makes of a shape is
        worked out once."""
        # the rules, which hold the operations, outlive this planner
        key = id(rule.ops), *[(source.shape, *[info.dtype for info in source.infos]) for source in sources]
        known = self._known.get(key)
        if known is None:
            stored = _stored(rule.ops, sources)
            traced = trace(rule.ops, [source.shape for source in sources], stored)
            known = self._known[key] = stored, tuple(traced.shapes[-1]), traced.dtype
        return known

    def _fits(self, rule: Rule, shapes: tuple[Shape, ...], dtype: str) -> bool:
        if len(shapes) != len(rule.targets):
            do = "split makes several of one, concat and stack one of several"
            self._problem(f"{len(shapes)} tensors come out for {len(rule.targets)} targets", rule.where, do)
            return False
        fine = True
        for name, shape in zip(rule.targets, shapes, strict=True):
            want = self.expected.get(name)
            if want == shape and dtype in FLOATING:
                continue
            if want is None:
                self._problem(f"makes {name}, which the target class does not have", rule.where)
            elif want != shape:
                do = _mend(shape, want)
                self._problem(f"{name} would be {list(shape)}, the target class has {list(want)}", rule.where, do)
            else:
                self._problem(f"{name} would be {dtype}: a weight must be a floating type", rule.where)
            fine = False
        return fine

    def _found(self, name: str) -> Source:
        if self.inventory.ranks == 1 and not self._is_viewed(name):
            return self._plain(name)
        if name not in self._sources:
            self._sources[name] = self._joined(name)
        return self._sources[name]

    def _is_viewed(self, name: str) -> bool:
        """Whether the tensor has another shape than the one it is stored in, with a single rank as well."""
        join = self.expanded.joins.get(name)
        return join is not None and bool(join.view)

    def _plain(self, name: str) -> Source:
        infos = self.inventory.tensors[name]
        return Source(name, infos, infos[0].shape, None)

    def _joined(self, name: str) -> Source:
        infos = self.inventory.tensors[name]
        join = self.expanded.joins.get(name)
        if join is None:
            self._problem(f"{name} is in {len(infos)} rank files, but no shards rule joins it", self.inventory.path)
            return self._plain(name)
        held = [infos_of_rank[0].shape for infos_of_rank in by_rank(infos)]
        if len(held) != (1 if join.how == "disjoint" else self.inventory.ranks):
            what = f"{name} is in {len(held)} of {self.inventory.ranks} rank files, which '{join.how}' does not allow"
            self._problem(what, join.where)
            return self._plain(name)
        try:
            return Source(name, infos, joined_shape(join, held), join)
        except OpError as error:
            self._problem(f"{name}: {error}", join.where)
            return self._plain(name)

    def _problem(self, what: str, where: str, do: str = "") -> None:
        self.problems.append(Problem(what, where, do))


def _stored(ops: tuple[Op, ...], sources: tuple[Source, ...]) -> str:
    """The type that goes into a rule's first operation. Raises OpError where the types of its sources don't fit it."""
    dtypes = tuple([info.dtype for source in sources for info in source.infos])
    if not ops or len(set(dtypes)) == 1:
        return one_type(dtypes)
    return ops[0].taken(tuple([one_type(tuple([info.dtype for info in s.infos])) for s in sources]))


def _majority(steps: Iterable[Step]) -> str:
    """The type of most bytes of the matrices written: what config.json calls the model's dtype."""
    count: Counter[str] = Counter()
    for (dtype, shapes), times in Counter(map(attrgetter("dtype", "shapes"), steps)).items():
        for shape in shapes:
            count[dtype] += times * (math.prod(shape) * ITEMSIZE[dtype] if len(shape) > 1 else 1)
    return count.most_common(1)[0][0] if count else "float32"


def _mend(shape: Shape, want: Shape) -> str:
    """What to look at when a tensor has not the shape that its class has."""
    if shape != want and shape == want[::-1]:
        return "add or take away transpose"
    if math.prod(shape) == math.prod(want):
        return "the same number of values: reshape, or another order of operations"
    return "the class's shape follows from config.json: look at the sizes in hf_config, and at this rule's operations"
