"""A checkpoint's names as patterns: numbers of layers and experts become captures, and what is alike stands once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct

from ..mappings.packaged import read_facts
from ..mappings.tensors import Shape

WEIGHT, BIAS = "weight", "bias"


@lru_cache(maxsize=1)
def words() -> dict[str, Any]:
    """The table of names, with each role's lists joined."""
    table: dict[str, Any] = read_facts(Path(__file__).with_name("words.yaml"))
    for place in ("outside", "inside"):
        table[place] = {role: [word for line in lines for word in line] for role, lines in table[place].items()}
    return table


class Group(Struct, frozen=True):
    """Tensors that differ in their layer and expert alone. ``layers`` are the numbers of the layers that have one,
    empty outside of layers; ``names`` are all of them, in the checkpoint's order."""

    pattern: str
    shape: Shape
    names: tuple[str, ...]
    layers: tuple[int, ...] = ()

    @property
    def parts(self) -> list[str]:
        """The words of the name in lower case, without numbers, without the leaf."""
        found = [part.lower() for part in self.pattern.split(".") if not part.isdigit() and not part.startswith("{")]
        return found[:-1] if len(found) > 1 and leaf_of(found[-1]) else found

    @property
    def kind(self) -> str:
        """``weight`` or ``bias``."""
        return leaf_of(self.pattern.rpartition(".")[2].lower()) or WEIGHT

    @property
    def shown(self) -> str:
        """The pattern and the shape, for people."""
        return f"{self.pattern} {list(self.shape)}"


class Names(Struct, frozen=True):
    """All groups of a checkpoint; ``stem`` is what its layers' names begin with."""

    stem: str
    layers: int
    experts: int
    groups: tuple[Group, ...]


def leaf_of(word: str) -> str:
    """What a last part of a name says: ``weight``, ``bias``, or nothing."""
    leaves: dict[str, list[str]] = words()["leaves"]
    return next((kind for kind, known in leaves.items() if word in known), "")


def grouped(shapes: Mapping[str, Shape]) -> Names:
    """The groups, in the order in which their first tensors stand."""
    stem = _stem(shapes)
    found: dict[tuple[str, Shape], list[tuple[str, int]]] = {}
    experts: set[int] = set()
    for name, shape in shapes.items():
        pattern, layer, expert = _pattern(name, stem)
        found.setdefault((pattern, shape), []).append((name, layer))
        experts |= {expert} - {-1}
    count = 1 + max((layer for members in found.values() for _, layer in members), default=-1)
    groups = [
        Group(pattern, shape, tuple(n for n, _ in members), tuple(sorted({k for _, k in members if k >= 0})))
        for (pattern, shape), members in found.items()
    ]
    return Names(stem, count, len(experts), tuple(groups))


def _stem(names: Iterable[str]) -> str:
    """The text before the number that most tensors have in common."""
    stems: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        first = next((k for k, part in enumerate(parts) if part.isdigit()), 0)
        if first:
            stems[".".join(parts[:first])] += 1
    return stems.most_common(1)[0][0] if stems else ""


def _pattern(name: str, stem: str) -> tuple[str, int, int]:
    """The pattern, the layer and the expert; -1 for none."""
    if not stem or not name.startswith(f"{stem}."):
        return name, -1, -1
    number, *rest = name.removeprefix(f"{stem}.").split(".")
    if not number.isdigit():
        return name, -1, -1
    expert = -1
    for k, part in enumerate(rest[1:], 1):
        if part.isdigit() and rest[k - 1].lower() in words()["around"]["experts"]:
            expert, rest[k] = int(part), "{e}"
            break
    return ".".join([stem, "{i}", *rest]), int(number), expert
