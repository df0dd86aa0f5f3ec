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

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise ValueError(f"{name} is no JSON number")

    try:
        content = json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=_table)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


def _check_depth(content: Any) -> None:
    """What is nested more deeply could be read, but neither walked through nor written by simple means."""
    level = [content]
    for _ in range(MAX_DEPTH):
        tables = [list(node.values()) if isinstance(node, dict) else node for node in level]
        level = [node for nodes in tables if isinstance(nodes, list) for node in nodes]
    if level:
        raise ValueError("it is nested too deeply")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        doubled = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
        raise ValueError(f"the key {', '.join(doubled[:5])} occurs twice")
    return made
