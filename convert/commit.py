"""A folder that is there whole or not at all: written beside its place under a lock, and moved there by one rename."""

from __future__ import annotations

import contextlib
import errno
import glob
import math
import os
import shutil
import stat
from collections.abc import Callable, Generator
from pathlib import Path

from msgspec import Struct

from ..errors import Kind, MdlError, input_error, machine_error, usage_error
from ..mappings.ops import OpError
from .agreement import Agreement
from .locks import MANIFEST, Claim, claimed, replacing
from .receipts import Written, layout_in, receipt

Say = Callable[[str], None]
"""Told, in a sentence, what a run that fails leaves behind."""


class Workplace(Struct, frozen=True):
    """Where to work: ``layout`` becomes the layout, in ``work``, around it, lies what is known of its files.

    ``resumed`` is whether an earlier run's finished files may lie there, ``notes`` what is to be said about the place.
    """

    work: Path
    layout: Path
    resumed: bool = False
    notes: tuple[str, ...] = ()


class Terms(Struct, frozen=True):
    """On what terms a layout shall be somewhere: ``need`` is the bytes it takes, ``sync`` whether the disk must have it
    before it is there. The ``last`` of several parts waits for the others' locks."""

    force: bool
    need: int
    sync: bool = True
    last: bool = False


class AlreadyMadeError(Exception):
    """Another part was the last, and has made the layout."""


@contextlib.contextmanager
def committed(out: Path, terms: Terms, agreement: Agreement, say: Say) -> Generator[Workplace]:
    """A folder beside ``out`` that becomes ``out`` by one rename.

    If anything ends the run, weight files that are finished stay there for the next one under the same agreement;
    without any, and where the input is refused, nothing stays. Raises MdlError: USAGE if ``out`` exists and is not to
    be replaced; MACHINE if the disk has not the bytes or can't be written to, if another run writes ``out``, or if one
    reads the layout that would be replaced.
    """
    out = real_place(out)
    made: list[Path] = []
    done = False
    try:
        # Left-overs take the lock: a layout comes back, or litter goes. So does the last part: another may be it.
        if not (terms.last or _left_over(out)):
            check_out(out, terms.force)
        made = _make_parents(out.parent)
        with claimed(out, math.inf if terms.last else 0) as claim:
            if terms.last and agreement.is_made(out):
                clear(out)
                raise AlreadyMadeError
            _tidy(out, claim, agreement)
            check_out(out, terms.force)
            check_room(out, terms.need - _kept_bytes(work_path(out), agreement))
            with replacing(out):
                yield from _commit(out, claim, agreement, terms.sync, say)
        done = True
    except OSError as error:
        raise os_problem(error, out) from error
    except OpError as error:
        raise input_error(str(error), str(out)) from error
    finally:
        if not done:
            _remove_parents(made)


def real_place(out: Path) -> Path:
    """Where ``out`` is, a link followed: "." has no name to put another beside, and a link can't be replaced by a
    folder. Raises MdlError (USAGE) for a mount point, which nothing can be moved to."""
    place = out.resolve() if out.is_symlink() else out.absolute()
    if place.is_dir() and os.path.ismount(place):
        raise usage_error("is a mount point, so no folder can be moved there", str(out), "choose a folder below it")
    return place


def _commit(out: Path, claim: Claim, agreement: Agreement, sync: bool, say: Say) -> Generator[Workplace]:
    work = work_path(out)
    resumed = work.exists()
    try:
        if not resumed:
            begin_work(work, agreement)
        layout = layout_in(work)
        yield Workplace(work, layout, resumed, (claim.note,) if claim.note else ())
        if sync:
            flush(layout)
        _swap(layout, out)
        if sync:
            flush(out.parent)
    except BaseException as error:
        kept = {} if _is_final(error) else finished(work, agreement)
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
        else:
            say(
                f"{len(kept)} of {len(agreement.shards)} weight files are whole and stay in {work.name}: the same "
                "command goes on from there; to give up, remove it"
            )
        raise
    clear(out)  # the layout is out of it and in its place


def begin_work(work: Path, agreement: Agreement) -> None:
    """Make the folder to work in. Nobody else may look into it: what lies there is taken at its word."""
    work.mkdir(mode=0o700)
    layout_in(work).mkdir()
    agreement.write(work)


