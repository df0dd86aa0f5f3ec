"""Families that installed packages bring, by an entry point of the group ``mdl.archs``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "mdl.archs"


def family_points() -> Iterable[EntryPoint]:
    """The entry points of all families that are installed."""
    if not any(map(_may_hold, sys.path)):
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _may_hold(place: str) -> bool:
    """Whether a place that Python imports from may hold such an entry point. Most hold none, and to import
    importlib.metadata in order to find that out takes an eighth of a start."""
    if not os.path.isdir(place or "."):  # noqa: PTH112 - a missing place, or an archive, which is left to the library
        return Path(place).exists()
    heading = f"[{GROUP}]".encode()
    return any(heading in text for text in _entry_points(place or "."))


def _entry_points(folder: str) -> Iterator[bytes]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".dist-info", ".egg-info")):
                with suppress(OSError), open(f"{entry.path}/entry_points.txt", "rb") as file:  # noqa: PTH123 - quick
                    yield file.read()
