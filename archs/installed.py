"""Families that installed packages bring, by an entry point of the group ``mdl.archs``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
    heading = f"[{GROUP}]".encode()
    try:
        return any(heading in text for text in _entry_points(place or "."))
    except NotADirectoryError:
        return True  # an archive: the library looks into it
    except OSError:
        return False  # missing, or closed to us: it would find nothing there either


def _entry_points(folder: str) -> Iterator[bytes]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".dist-info", ".egg-info")):
                with suppress(OSError), open(f"{entry.path}/entry_points.txt", "rb") as file:  # noqa: PTH123 - quick
                    yield file.read()
