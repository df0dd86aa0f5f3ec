"""What the families share whose settings, not whose names, decide which class serves a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base import Measure

Unsupported = dict[str, tuple[tuple[Any, ...], str]]
"""Settings that change what a model computes: the values that leave it as it is, and what others mean."""


OWN_CLASS = "no class is known for it: it needs a family of your own (docs/architectures.md)"
"""What to do where nothing is nearer."""


def refuse_settings(
    m: Measure, at: str, said: Mapping[str, Any], unsupported: Unsupported, why: str, do: str = OWN_CLASS
) -> None:
    """Report every setting under ``at`` whose value is none of those that leave the model as it is."""
    for key, (allowed, what) in unsupported.items():
        if said.get(key) not in allowed:
            m.problem(f"{at}.{key} is {said[key]!r}: {what}, {why}", do=do)


def first(*cases: tuple[object, str]) -> str:
    """The reason of the first case that holds; "" where none does."""
    return next((reason for holds, reason in cases if holds), "")


def heads_of_fused(m: Measure, heads: int, rows: int, columns: int, names: tuple[str, str]) -> tuple[int, int]:
    """Channels of a head, and key heads: H heads of D channels are the output projection's ``columns``, and q, k, v
    together the (H + 2 K) D ``rows`` of another. ``names`` are those of the two, for the problem if that can't be."""
    head = columns // heads if heads > 0 else 0
    kv = (rows // head - heads) // 2 if head else 0
    if kv < 1 or heads % kv or head * heads != columns or (heads + 2 * kv) * head != rows:
        what = f"{heads} heads do not fit {names[0]} with {columns} columns and {names[1]} with {rows} rows"
        m.problem(what, do="pass --set num_attention_heads=N with the right number")
    return head, kv
