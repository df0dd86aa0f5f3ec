"""Tells under which keys a pickle stopped, from the stack of the unpickler that was reading it."""

from __future__ import annotations

from typing import Any

from .inert import Ordered, Stub

_LONGEST = 80


def pending_keys(metastack: list[list[Any]], stack: list[Any]) -> tuple[str, ...]:
    """The keys of the tables that were being filled, outermost first.

    ``metastack`` holds what lay below each mark of the pickle, ``stack`` what lies above the last one, as
    ``pickle._Unpickler`` keeps them. Keys that are neither texts nor whole numbers are left out.
    """
    found: list[str] = []
    filled = False
    for frame in [*metastack, stack]:
        key = _key(frame, filled)
        if type(key) in (str, int):
            text = str(key)
            found.append(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
        filled = bool(frame) and isinstance(frame[-1], (dict, Ordered, Stub))
    return tuple(found)


def _key(frame: list[Any], filled: bool) -> Any:
    """The key whose value was being made. ``filled``: the frame holds the entries of a table, key and value in turn."""
    if filled:
        # A value in the making is at most one thing here: a container, or the class or function that will make it.
        last = len(frame) - 1
        return frame[last - last % 2] if frame else None
    for position in range(len(frame) - 2, -1, -1):  # a table of one entry is filled without a mark
        if isinstance(frame[position], (dict, Ordered, Stub)):
            return frame[position + 1]
    return None
