"""How fast this machine copies a file: what the speed of a conversion is to be held against."""

from __future__ import annotations

import os
import time
from pathlib import Path

_MOST = 2 << 30
"""Bytes that are copied at most: enough to last a second, and less than a cache holds back."""


def copy_rate(source: Path, beside: Path, *, sync: bool) -> float:
    """Bytes per second of a plain copy of ``source`` (its first 2 GiB) into the folder of ``beside``, which must exist.

    The kernel copies, as for `cp`; with ``sync``, until the disk has everything. The copy is removed.
    """
    place = beside.with_name(f".{beside.name}.mdl-speed-{os.getpid()}-{os.urandom(4).hex()}")
    with source.open("rb") as file:
        size = min(os.fstat(file.fileno()).st_size, _MOST)
        out = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        place.unlink()  # it goes with its descriptor, however this ends
        try:
            begin = time.perf_counter()
            _copy(file.fileno(), out, size)
            if sync:
                os.fsync(out)
            return size / (time.perf_counter() - begin)
        finally:
            os.close(out)


def _copy(source: int, out: int, size: int) -> None:
    done = 0
    while done < size:
        try:
            copied = os.copy_file_range(source, out, size - done, done)
        except (OSError, AttributeError):  # between two file systems, or another system than Linux
            copied = os.write(out, os.pread(source, min(1 << 20, size - done), done))
        if not copied:
            return
        done += copied
