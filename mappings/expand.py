"""From patterns to finite lists: a mapping bound to one checkpoint's sizes.

A pattern is its list of names: ``layers.{i}.wq.weight`` with ``i`` running over 0 … layers - 1, ``{layers+3}`` a
constant, ``{each}`` written out, ``{blocks}`` a word of the family's. There is no search, so the order of rules does
not matter and overlaps show.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Map

from msgspec import Struct

from ..errors import Problem
from . import expr
from .ops import Op
from .parse import Loc, Mapping
from .rules import Section, Tie, Transform
from .tensors import Target

_FIELD = re.compile(r"\{([^{}]*)\}")
EACH = "each"
TARGET = "{target}"
"""As a whole pattern under ``keep``: every tensor of the target class that is not tied to another."""
_ITS_OWN = (
    "the class that config.json names has it: is that the config.json of this very model, and the checkpoint whole?"
)
TIED, TWIN = "{tied}", "{twin}"
"""As whole patterns under ``tie``: every tensor that the target class ties, and what it is tied to."""


class Rule(Struct, frozen=True):
    """One instance of a rule: these sources, through these operations, become these targets. ``reason`` is what a tie
    holds for, and what else than the rule needs the sources."""

    kind: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]
    where: str
    reason: str = ""


class Join(Struct, frozen=True):
    """How rank files of one tensor come together; ``sizes`` are the full block sizes for ``blocks``, ``view`` the shape
    in which they are cut, where it is not the one they are stored in."""

    how: str
    where: str
    axis: int = 0
    sizes: tuple[int, ...] = ()
    view: tuple[int, ...] = ()


class Ties(Struct, frozen=True):
    """A source that should equal another: claimed by it when equal, ``otherwise`` its own target (or a problem)."""

    source: str
    twin: str
    otherwise: str
    where: str


class Expanded(Struct, frozen=True):
    """Everything a mapping says about one checkpoint, as finite lists."""

    rules: tuple[Rule, ...]
    fills: Map[str, str]
    ties: tuple[Ties, ...]
    drops: Map[str, tuple[str, str]]
    joins: Map[str, Join]
    problems: tuple[Problem, ...]


def names_target(mapping: Mapping) -> bool:
    """Whether the mapping speaks of the target class's own names (:data:`TARGET`), so that they are needed first."""
    sections = (mapping.file.section, *mapping.file.when.values())
    return any(TARGET in section.keep or TIED in section.tie for section in sections)


def expand(
    mapping: Mapping,
    sizes: Map[str, int],
    flags: Map[str, bool],
    target: Target | None = None,
    words: Map[str, str] | None = None,
) -> Expanded:
    """Bind a mapping to sizes and flags. Problems (unknown names, unbalanced captures …) are collected, not raised.

    ``target`` is needed by a mapping of which :func:`names_target` is true. ``words`` are parts of names that the user
    of the source code chose: a field that is one of them stands for it.
    """
    work = _Expander(mapping, sizes, target or Target({}), words or {})
    work.section(mapping.file.section, ())
    for condition, section in mapping.file.when.items():
        if work.holds(condition, flags):
            work.section(section, ("when", condition))
    return Expanded(
        tuple(work.rules), work.fills, tuple(work.ties), work.drops, work.joins, tuple(dict.fromkeys(work.problems))
    )


