"""Reads the directory at the end of a zip archive: which members it has, where they begin and how they are stored.

:mod:`zipfile` makes an object of twenty fields for each member, which is a third of the time that reading a checkpoint
of many tensors takes. This module refuses whatever that one refuses, and passes over what no reader of checkpoints asks
for: dates, comments, rights.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

MAX_DIRECTORY = 1 << 28
"""Bytes of a directory. One of a million tensors has about 80 million."""
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = "<4s2xHHH8xIIHHH8xI"  # without writer, date and time, checksum, disk and attributes
_FIXED = struct.calcsize(_ENTRY)
_SIZES = struct.Struct("<4s2xH20xHHH12x")
_MAGIC = b"PK\x01\x02"
_MAX_VERSION = 63
_FULL, _FULL64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
_UTF8 = 0x800


class BadDirectoryError(Exception):
    """The directory is missing, cut short or contradicts itself."""


Member = tuple[bytes, int, int, int, int, int]
"""One entry of the directory: the name's bytes, flags, method, bytes packed and unpacked, and the position of the
member's own header."""


def read_directory(descriptor: int, begin: int = 0, end: int | None = None) -> tuple[dict[str, Member], list[str], int]:
    """All members by name in the directory's order, names that occur again, and where the directory starts; positions
    count from the file's start. The archive is the file, or the bytes [begin, end) of it. Raises BadDirectoryError."""
    total = os.fstat(descriptor).st_size
    at, size, offset = _end_record(descriptor, begin, total if end is None else min(end, total))
    start = at - size
    shift = start - offset  # what stands before the archive: positions in it are counted from its own start
    if start < begin:
        raise BadDirectoryError("Bad offset for central directory")
    if size > MAX_DIRECTORY:
        raise BadDirectoryError(f"a directory of {size:,} bytes")
    data = _read(descriptor, start, size)
    if len(data) != size:
        raise BadDirectoryError("Truncated central directory")
    return *_members(data, shift), start


def _read(descriptor: int, start: int, size: int) -> bytes:
    """Bytes of the file; fewer where it ends."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(descriptor, size, start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def _end_record(descriptor: int, begin: int, total: int) -> tuple[int, int, int]:
    """Where the directory must end, its size, and its position by the archive's own count."""
    at, record = _find_end(descriptor, begin, total)
    _, _, _, _, _, size, offset, _ = _END.unpack(record)
    locator = _read(descriptor, at - _LOCATOR64.size, _LOCATOR64.size) if at >= begin + _LOCATOR64.size else b""
    if locator[:4] != b"PK\x06\x07":
        return at, size, offset
    _, disk, _, disks = _LOCATOR64.unpack(locator)
    if disk != 0 or disks > 1:
        raise BadDirectoryError("zipfiles that span multiple disks are not supported")
    at64 = at - _LOCATOR64.size - _END64.size
    record64 = _read(descriptor, at64, _END64.size) if at64 >= begin else b""
    if record64[:4] != b"PK\x06\x06":
        return at, size, offset
    *_, size, offset = _END64.unpack(record64)
    return at64, size, offset


def _find_end(descriptor: int, begin: int, total: int) -> tuple[int, bytes]:
    """The record that ends every archive and its position: behind it may stand a comment of up to 64 KiB."""
    at = total - _END.size
    record = _read(descriptor, at, _END.size) if at >= begin else b""
    if record[:4] == b"PK\x05\x06" and record[-2:] == b"\0\0":
        return at, record
    before = max(at - (1 << 16), begin)
    tail = _read(descriptor, before, total - before)
    found = tail.rfind(b"PK\x05\x06")
    record = tail[found : found + _END.size]
    if found < 0 or len(record) != _END.size:
        raise BadDirectoryError("File is not a zip file")
    return before + found, record


def _members(data: bytes, shift: int) -> tuple[dict[str, Member], list[str]]:
    found: dict[str, Member] = {}
    again: list[str] = []
    at = 0
    while at < len(data):
        sizes, entries = _alike(data, at)
        for magic, version, flags, method, packed, size, named, more, noted, offset, raw, extra in entries:
            if magic != _MAGIC or version & 0xFF > _MAX_VERSION or (named, more, noted) != sizes:
                break  # the first one of those that follow is what it is, or is refused
            at += _FIXED + named + more + noted
            if extra:
                packed, size, offset = _widened(extra, packed, size, offset)
            name = raw.decode() if raw.isascii() and b"\0" not in raw else _name(raw, flags)
            if name in found:
                again.append(name)
            found[name] = raw, flags, method, packed, size, offset + shift
    return found, again


def _alike(data: bytes, at: int) -> tuple[tuple[int, int, int], Iterator[tuple[Any, ...]]]:
    """The entries from there on, as if all were as long as the first, and how long its name and the two fields behind
    it are. torch.save numbers its members, so that all but a few are as long as the one before."""
    if at + _FIXED > len(data):
        raise BadDirectoryError("Truncated central directory")
    magic, version, named, more, noted = _SIZES.unpack_from(data, at)
    if magic != _MAGIC:
        raise BadDirectoryError("Bad magic number for central directory")
    if version & 0xFF > _MAX_VERSION:
        raise BadDirectoryError(f"zip file version {(version & 0xFF) / 10:.1f}")
    entry = _entry(named, more, noted)
    count = (len(data) - at) // entry.size
    if not count:
        raise BadDirectoryError("Truncated central directory")
    return (named, more, noted), entry.iter_unpack(memoryview(data)[at : at + count * entry.size])


@lru_cache(64)
def _entry(named: int, more: int, noted: int) -> struct.Struct:
    return struct.Struct(f"{_ENTRY}{named}s{more}s{noted}x")


def _name(raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise BadDirectoryError(str(error)) from None
    return name.partition("\0")[0]  # what follows a NUL is a trick


def _widened(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """The sizes and the position of a member of 4 GiB and more, which stand in a field of their own."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if at + 4 + length > len(extra):
            raise BadDirectoryError(f"Corrupt extra field {kind:04x} (size={length})")
        if kind == 1:
            rest = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                size = next(rest) if size in (_FULL, _FULL64) else size
                packed = next(rest) if packed == _FULL else packed
                offset = next(rest) if offset == _FULL else offset
            except StopIteration:
                raise BadDirectoryError("Corrupt zip64 extra field") from None
        at += 4 + length
    return packed, size, offset
