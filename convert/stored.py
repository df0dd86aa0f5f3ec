"""Tensors as they lie in a file: strided ranges of bytes that are described first and read later.

Reading goes through ``preadv`` into memory that is used again and again. A map would be as quick, but its pages count
as this process's memory, and a file that is cut while it is read would end the process with SIGBUS, not a message. Only
matrices that are turned come from a map, under a lease (leases.py): a block of them takes a little of every row.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import threading
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..errors import input_error, machine_error
from ..mappings.lazy import Array, Lazy, raw_dtype
from ..mappings.nodes import Node
from ..mappings.scratch import Scratch
from ..mappings.tensors import ITEMSIZE, Shape, TensorInfo
from ..mappings.turning import copy_turned
from .composed import composed
from .file_cache import Calls
from .leases import Lease
from .pieces import joined

_CALL = 64 << 10
"""Bytes that are copied from the file cache in the time that one more system call takes (5 µs): what decides between
many reads and a wide one."""

_scratch = Scratch()

PIECE = 1 << 20
"""Bytes read before they are turned, with what lies between them: they stay in the cache, and take little memory."""


class Files:
    """Checkpoint files, opened once and read at any place by any number of threads; past the file cache with
    ``bypass``. A context manager."""

    def __init__(self, *, bypass: bool = False) -> None:
        self._calls = Calls(bypass=bypass)
        self._open: dict[str, Readable] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()

    def tensor(self, info: TensorInfo) -> Lazy:
        """A lazy view of one stored tensor. Raises MdlError (INPUT) if the file has become too short for it."""
        raw = raw_dtype(info.dtype)
        if info.numel == 0:
            return Lazy.of(np.zeros(info.shape, raw), info.dtype)
        if info.pieces:
            return joined(info, self.tensor)
        if info.made:
            return composed(info, self.tensor)
        file = self._readable(info.file)
        check_end(info, file.size)
        strides = tuple(s * raw.itemsize for s in info.stride)
        whole = info.offset, reach_of(info.shape, strides, raw.itemsize)
        return Lazy(Stored(file, info.offset, info.shape, strides, raw, whole), (1,) * len(info.shape), info.dtype)

    def _readable(self, path: str) -> Readable:
        with self._lock:
            if path not in self._open:
                descriptor = open_readable(path)
                size = os.fstat(descriptor).st_size
                self._open[path] = Readable(path, descriptor, size, self._calls, Lease(descriptor))
            return self._open[path]


def open_readable(path: str) -> int:
    """Open a file. A checkpoint may have more files than a process may open unless it asks for more."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(4 * soft, 4096), hard) if hard > 0 else 4 * soft, hard))
    return os.open(path, os.O_RDONLY)


def check_end(info: TensorInfo, size: int) -> None:
    """Raise MdlError (INPUT) if a tensor does not end within its file's ``size`` bytes."""
    end = info.offset + reach_of(info.shape, info.stride, 1) * ITEMSIZE[info.dtype]
    if end > size:
        raise input_error(f"{info.name} ends at byte {end}, the file at {size}", info.file, "copy it again")


def reach_of(shape: Shape, strides: Shape, itemsize: int) -> int:
    """How far the last value's end lies from the first value's begin."""
    return itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


class Readable(Struct, frozen=True):
    """An open file."""

    path: str
    descriptor: int
    size: int
    calls: Calls
    lease: Lease

    def read_into(self, out: Array, offset: int, *, again: bool = False) -> None:
        """Fill a contiguous array with the bytes from ``offset``, some of which may be read ``again``. Raises MdlError:
        INPUT where the file ends early, MACHINE where the disk can't read it."""
        left = memoryview(out.reshape(-1).view(np.uint8).data)
        while left:
            try:
                got = self.calls.read(self.descriptor, left, offset, again=again)
            except OSError as error:
                raise machine_error(f"can't be read at byte {offset}: {error.strerror}", self.path) from error
            if not got:
                what = f"became shorter while it was read: it ends before byte {offset + len(left)}"
                raise input_error(what, self.path, "wait until whatever writes it has finished, or copy it again")
            left, offset = left[got:], offset + got


