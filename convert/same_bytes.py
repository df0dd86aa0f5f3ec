"""Whether two stored tensors hold the same bytes, at the cost of what must be read to tell.

Planning a terabyte may have to compare its embedding with its head. Tensors that differ do so within the first few KiB;
of equal ones every byte is read, but into two small buffers, so that memory does not grow with the file. Where both
files have a hole, which is zeros, nothing is read.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..errors import input_error
from ..mappings.tensors import TensorInfo

_FIRST, _MOST = 1 << 12, 1 << 20
_SEEK_DATA = getattr(os, "SEEK_DATA", None)  # not every system knows holes


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Compare two contiguous tensors of one size; stops at the first difference.

    Raises MdlError (INPUT) if a file has become too short for its tensor.
    """
    with Path(a.file).open("rb", buffering=0) as one, Path(b.file).open("rb", buffering=0) as other:
        ends = [(one.fileno(), a.offset), (other.fileno(), b.offset)]
        for (descriptor, start), info in zip(ends, (a, b), strict=True):
            size = os.fstat(descriptor).st_size
            if start + a.nbytes > size:
                what = f"{info.name} ends at byte {start + a.nbytes}, the file at {size}"
                raise input_error(what, info.file, "copy it again")
        return _same(ends, a.nbytes)


def _same(places: list[tuple[int, int]], size: int) -> bool:
    at, block = 0, _FIRST
    while at < size:
        empty = min(_hole(descriptor, start + at, start + size) for descriptor, start in places)
        if empty:
            at += empty
            continue
        length = min(block, size - at)
        one, other = (os.pread(descriptor, length, start + at) for descriptor, start in places)
        if one != other or not one:
            return False
        at, block = at + len(one), min(block * 4, _MOST)
    return True


def _hole(descriptor: int, at: int, end: int) -> int:
    """How many bytes from ``at`` on, up to ``end``, the file does not store because they are zeros."""
    if _SEEK_DATA is None:
        return 0
    try:
        return min(os.lseek(descriptor, at, _SEEK_DATA), end) - at
    except OSError as error:
        return end - at if error.errno == errno.ENXIO else 0  # no data follows; else: it can't be told
