"""Whether what is copied shall stay in the kernel's file cache.

A layout that fits beside its checkpoint is read again from there by whoever verifies or serves it. What does not fit
would only push other files out: then reads and writes leave the cache as they found it (RWF_DONTCACHE), and the disk
writes while we copy, not when we wait for it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

DONT_CACHE = 0x80
"""RWF_DONTCACHE of Linux 6.14: pages that this call brought into the cache go when it is done."""

_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL)


class Calls:
    """Reads and writes at a place of a file, with or without the cache, ``most`` bytes in one write. Kernels and file
    systems that don't know the flag are asked once."""

    def __init__(self, *, bypass: bool = False, most: int | None = None) -> None:
        self._flags = DONT_CACHE if bypass else 0
        self._advise = False
        self._most = most

    def read(self, descriptor: int, out: memoryview, at: int, *, again: bool = False) -> int:
        """Read into ``out``; how many bytes, 0 at the end of the file. What is read ``again`` later stays cached."""
        if again or not (self._flags or self._advise):
            return os.preadv(descriptor, [out], at)
        got = self._call(lambda flags: os.preadv(descriptor, [out], at, flags))
        if self._advise:
            os.posix_fadvise(descriptor, at, got, os.POSIX_FADV_DONTNEED)
        return got

    def write(self, descriptor: int, data: memoryview, at: int) -> int:
        """Write some of ``data``; how many bytes."""
        some = data[: self._most]
        if not self._flags:
            return os.pwrite(descriptor, some, at)
        return self._call(lambda flags: os.pwritev(descriptor, [some], at, flags))

    def _call(self, act: Callable[[int], int]) -> int:
        try:
            return act(self._flags)
        except OSError as error:
            if not self._flags or error.errno not in _UNKNOWN:
                raise
        self._flags, self._advise = 0, hasattr(os, "posix_fadvise")
        return act(0)


def call_size(written: int) -> int:
    """How many bytes to give to the kernel at a time, of ``written`` in all.

    For longer writes it takes larger pieces of memory: fewer calls, a fifth less time. Where memory is full of other
    files' pages there are few of them, and to look for them takes longer than the copy (2 MiB at a time: twice as
    long).
    """
    return 1 << 20 if _memory("MemFree") >= written else 256 << 10


def too_large(files: Iterable[str], written: int, *, sync: bool = True) -> bool:
    """Whether files to read, and the bytes made of them, take more than half of the memory that is free for a cache;
    more than all of it for who does not wait for the disk (not ``sync``), and so would be made to by going past it."""
    total = written + sum(Path(file).stat().st_size for file in files)
    return total > _memory("MemAvailable") // (2 if sync else 1)


def _memory(name: str) -> int:
    """Bytes that the kernel could use (MemAvailable), or that nothing holds (MemFree); without its word, as much as
    anybody asks for."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, StopIteration):
        return 1 << 62
