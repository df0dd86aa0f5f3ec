"""What the arch file settles, and from where: a shape, a key beside the weights, or a question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from .choose import facts
from .names import words


class Setting(Struct, frozen=True):
    """One ``m.set`` of the draft. ``shape`` is Python for the value, ``because`` its reason; ``files`` are dotted paths
    into what lies beside the weights; a ``question`` is asked where neither says it. ``values`` are usual ones, all
    that there are if ``closed``."""

    name: str
    kind: str = "int"
    shape: str = ""
    because: str = ""
    files: tuple[str, ...] = ()
    question: str = ""
    values: tuple[Any, ...] = ()
    closed: bool = False

    def line(self) -> str:
        """The Python statement, with a TODO that lists the alternatives where the value is not known yet."""
        said = [quoted(self.name)] + ([f"kind={self.kind}"] if self.kind != "int" else [])
        said += [f"shape=({self.shape}, {quoted(self.because)})"] if self.shape else []
        said += [f"file={listed(self.files)}"] if self.files else []
        said += [f"ask={quoted(self.question)}"] if self.question else []
        said += [f"choices={listed(self.values)}"] if self.closed else []
        text = f"m.set({', '.join(said)})"
        return f"{text}  # TODO: {self.name}: {self.alternatives()}" if self.open else text

    @property
    def open(self) -> bool:
        """Whether somebody has to say it."""
        return bool(self.question) and not self.files and not self.shape

    def alternatives(self) -> str:
        """What it may be, in words."""
        if self.kind == "boolean":
            return "true or false"
        if not self.values:
            return "a number"
        return " or ".join(map(str, self.values)) + (" or another number" if self.kind == "float" else "")


def quoted(text: str) -> str:
    """A text in Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def listed(texts: Sequence[str]) -> str:
    """A tuple of texts in Python."""
    return f"({', '.join(map(quoted, texts))}{',' if len(texts) == 1 else ''})"


def asked(name: str, extras: Mapping[str, Any], *, as_name: str = "") -> Setting:
    """A setting of targets.yaml, with the keys beside the weights that say it."""
    fact: dict[str, Any] = facts()["settings"][name]
    final = as_name or name
    files = tuple(found_in(final, extras))
    values, closed = tuple(fact.get("set", ())), bool(fact.get("closed"))
    return Setting(final, fact["kind"], files=files, question=fact["ask"], values=values, closed=closed)


def found_in(name: str, extras: Mapping[str, Any]) -> Iterator[str]:
    """Dotted paths to numbers beside the weights whose key is one of those that people use for this value."""
    known: list[str] = words()["files"].get(name, [])
    for path, value in _numbers(extras, ()):
        if path[-1].lower() in known and not isinstance(value, bool):
            yield ".".join(path)


def _numbers(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int | float]]:
    if isinstance(node, Mapping) and len(path) < 4:
        for key, value in node.items():
            if isinstance(key, str) and "." not in key:
                yield from _numbers(value, (*path, key))
    elif isinstance(node, int | float) and path:
        yield path, node
