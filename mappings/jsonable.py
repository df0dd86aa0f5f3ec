"""Documents that every JSON parser takes: the one place where our values become text."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

LONG = 1000
"""A list of the document's own with more elements than this has one element per line: indenting a million lines that
nobody reads by eye takes longer than making a plan."""


class Each:
    """A list whose elements are made while the document is written, so that they never exist all at once. What ``make``
    gives holds no number that JSON lacks."""

    def __init__(self, make: Callable[[Any], Any], items: Iterable[Any]) -> None:
        self._make = make
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return map(self._make, self._items)


def to_json(document: Any) -> str:
    """One JSON document with a newline at its end. Non-finite numbers, which JSON lacks, are the texts inf and nan."""
    return "".join(pieces(document))


def pieces(document: Any) -> Iterator[str]:
    """The same text bit by bit."""
    if isinstance(document, Struct):
        document = asdict(document)
    if not isinstance(document, Mapping) or not document:
        yield _text(document) + "\n"
        return
    opening = "{"
    for key, value in {str(k): v for k, v in cast("Mapping[Any, Any]", document).items()}.items():
        yield f"{opening}\n {_text(key)}: "
        if isinstance(value, list | tuple | Each) and len(cast("Any", value)) > LONG:
            yield from _lines(cast("Iterable[Any]", value))
        else:
            yield _text(value).replace("\n", "\n ")
        opening = ","
    yield "\n}\n"


def plain(value: Any) -> Any:
    """JSON values: records and mappings as objects, sequences as arrays, what JSON lacks as text."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, Struct):
        return {name: plain(v) for name, v in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple | set | frozenset | Each):
        return [plain(v) for v in cast("Iterable[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else str(value)


def _text(value: Any) -> str:
    value = plain(value)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return text if _encodable(text) else json.dumps(value, indent=1, allow_nan=False)


def _lines(values: Iterable[Any]) -> Iterator[str]:
    opening, lines = "[\n  ", map(_quick_line if isinstance(values, Each) else _line, values)
    while some := list(itertools.islice(lines, LONG)):
        yield opening + ",\n  ".join(some)
        opening = ",\n  "
    yield "\n ]"


def _line(value: Any) -> str:
    try:
        text = _ONE.encode(value)
    except (TypeError, ValueError):  # something in it is no JSON as it stands
        value = plain(value)
        text = _ONE.encode(value)
    return text if _encodable(text) else json.dumps(value, allow_nan=False)


_ONE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=plain, separators=(",", ":"))
_QUICK = msgspec.json.Encoder()


def _quick_line(value: Any) -> str:
    """The same in a fifth of the time, for values without numbers that JSON lacks: of those this encoder makes null."""
    try:
        return _QUICK.encode(value).decode()
    except (TypeError, ValueError):
        return _line(value)


def _encodable(text: str) -> bool:
    """A file's name need not be text; only an escaped one comes back as it was."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
