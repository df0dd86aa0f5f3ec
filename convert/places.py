"""Where a single file may be written: looked at before any work, so that none is lost to a mistyped path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import usage_error


def check_place(path: Path, what: str = "") -> None:
    """Raise MdlError (USAGE) unless a file can be made or replaced here. ``what`` names the option that gave it."""
    told = f"{what} {path}: ".lstrip() if what else ""
    folder = path.absolute().parent
    if path.is_dir():
        raise usage_error(f"{told}this is a folder, a file is to be written", str(path), "give a file name in it")
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise usage_error(f"{told}the folder {folder} {kind}", str(path), "make it first, or choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise usage_error(f"{told}nothing can be written in {folder}", str(path), "choose a place that allows it")


def check_replaced(path: Path, *, force: bool, ours: Callable[[Path], bool]) -> None:
    """Raise MdlError (USAGE) if something is there already, unless it may be replaced: ``force``, and ``ours`` finds
    that mdl wrote it. So no checkpoint and no code is ever lost to a mistyped name."""
    if not os.path.lexists(path):
        return
    if not force:
        raise usage_error("exists already; nothing was written", str(path), "choose another name, or pass --force")
    if not path.is_file() or not ours(path):
        what = "--force only replaces what this command wrote before, and this is something else"
        raise usage_error(what, str(path), "choose another name, or remove it yourself")
