"""Reads the stream that torch.save wrote before 1.6 (and still does when asked to): positions only, never the data."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

from ..errors import COPY_AGAIN, input_error
from .inert import RefusedError
from .unpickle import MAX_PICKLE, unpickle
from .vet import end_of_pickle

MAGIC = 0x1950A86A20F9469CFC6C
MAGIC_BYTES = MAGIC.to_bytes(10, "little")
"""How the magic number looks in a pickle: found within the first bytes of every such file."""
_PROTOCOL = 1001
_AS_TENSORS = "it holds arrays as numpy objects: convert them with torch.from_numpy, and save the file again"


def read_legacy(path: Path) -> Any:
    """The object that torch.save wrote, tensors as TensorInfo. Raises MdlError (INPUT), naming what is wrong.

    The storages lie behind the object, so the object is read twice: first for the sizes of the storages, then, when
    their positions are known, for the tensors.
    """
    file = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the name of the file
    if not path.stat().st_size:
        raise input_error("this file is empty", file, COPY_AGAIN)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pickles, begin = _pickles(mapped, file)
        _check_head(pickles[:3], file)
        sizes: dict[str, tuple[int, int]] = {}

        def note(key: str, nbytes: int, itemsize: int) -> int:
            sizes[key] = (nbytes, itemsize)
            return 0

        unpickle(pickles[3], file, note, walked=True)
        keys = unpickle(pickles[4], file, note, walked=True)
        starts = _starts(mapped, begin, file, keys, sizes)
        return unpickle(pickles[3], file, lambda key, _nbytes, _itemsize: starts[key], walked=True)


def _pickles(mapped: mmap.mmap, file: str) -> tuple[list[bytes], int]:
    """The five pickles of the stream (three of the head, the object, the list of storages) and where they end."""
    found: list[bytes] = []
    position = 0
    for _ in range(5):
        try:
            end = end_of_pickle(mapped, len(mapped), position)
        except RefusedError as problem:
            raise input_error(problem.what, file, problem.do) from None
        if end - position > MAX_PICKLE:
            raise input_error(f"the pickled part of this file has {end - position:,} bytes", file, _AS_TENSORS)
        found.append(mapped[position:end])
        position = end
    return found, position


def _check_head(pickles: list[bytes], file: str) -> None:
    magic, protocol, system = (unpickle(one, file, _nowhere, walked=True) for one in pickles)
    if magic != MAGIC or protocol != _PROTOCOL:
        raise input_error("this pickle was not written by torch.save", file, "give the checkpoint itself")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise input_error(
            "this file was written on a big-endian machine; only little-endian data is read",
            file,
            "load it with torch.load on that machine, and save it again on a little-endian one (x86, Arm)",
        )


def _nowhere(_key: str, _nbytes: int, _itemsize: int) -> int:
    return 0


def _starts(
    mapped: mmap.mmap, position: int, file: str, keys: object, sizes: dict[str, tuple[int, int]]
) -> dict[str, int]:
    """Byte position of each storage: per key, in the list's order, an int64 element count and then the bytes."""
    named = isinstance(keys, list) and all(type(key) in (str, int) for key in keys)
    if not isinstance(keys, list) or not named or {str(key) for key in keys} != set(sizes) or len(keys) != len(sizes):
        raise input_error("the list of storages does not match the tensors of this file", file, COPY_AGAIN)
    total = len(mapped)
    starts: dict[str, int] = {}
    for key in map(str, keys):
        nbytes, itemsize = sizes[key]
        head = mapped[position : position + 8]
        if len(head) < 8 or position + 8 + nbytes > total:
            raise input_error(
                f"this file is cut short: storage {key} ends behind its {total:,} bytes", file, COPY_AGAIN
            )
        (count,) = struct.unpack("<q", head)
        if count * itemsize != nbytes:
            raise input_error(
                f"storage {key} says {count:,} elements, its tensors say {nbytes // itemsize:,}", file, COPY_AGAIN
            )
        starts[key] = position + 8
        position += 8 + nbytes
    if position != total:
        raise input_error(
            f"{total - position:,} bytes follow the last storage: this file holds more than one object",
            file,
            "save every object to a file of its own",
        )
    return starts
