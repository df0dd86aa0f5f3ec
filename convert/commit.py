"""A folder that is there whole or not at all: written beside its place under a lock, and moved there by one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MdlError, input_error, machine_error, usage_error
from ..mappings.ops import OpError
from .locks import MANIFEST, Claim, claimed, replacing


@dataclass(frozen=True)
class Scratch:
    """The folder to write into, and what is to be said about it."""

    path: Path
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def committed(out: Path, *, force: bool, need: int) -> Generator[Scratch]:
    """A scratch folder beside ``out`` that becomes ``out`` by one rename, or vanishes if anything goes wrong.

    Raises MdlError: USAGE if ``out`` exists and is not to be replaced; MACHINE if the disk has not ``need`` bytes or
    can't be written to, if another run writes ``out``, or if one reads the layout that would be replaced.
    """
    out = out.absolute()  # "." has no name to put another beside
    made: list[Path] = []
    done = False
    try:
        if not _aside(out).exists():  # else a layout comes back first, and that takes the lock
            _check_out(out, force)
        made = _make_parents(out.parent)
        with claimed(out) as claim:
            _tidy(out, claim)
            _check_out(out, force)
            _check_room(out, need)
            with replacing(out):
                yield from _commit(out, claim)
        done = True
    except OSError as error:
        raise os_problem(error, out) from error
    except OpError as error:
        raise input_error(str(error), str(out)) from error
    finally:
        if not done:
            _remove_parents(made)


def _commit(out: Path, claim: Claim) -> Generator[Scratch]:
    scratch = scratch_path(out)
    scratch.mkdir()
    try:
        yield Scratch(scratch, (claim.note,) if claim.note else ())
        _sync(scratch)
        _swap(scratch, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def scratch_path(out: Path) -> Path:
    """Where a layout lies until it is whole."""
    return out.with_name(f"{out.name}.mdl-partial")


def _aside(out: Path) -> Path:
    """Where the replaced layout lies for the moment between two renames."""
    return out.with_name(f"{out.name}.mdl-old")


def _check_out(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise usage_error("exists already; nothing was written", str(out), "choose another name, or pass --force")
    if not (out / MANIFEST).is_file():
        what = f"--force only replaces what mdl wrote, and this holds no {MANIFEST}"
        raise usage_error(what, str(out), "remove it yourself")


def _check_room(out: Path, need: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < need:
        do = f"free {(need - free) / 1e9:.1f} GB there, or write to another disk"
        raise machine_error(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", str(out.parent), do)


def _tidy(out: Path, claim: Claim) -> None:
    """Clear up after runs that were killed. A layout that one of them had just set aside comes back.

    Who holds the lock knows that they are dead. Without locks only the user can know.
    """
    scratch, old = scratch_path(out), _aside(out)
    if scratch.exists() and not claim.certain:
        do = f"if no mdl convert is running, remove {scratch.name}"
        raise machine_error("another run is writing here or was killed, and this disk can't tell", str(scratch), do)
    if old.exists() and not out.exists():
        old.rename(out)
    for left in (scratch, old):
        if left.exists():
            shutil.rmtree(left)


def _swap(scratch: Path, out: Path) -> None:
    if out.exists():
        old = _aside(out)
        out.rename(old)
        try:
            scratch.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)  # the new layout is in place; the next run tries again
    else:
        scratch.rename(out)


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it. Returns the new ones, the lowest first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_parents(made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # somebody else may use them by now
        for folder in made:
            folder.rmdir()


def os_problem(error: OSError, out: Path) -> MdlError:
    """What the operating system refused while ``out`` was written, in words: USAGE for a place that can't be one,
    MACHINE for a disk that is full, closed or broken."""
    if isinstance(error, NotADirectoryError | FileExistsError):
        return usage_error(f"can't be made: {error.strerror}", error.filename or str(out), "choose another place")
    return machine_error(f"writing failed: {error.strerror or error}", error.filename or str(out), _do(error))


def _do(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a place that may be written to"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free space there, or write to another disk" if full else ""


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
