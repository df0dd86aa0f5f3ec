"""Maps parts of a file without the danger that the file is cut meanwhile, which would end the process with SIGBUS.

Under a read lease (fcntl(2), F_SETLEASE) the kernel keeps whoever wants to write or cut the file waiting until the
lease is given back. It is held for one block, some milliseconds, and before the next one it is asked whether somebody
waits. Where the kernel gives none (another owner's file, a network file system, a file that is open for writing, any
system but Linux), nothing is mapped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

_KNOWN = all(hasattr(fcntl, name) for name in ("F_SETLEASE", "F_GETLEASE", "F_SETSIG"))


class Lease:
    """Read leases on one open file, shared by the threads that want one at the same time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._holders = 0
        self._lock = threading.Lock()
        self._kept = threading.local()

    @contextmanager
    def mapped(self, offset: int, nbytes: int) -> Generator[memoryview | None]:
        """Bytes of the file, mapped; None where the file can't be leased, or has become shorter. Not to be used once
        the lease is given back."""
        held = self._take()
        try:
            long_enough = held and os.fstat(self._descriptor).st_size >= offset + nbytes
            yield self._map(offset, nbytes) if long_enough else None
        finally:
            if held:
                self._give_back()

    def _map(self, offset: int, nbytes: int) -> memoryview:
        """This thread's last map, if it is of the same place: its pages need not be found again."""
        place, (kept, view) = (offset, nbytes), getattr(self._kept, "map", (None, memoryview(b"")))
        if kept != place:
            before = offset % mmap.ALLOCATIONGRANULARITY
            made = mmap.mmap(self._descriptor, before + nbytes, access=mmap.ACCESS_READ, offset=offset - before)
            made.madvise(mmap.MADV_WILLNEED)
            view = memoryview(made)[before:]
            self._kept.map = place, view
        return view

    def _take(self) -> bool:
        with self._lock:
            if not (_leased(self._descriptor) if self._holders else _lease(self._descriptor)):
                return False
            self._holders += 1
            return True

    def _give_back(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _lease(descriptor: int) -> bool:
    if not _KNOWN:
        return False
    try:
        # The kernel's message to the holder is SIGIO, which ends a process that doesn't expect it; SIGURG does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def _leased(descriptor: int) -> bool:
    """Whether the lease holds and nobody waits for its end."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
