"""What may be written of what was seen: broken values are refused, strange ones are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from ..errors import Kind, MdlError, Problem
from .shards import Entry
from .values_seen import Values, describe

_WIDER = {"float16": "bfloat16", "float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16", "bfloat16": "float32"}
"""What to write instead, where values lie outside a type's range."""


class Allow(Struct, frozen=True):
    """What the user lets pass: values that are not finite, and values that rounding makes 0."""

    nonfinite: bool = False
    flush: bool = False


STRICT = Allow()


def judge(seen: Iterable[tuple[Entry, Values]], allow: Allow) -> dict[str, Any]:
    """What the manifest says of the values: tables ``nonfinite``, ``flushed`` and ``suspicious`` by tensor name.

    Raises MdlError (INPUT) with every tensor at once that holds NaN or Inf, overflows, or is flushed to 0, unless
    that is allowed. Overflow never is: the file would hold infinities that the checkpoint doesn't.
    """
    problems: list[Problem] = []
    told: dict[str, dict[str, Any]] = {"nonfinite": {}, "flushed": {}, "suspicious": {}}
    for entry, values in seen:
        problems += _problems(entry, values, allow)
        if _broken(values):
            told["nonfinite"][entry.name] = describe(values)
        if values.flushed:
            rounded = {"from": entry.step.source_dtype, "to": entry.dtype}
            told["flushed"][entry.name] = {"count": values.flushed, "of": values.count, **rounded}
        if _suspicious(entry, values):
            told["suspicious"][entry.name] = f"all {values.count:,} values are {values.constant:g}"
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return told


def _problems(entry: Entry, values: Values, allow: Allow) -> list[Problem]:
    found: list[Problem] = []
    where = _where(entry)
    if values.overflowed:
        what = f"{entry.name}: {values.overflowed:,} of {values.count:,} values are too large for {entry.dtype}"
        found.append(Problem(what, where, _wider(entry.dtype)))
    if _broken(values) and not allow.nonfinite:
        do = "take a checkpoint from before training broke, or write it as it is with --allow-nonfinite"
        found.append(Problem(f"{entry.name} holds {_kinds(values)}", where, do))
    if values.flushed and not allow.flush:
        what = f"{entry.name}: {values.flushed:,} of {values.count:,} values become 0 in {entry.dtype}"
        wider = _WIDER.get(entry.dtype, "")
        keep = f"--dtype {wider} keeps them, " if wider else ""
        found.append(Problem(what, where, f"{keep}--allow-flush writes the zeros"))
    return found


def _broken(values: Values) -> bool:
    """Whether something was not finite before any rounding."""
    return values.nan + values.inf > values.overflowed


def _kinds(values: Values) -> str:
    if values.overflowed:  # the counts and the place may be those of what overflowed
        return f"{values.nan + values.inf - values.overflowed:,} more that were NaN or Inf before"
    kinds = " and ".join(f"{n:,} {kind}" for n, kind in ((values.nan, "NaN"), (values.inf, "Inf")) if n)
    return f"{kinds} among {values.count:,} values, the first at {list(values.first or ())}"


def _where(entry: Entry) -> str:
    """The source: that is where the user looks, whatever the target is called."""
    names = ", ".join(source.name for source in entry.step.sources)
    files = ", ".join(dict.fromkeys(info.file for source in entry.step.sources for info in source.infos))
    return f"{files}: {names}" if names else entry.step.rule


def _wider(dtype: str) -> str:
    wider = _WIDER.get(dtype)
    if wider is None:
        return "no type that is served holds them: the checkpoint itself is at fault"
    return f"convert with --dtype {wider}, whose range is wider"


def _suspicious(entry: Entry, values: Values) -> bool:
    """Whether a constant tensor is worth a line. A vector of zeros or ones is how biases and norms begin training,
    and a filled tensor is ours; a matrix that is constant transforms nothing."""
    if values.constant is None or values.count < 2 or entry.step.kind == "fill":
        return False
    return len(entry.shape) > 1 or values.constant not in (0.0, 1.0)


def told_in_words(values: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of tensor name and sentence, for people."""
    lines: list[tuple[str, str]] = []
    for name, n in values.get("nonfinite", {}).items():
        lines.append((name, f"holds {n['nan']:,} NaN and {n['inf']:,} Inf among {n['of']:,} values (allowed)"))
    for name, n in values.get("flushed", {}).items():
        lines.append((name, f"{n['count']:,} of {n['of']:,} values became 0 in {n['to']} (allowed)"))
    lines += [(name, f"suspicious: {what}") for name, what in values.get("suspicious", {}).items()]
    return lines
