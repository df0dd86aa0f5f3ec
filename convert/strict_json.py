"""Reads JSON that a stranger wrote: what json.loads lets pass and nobody can have meant is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Tables and lists inside one another that any settings may have."""


def read_json(path: Path, *, limit: int, infinite: bool = False) -> Any:
    """The content of a JSON file of at most ``limit`` bytes.

    Raises ValueError, in words that fit into a sentence, for what is not JSON, for a key that occurs twice in one
    table, for NaN and for numbers too large to be finite. ``infinite`` lets Infinity pass by that name.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
    return parse_json(path.read_bytes().decode("utf-8"), infinite=infinite)


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """The content of a JSON text, as strictly as :func:`read_json`."""
    try:
        content = json.loads(text, object_pairs_hook=_table)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(content, infinite=infinite)
    return content


def _check(content: Any, *, infinite: bool) -> None:
    """Refuse numbers that are none, and what is nested so deeply that simple means can't walk through or write it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while waiting:
        path, node = waiting.pop()
        if len(path) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(node, dict):
            waiting.extend(((*path, key), value) for key, value in node.items() if not isinstance(value, str))
        elif isinstance(node, list):
            waiting.extend(((*path, str(n)), value) for n, value in enumerate(node) if not isinstance(value, str))
        elif isinstance(node, float) and not math.isfinite(node) and not (infinite and math.isinf(node)):
            raise ValueError(f"{'.'.join(path) or 'it'} is {node}: not a number, or one too large")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        doubled = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
        raise ValueError(f"the key {', '.join(doubled[:5])} occurs twice")
    return made