class _Expander:
    def __init__(self, mapping: Mapping, sizes: Map[str, int], target: Target, words: Map[str, str]) -> None:
        self.mapping = mapping
        self.words = words
        self.target = target
        self.sizes = sizes
        self.rules: list[Rule] = []
        self.fills: dict[str, str] = {}
        self.ties: list[Ties] = []
        self.drops: dict[str, tuple[str, str]] = {}
        self.joins: dict[str, Join] = {}
        self.problems: list[Problem] = []
        self._places: dict[Loc, str] = {}
        self._numbers: list[str] = []
        self.ranges: dict[str, int] = {}
        for name, size in mapping.file.ranges.items():
            self.ranges[name] = self._size(size, ("ranges", name))

    def holds(self, condition: str, flags: Map[str, bool]) -> bool:
        parts = [part.split() for part in f" {condition} ".split(" and ")]
        if any(part[-1:] == [] or part[-1] not in flags or part[:-1] not in ([], ["not"]) for part in parts):
            known = ", ".join(sorted(flags)) or "none"
            do = f"known flags: {known} (or 'not FLAG', or several joined by 'and')"
            self._problem(("when", condition), f"unknown condition {condition!r}; {do}")
            return False
        return all(flags[part[-1]] is (len(part) == 1) for part in parts)

    def section(self, section: Section, loc: Loc) -> None:
        for k, pattern in enumerate(section.keep):
            if pattern == TARGET:
                where = self._where((*loc, "keep", k))
                self.rules += [Rule("keep", (name,), (name,), (), where, _ITS_OWN) for name in self.target.shapes]
            else:
                self._plain("keep", pattern, pattern, (*loc, "keep", k))
        for source, target in section.rename.items():
            self._plain("rename", source, target, (*loc, "rename", source))
        for k, transform in enumerate(section.transform):
            self._transform(transform, (*loc, "transform", k))
        for k, pattern in enumerate(section.zeros):
            self._fill(pattern, (*loc, "fill", "zeros", k))
        for source, tie in section.tie.items():
            at = (*loc, "tie", source)
            for name, twin in self.target.ties.items() if (source, tie) == (TIED, TWIN) else [(source, tie)]:
                self._tie(name, twin, at)
        for pattern, reason in section.drop.items():
            self._drop(pattern, reason, (*loc, "drop", pattern))
        self._shards(section, (*loc, "shards"))

    def _plain(self, kind: str, source: str, target: str, loc: Loc) -> None:
        captures = self._captures([source], loc)
        if captures != self._captures([target], loc):
            self._problem(loc, f"{source} and {target} have not the same captures")
            return
        sources = self._run(source, captures, loc)
        targets = sources if source == target else self._run(target, captures, loc)
        where = self._where(loc)
        self.rules += [Rule(kind, (a,), (b,), (), where) for a, b in zip(sources, targets, strict=True)]

    def _transform(self, rule: Transform, loc: Loc) -> None:
        for each in rule.each or ("",):
            sources = [p.replace("{each}", each) for p in _listed(rule.from_)]
            targets = [p.replace("{each}", each) for p in _listed(rule.to if rule.to is not None else rule.from_)]
            self._transform_one(rule, sources, targets, loc)

    def _transform_one(self, rule: Transform, sources: list[str], targets: list[str], loc: Loc) -> None:
        eaten = {op.over for op in rule.ops if op.op == "stack"}
        made = {op.over for op in rule.ops if op.op == "unstack"}
        unknown = (eaten | made) - self.ranges.keys()
        if unknown:
            self._problem(loc, f"'over' names {', '.join(sorted(unknown))}, which is not in ranges")
            return
        before, after = self._captures(sources, loc), self._captures(targets, loc)
        if before - eaten != after - made or not eaten <= before or not made <= after:
            self._problem(loc, f"captures do not balance: {sorted(before)} in from, {sorted(after)} in to")
            return
        try:
            ops = tuple(op.bind(self.sizes, self.ranges) for op in rule.ops)
        except expr.ExprError as error:
            self._problem(loc, str(error))
            return
        where = self._where(loc)
        for one, other in zip(
            self._all(sources, before - eaten, eaten, loc), self._all(targets, after - made, made, loc), strict=True
        ):
            self.rules.append(Rule("transform", one, other, ops, where))

    def _tie(self, source: str, tie: str | Tie, loc: Loc) -> None:
        to, otherwise = (tie, "") if isinstance(tie, str) else (tie.to, tie.otherwise)
        captures = self._captures([source], loc)
        # Many sources may equal one twin, but each needs a target of its own where it does not.
        if not self._captures([to], loc) <= captures or (otherwise and self._captures([otherwise], loc) != captures):
            self._problem(loc, f"{source}, {to} and {otherwise or 'no target'} have not the same captures")
            return
        for values in self._assignments(captures):
            names = (self._fill_in(pattern, values, loc) for pattern in (source, to, otherwise))
            self.ties.append(Ties(*names, where=self._where(loc)))

    def _fill(self, pattern: str, loc: Loc) -> None:
        where = self._where(loc)
        for name in self._names(pattern, loc):
            if name in self.fills:
                self.problems.append(Problem(f"{name} is made twice", f"{self.fills[name]} and {where}"))
            self.fills[name] = where

    def _drop(self, pattern: str, reason: str, loc: Loc) -> None:
        where = self._where(loc)
        for name in self._names(pattern, loc):
            if name in self.drops:
                self.problems.append(Problem(f"{name} is claimed twice", f"{self.drops[name][1]} and {where}"))
            self.drops[name] = (reason, where)

    def _shards(self, section: Section, loc: Loc) -> None:
        for how in ("cat0", "cat1", "equal", "sum", "mean", "disjoint"):
            for k, pattern in enumerate(section.shards.get(how, ())):
                at = (*loc, how, k)
                axis = 1 if how == "cat1" else 0
                self._join(self._names(pattern, at), Join(how[:3] if how[:3] == "cat" else how, self._where(at), axis))
        for k, blocks in enumerate(section.blocks):
            at = (*loc, "blocks", k)
            sizes, view = (tuple(self._size(n, at) for n in given) for given in (blocks.sizes, blocks.view))
            for pattern in blocks.names:
                self._join(self._names(pattern, at), Join("blocks", self._where(at), blocks.axis, sizes, view))

    def _join(self, names: Iterable[str], join: Join) -> None:
        for name in names:
            if name in self.joins:
                self.problems.append(Problem(f"{name}: two shards rules", f"{self.joins[name].where} and {join.where}"))
            self.joins[name] = join

    def _captures(self, patterns: Iterable[str], loc: Loc) -> set[str]:
        found: set[str] = set()
        for pattern in map(self._worded, patterns):
            if any(brace in _FIELD.sub("", pattern) for brace in "{}"):
                self._problem(loc, f"{pattern}: a brace has no partner")
            for field in _FIELD.findall(pattern):
                try:
                    found |= expr.names(field)
                except expr.ExprError as error:
                    self._problem(loc, f"{pattern}: {error}")
        return found & self.ranges.keys()

    def _assignments(self, captures: Iterable[str]) -> Iterator[dict[str, int]]:
        ordered = sorted(captures)
        for values in itertools.product(*(range(self.ranges[c]) for c in ordered)):
            yield dict(zip(ordered, values, strict=True))

    def _all(self, patterns: list[str], captures: set[str], over: set[str], loc: Loc) -> Iterable[tuple[str, ...]]:
        """For each assignment the names of every pattern in turn; a pattern with a consumed capture stands for its
        whole run."""
        if not over:
            return zip(*(self._run(pattern, captures, loc) for pattern in patterns), strict=True)
        return [self._with_runs(patterns, values, over, loc) for values in self._assignments(captures)]

    def _with_runs(self, patterns: list[str], values: dict[str, int], over: set[str], loc: Loc) -> tuple[str, ...]:
        names: list[str] = []
        for pattern in patterns:
            runs = self._captures([pattern], loc) & over
            names += [self._fill_in(pattern, {**values, **run}, loc) for run in self._assignments(runs)]
        return tuple(names)

    def _names(self, pattern: str, loc: Loc) -> list[str]:
        return self._run(pattern, self._captures([pattern], loc), loc)

    def _run(self, pattern: str, captures: set[str], loc: Loc) -> list[str]:
        """One name per assignment. A run over the layers is most of a mapping, and is written out at once."""
        pattern = self._worded(pattern)
        fields = _FIELD.findall(pattern)
        if len(captures) == 1 and captures == set(fields):
            parts = _FIELD.split(pattern)[::2]
            return [k.join(parts) for k in self._counted(self.ranges[fields[0]])]
        return [self._fill_in(pattern, values, loc) for values in self._assignments(captures)]

    def _counted(self, count: int) -> list[str]:
        """0, 1, 2 … as texts."""
        self._numbers += map(str, range(len(self._numbers), count))
        return self._numbers[:count]

    def _fill_in(self, pattern: str, values: Map[str, int], loc: Loc) -> str:
        known, pattern = {**self.sizes, **values}, self._worded(pattern)
        try:
            return _FIELD.sub(lambda m: str(expr.evaluate(m[1], known)), pattern)
        except expr.ExprError as error:
            self._problem(loc, f"{pattern}: {error}")
            return pattern

    def _worded(self, pattern: str) -> str:
        return _FIELD.sub(lambda m: self.words.get(m[1], m[0]), pattern) if self.words else pattern

    def _size(self, size: int | str, loc: Loc) -> int:
        try:
            return expr.evaluate(size, self.sizes)
        except expr.ExprError as error:
            self._problem(loc, str(error))
            return 0

    def _problem(self, loc: Loc, what: str) -> None:
        self.problems.append(Problem(what, self._where(loc)))

    def _where(self, loc: Loc) -> str:
        if loc not in self._places:
            self._places[loc] = self.mapping.where(loc)
        return self._places[loc]


def _listed(names: str | tuple[str, ...]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
