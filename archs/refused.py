"""What is recognised and refused: families and forms of weights that can't be served, each with the nearest way out.

The facts are in refused.yaml; here is what reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from ..errors import Kind, MdlError, Problem
from ..mappings.packaged import read_facts
from .base import Inventory, lookup

_NO_DIGITS = str.maketrans("", "", "0123456789")

FILE = Path(__file__).with_name("refused.yaml")


class Evidence(Struct, frozen=True):
    """Names of tensors and paths beside the weights which together tell; or files of a folder without weights.

    ``siblings`` maps the last word of a tensor's name to the types of which it must be beside each of ``tensors``.
    """

    tensors: tuple[str, ...] = ()
    every: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    siblings: Mapping[str, Iterable[str]] = field(default_factory=dict[str, Iterable[str]])


class Refused(Struct, frozen=True):
    """One kind of checkpoint; any of its ``evidence`` is enough."""

    name: str
    title: str
    source: str
    evidence: tuple[Evidence, ...]
    reason: str
    do: str


@cache
def all_refused() -> tuple[Refused, ...]:
    """Everything that refused.yaml lists, in its order."""
    return tuple(_parsed(name, entry) for name, entry in read_facts(FILE)["refused"].items())


def _parsed(name: str, entry: Mapping[str, Any]) -> Refused:
    """An entry. Raises TypeError for a key that is unknown or missing: the file is ours."""
    words = {**entry}
    evidence = tuple(
        Evidence(siblings=each.pop("siblings", {}), **{key: tuple(names) for key, names in each.items()})
        for each in ({**one} for one in words.pop("evidence"))
    )
    return Refused(name=name, evidence=evidence, **words)


def refuse(inventory: Inventory) -> None:
    """Raise MdlError (INPUT) with every kind of what can't be served that this checkpoint is, by what, and why."""
    if problems := [_problem(kind, found, inventory.path) for kind, found in recognised(inventory)]:
        raise MdlError(Kind.INPUT, problems)


def refuse_folder(names: Iterable[str], path: str) -> None:
    """The same for a folder that holds these files and folders, but no weights that could be opened."""
    there = set(names)
    for kind in all_refused():
        for files in (evidence.files for evidence in kind.evidence if evidence.files):
            if there.issuperset(files):
                raise MdlError(Kind.INPUT, [_problem(kind, files, path)])


def _problem(kind: Refused, found: Iterable[str], path: str) -> Problem:
    return Problem(f"this is {kind.title} ({kind.source}), by {', '.join(found)}: {kind.reason}", path, kind.do)


def recognised(inventory: Inventory) -> Iterator[tuple[Refused, list[str]]]:
    """The kinds that this checkpoint is, each with the first names that told."""
    lines = set("\n".join(inventory.tensors).translate(_NO_DIGITS).split("\n"))
    parts = {part for line in lines for part in line.split(".")}
    for kind in all_refused():
        found = next(filter(None, (_found(evidence, inventory, parts) for evidence in kind.evidence)), None)
        if found:
            yield kind, found


def _found(evidence: Evidence, inventory: Inventory, parts: set[str]) -> list[str]:
    """One name for each thing of the evidence, or nothing if one of them is missing."""
    if any(_first(pattern, inventory, parts) for pattern in evidence.without):
        return []
    found = [_first(pattern, inventory, parts, evidence.siblings) for pattern in evidence.tensors]
    found += [_shared(pattern, inventory.tensors) for pattern in evidence.every]
    found += [path if lookup(inventory.extras, path) else "" for path in evidence.beside]
    return found if all(found) else []


def _first(
    pattern: str, inventory: Inventory, parts: set[str], siblings: Mapping[str, Iterable[str]] | None = None
) -> str:
    """The first name that a pattern stands for. Names are gone through only where all of its words occur in some, but
    for their digits."""
    words = pattern.translate(_NO_DIGITS).split(".")
    if not parts.issuperset([word for word in words if word not in ("*", "**")]):
        return ""
    expression = _expression(pattern)
    names = (name for name in inventory.tensors if expression.fullmatch(f"{name}."))
    return next((name for name in names if _beside(name, inventory, siblings or {})), "")


def _beside(name: str, inventory: Inventory, siblings: Mapping[str, Iterable[str]]) -> bool:
    """Whether the module of a tensor has all of these, each of one of its types."""
    module = name.rpartition(".")[0]
    held = {word: inventory.tensors.get(f"{module}.{word}" if module else word) for word in siblings}
    return all(infos and infos[0].dtype in siblings[word] for word, infos in held.items())


def _shared(pattern: str, names: Iterable[str]) -> str:
    """The last name, if a pattern stands for all of them."""
    expression, last = _expression(pattern), ""
    for last in names:
        if not expression.fullmatch(f"{last}."):
            return ""
    return last


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    known = {"*": r"[^.]+\.", "**": r"(?:[^.]+\.)*"}
    return re.compile("".join(known.get(word) or re.escape(f"{word}.") for word in pattern.split(".")))
