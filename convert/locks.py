"""Locks between runs of mdl: one writer of a place, and no writer where somebody reads.

They are the operating system's own (flock), which end with their process however it ends; a process id proves nothing,
because in containers every run may have the same. A writer locks a file beside its place, and the manifest of the
layout that it replaces; a reader shares the lock of the manifest. Where a file system has no locks, a reader goes on,
and a writer is told so by ``Claim.note``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path

from msgspec import Struct

from ..errors import MdlError, machine_error

MANIFEST = "mdl.json"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Claim(Struct, frozen=True):
    """What a writer got. ``certain`` is whether nobody else can have it too; if not, ``note`` says why."""

    certain: bool
    note: str = ""


@contextlib.contextmanager
def claimed(out: Path, patience: float = 0) -> Generator[Claim]:
    """Be the only writer of ``out``, by a lock file beside it that is gone afterwards.

    Raises MdlError (MACHINE) if another process has it for ``patience`` seconds, OSError if no file can be made there.
    """
    path = lock_path(out)
    descriptor, certain = _take(path, fcntl.LOCK_EX, patience, lambda who: _busy(who, out))
    try:
        if certain:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        note = f"the file system of {out.parent} has no locks, so a second run into {out.name} would not be noticed"
        yield Claim(certain, "" if certain else note)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still locked: whoever opened it in vain sees that it is another file now
        os.close(descriptor)


@contextlib.contextmanager
def shared(out: Path, patience: float = 60) -> Generator[None]:
    """Be one of several writers of ``out``, each of its own files. The lock file stays: whoever claims ``out`` in the
    end removes it.

    Raises MdlError (MACHINE) if a run has had ``out`` for itself for ``patience`` seconds, or without locks.
    """
    refusal = machine_error("a run that writes all of it has it", str(out), "wait for that one")
    descriptor, certain = _take(lock_path(out), fcntl.LOCK_SH, patience, lambda _: refusal)
    try:
        if not certain:
            what = "this file system has no locks, so parts can't tell which of them is the last"
            raise machine_error(what, str(out.parent), "use --workers or --ray, or another file system")
        yield
    finally:
        os.close(descriptor)


def lock_path(out: Path) -> Path:
    """The file that the writer of ``out`` locks."""
    return out.with_name(f"{out.name}.mdl-lock")


def _busy(who: str, out: Path) -> MdlError:
    what = f"{who or 'another process'} is writing it at this moment"
    return machine_error(what, str(out), "wait for it, or choose another")


def _take(path: Path, kind: int, patience: float, refusal: Callable[[str], MdlError]) -> tuple[int, bool]:
    """Open and lock the file, and whether locks exist; again, if it was another run's last moment and the file is not
    the one on disk. After ``patience`` seconds raises what ``refusal`` makes of the words in the file."""
    until = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            got = _lock(descriptor, kind)
            if got is None or (got and _is_at(descriptor, path)):
                return descriptor, got is not None
            if not got and time.monotonic() > until:
                raise refusal(os.read(descriptor, 200).decode(errors="replace"))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0 if got else 0.1)


@contextlib.contextmanager
def reading(layout: Path) -> Generator[None]:
    """Keep a layout from being replaced while it is read. Several may read; a folder without a manifest has no lock.

    Raises MdlError (MACHINE) if mdl is replacing it.
    """
    descriptor = _share(layout)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _share(layout: Path) -> int | None:
    path = layout / MANIFEST
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None  # whoever reads the manifest says what is wrong
        got = _lock(descriptor, fcntl.LOCK_SH)
        if got is None or (got and _is_at(descriptor, path)):
            return descriptor
        os.close(descriptor)
        if not got:
            raise machine_error("mdl convert is replacing it at this moment", str(layout), "wait for it")


@contextlib.contextmanager
def replacing(layout: Path) -> Generator[None]:
    """Be sure that nobody reads the layout that is to be replaced, now and until the end.

    Raises MdlError (MACHINE) if somebody does.
    """
    path = layout / MANIFEST
    try:
        descriptor = os.open(path, os.O_RDWR)  # network file systems lock for writers only what is open for writing
    except FileNotFoundError:
        yield
        return
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if _lock(descriptor, fcntl.LOCK_EX) is False:
            what = "is being read at this moment (mdl serve, verify, check or export); nothing was written"
            raise machine_error(what, str(layout), "end that first, or choose another name")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was got, without waiting; None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at this path: it may have been removed or replaced since it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
