"""Which settings of Hugging Face's configs change what a model computes, and what their values say that change nothing.

The facts are in settings.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from ..mappings.packaged import read_facts

ROPE_TABLES = ("rope_scaling", "rope_parameters")
"""Where Hugging Face keeps what is said of rotary positions: the first until transformers 5, the second since."""


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """settings.yaml as it stands."""
    return read_facts(Path(__file__).with_name("settings.yaml"))


def changes(path: str, value: Any, is_model: Any) -> bool:
    """Whether a setting, by its dotted path, is one that changes what is computed, and has a value that does."""
    words = path.split(".")
    known: Mapping[str, Any] = facts()["settings"]
    at = next((i for i, word in enumerate(words) if word in known and is_model(".".join(words[:i]))), None)
    if at is None:
        return False
    neutral = known[words[at]]
    if isinstance(neutral, dict):  # a table: those of its keys count that say something by themselves
        if len(words) == at + 1:
            return bool(value)
        neutral = cast("dict[str, Any]", neutral).get(words[-1])
    return neutral is not None and any(not _is_neutral(one, neutral) for one in _each(value))


def in_force(leaves: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings but for those that another one beside them puts out of force."""
    for path, value in leaves.items():
        table, dot, last = path.rpartition(".")
        unless = facts()["unless"].get(last, {})
        if not any(leaves.get(f"{table}{dot}{key}") == said for key, said in unless.items()):
            yield path, value


def _each(value: Any) -> Iterable[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _is_neutral(value: Any, neutral: Iterable[Any]) -> bool:
    """None says nothing; true is no 1, but 1.0 is."""
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