def check_work(work: Path) -> None:
    """Raise MdlError (MACHINE) if the folder to work in is a link or somebody else's: nothing of it may be used, and
    it is not ours to remove."""
    if os.path.lexists(work) and not _is_own_folder(work):
        what = "this is where mdl works, but it is a link or somebody else's"
        raise machine_error(what, str(work), "look at it, and remove it; or choose another name")


def is_private(work: Path) -> bool:
    """Whether nobody else could have put anything into the folder to work in."""
    return _is_own_folder(work) and not os.lstat(work).st_mode & 0o077 and _is_own_folder(layout_in(work))


def _is_own_folder(path: Path) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def clear(out: Path) -> None:
    """Remove what lies beside a layout that is whole. Only for who has claimed it."""
    shutil.rmtree(work_path(out), ignore_errors=True)
    for path in out.parent.glob(f".{glob.escape(work_path(out).name)}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_final(error: BaseException) -> bool:
    """Whether the same command would come to the same end: the input itself is refused."""
    return isinstance(error, OpError) or (isinstance(error, MdlError) and error.kind is Kind.INPUT)


def finished(work: Path, agreement: Agreement) -> dict[str, list[Written]]:
    """The weight files that earlier runs left whole, by name, with what their receipts say."""
    plain = (shard for shard in agreement.shards if _is_plain(layout_in(work) / shard.file))
    found = {shard.file: receipt(work, shard) for shard in plain}
    return {file: written for file, written in found.items() if written is not None}


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _kept_bytes(work: Path, agreement: Agreement) -> int:
    there = finished(work, agreement)
    return sum(shard.nbytes for shard in agreement.shards if shard.file in there)


def work_path(out: Path) -> Path:
    """Where a layout and what is known of it lie until it is whole."""
    return out.with_name(f"{out.name}.mdl-partial")


def _aside(out: Path) -> Path:
    """Where the replaced layout lies for the moment between two renames."""
    return out.with_name(f"{out.name}.mdl-old")


def _left_over(out: Path) -> bool:
    """Whether a run was killed during or after the last rename."""
    return _aside(out).exists() or (work_path(out).exists() and not layout_in(work_path(out)).exists())


def check_out(out: Path, force: bool) -> None:
    """Raise MdlError (USAGE) if there is something that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise usage_error("exists already; nothing was written", str(out), "choose another name, or pass --force")
    if not (out / MANIFEST).is_file():
        what = f"--force only replaces what mdl wrote, and this holds no {MANIFEST}"
        raise usage_error(what, str(out), "remove it yourself")


def check_room(out: Path, need: int) -> None:
    """Raise MdlError (MACHINE) if the disk has not ``need`` bytes left."""
    free = shutil.disk_usage(out.parent).free
    if free < need:
        do = f"free {(need - free) / 1e9:.1f} GB there, or write to another disk"
        raise machine_error(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", str(out.parent), do)


def _tidy(out: Path, claim: Claim, agreement: Agreement) -> None:
    """Clear up after runs that were killed. A layout that one of them had just set aside comes back, and what was
    written under the same agreement stays.

    Who holds the lock knows that they are dead. Without locks only the user can know.
    """
    work, old = work_path(out), _aside(out)
    if work.exists() and not claim.certain:
        do = f"if no mdl convert is running, remove {work.name}"
        raise machine_error("another run is writing here or was killed, and this disk can't tell", str(work), do)
    if old.exists() and not out.exists():
        old.rename(out)
    if old.exists():
        shutil.rmtree(old)
    check_work(work)
    if not work.exists():
        clear(out)
        return
    if is_private(work) and agreement.stands_in(work):
        _keep_weights(work, {shard.file for shard in agreement.shards})
    else:
        shutil.rmtree(work)


def _keep_weights(work: Path, files: set[str]) -> None:
    """Remove half a file, and what another tokenizer left: only weight files, and what is known of them, stay."""
    for path in [*work.glob(".*"), *(p for p in layout_in(work).iterdir() if p.name not in files)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _swap(layout: Path, out: Path) -> None:
    if out.exists():
        old = _aside(out)
        out.rename(old)
        try:
            layout.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)  # the new layout is in place; the next run tries again
    else:
        layout.rename(out)


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


def flush(path: Path) -> None:
    """Wait until the disk has a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
