"""Documents that every JSON parser takes: the one place where our values become text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast


def to_json(document: Any) -> str:
    """One JSON document with a newline at its end. Non-finite numbers, which JSON lacks, are the texts inf and nan."""
    value = plain(document)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name need not be text; only an escaped one comes back as it was
        text = json.dumps(value, indent=1, allow_nan=False)
    return text + "\n"


def plain(value: Any) -> Any:
    """JSON values: dataclasses and mappings as objects, sequences as arrays, what JSON lacks as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in cast("Iterable[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def strict_loads(text: str) -> Any:
    """The document in a text. Raises ValueError also for what only some parsers take: NaN, Infinity, a key twice."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(sorted(made))[:200]}")
    return made


def numbers_back(value: Any) -> Any:
    """What :func:`plain` made text of because JSON lacks it, as floats again."""
    if isinstance(value, dict):
        return {k: numbers_back(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [numbers_back(v) for v in cast("list[Any]", value)]
    return float(value) if value in ("inf", "-inf", "nan") else value