class Stored(Node, Struct, frozen=True):
    """A strided view of a file's bytes; offset and strides in bytes. ``whole`` is where the tensor that it is a part of
    begins, and how many bytes on it ends."""

    file: Readable
    offset: int
    shape: Shape
    strides: Shape
    dtype: np.dtype[Any]
    whole: tuple[int, int]

    def split(self, axis: int, sizes: Shape) -> Node:
        steps = tuple(self.strides[axis] * math.prod(sizes[k + 1 :]) for k in range(len(sizes)))
        return replace(self, shape=_instead(self.shape, axis, sizes), strides=_instead(self.strides, axis, steps))

    def permute(self, order: Shape) -> Stored:
        return replace(self, shape=tuple(self.shape[k] for k in order), strides=tuple(self.strides[k] for k in order))

    def slice(self, axis: int, start: int, stop: int) -> Stored:
        shape = _instead(self.shape, axis, (max(stop - start, 0),))
        return replace(self, offset=self.offset + start * self.strides[axis], shape=shape)

    @property
    def turned(self) -> int:
        real = [stride for n, stride in zip(self.shape, self.strides, strict=True) if n > 1]
        size = self.dtype.itemsize
        return size if real and real[-1] != size else 0

    def read(self) -> Array:
        out: Array = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Array) -> None:
        if not out.size:
            return
        order = sorted(range(len(self.shape)), key=lambda k: -self.strides[k])
        natural = self.permute(tuple(order))
        if natural._contiguous() and order == sorted(order):
            self.file.read_into(out, self.offset)
        elif not natural._turned_from_map(out, order):
            _copy_in_pieces(natural, out, order)

    def _turned_from_map(self, out: Array, order: list[int]) -> bool:
        """Turn a view from a map of the tensor, where there can be one: what lies between its runs costs nothing."""
        back = sorted(range(len(order)), key=order.__getitem__)
        with self.file.lease.mapped(*self.whole) as held:
            if held is None:
                return False
            values = np.ndarray(self.shape, self.dtype, held, self.offset - self.whole[0], self.strides)
            copy_turned(values.transpose(back), out)
        return True

    def _contiguous(self) -> bool:
        """Whether the values follow each other without a gap, in this order."""
        step = self.dtype.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n > 1 and stride != step:
                return False
            step *= n
        return True

    def gathered(self) -> Array:
        """The values of a view whose strides fall: run by run, or by one read of all that lies between them. They are
        valid until this thread gathers again."""
        outer, run = self._runs()
        reach = reach_of(self.shape, self.strides, self.dtype.itemsize)
        count = math.prod(self.shape[:outer])
        if reach <= run * count + _CALL * (count - 1) or 0 in self.strides:
            held = _scratch.take("gathered", reach, "uint8")
            self.file.read_into(held, self.offset, again=reach > run * count)
            return np.ndarray(self.shape, self.dtype, held.data, 0, self.strides)
        made = _scratch.take("gathered", count * run, "uint8").reshape(count, run)
        places = itertools.product(
            *(range(0, n * s, s) for n, s in zip(self.shape[:outer], self.strides, strict=False))
        )
        for row, place in zip(made, places, strict=True):
            self.file.read_into(row, self.offset + sum(place))
        return made.reshape(-1).view(self.dtype).reshape(self.shape)

    def _runs(self) -> tuple[int, int]:
        """How many leading dimensions have to be walked over, and the bytes that follow each other below them."""
        run = self.dtype.itemsize
        for outer in range(len(self.shape), 0, -1):
            n, stride = self.shape[outer - 1], self.strides[outer - 1]
            if n > 1 and stride != run:
                return outer, run
            run *= n
        return 0, run


def _copy_in_pieces(natural: Stored, out: Array, order: list[int]) -> None:
    """Gather a view in the file's order, and turn it as ``out`` wants it while it is in the cache."""
    back = sorted(range(len(order)), key=order.__getitem__)
    target = out.transpose(order)
    axis = next((k for k, n in enumerate(natural.shape) if n > 1), 0)
    rows = max(1, PIECE // max(natural.strides[axis], out.nbytes // natural.shape[axis]))
    for start in range(0, natural.shape[axis], rows):
        stop = min(start + rows, natural.shape[axis])
        piece = natural.slice(axis, start, stop)
        where = target[(slice(None),) * axis + (slice(start, stop),)]
        copy_turned(piece.gathered().transpose(back), where.transpose(back))


def _instead(values: Shape, axis: int, those: Shape) -> Shape:
    """The values with those in place of one of them."""
    return (*values[:axis], *those, *values[axis + 1 :])
