"""Reads what a zip of torch.save (torch 1.6 and later) holds: names, shapes, positions; never the data."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from itertools import pairwise
from operator import le
from pathlib import Path
from typing import Any

from ..errors import input_error
from ..mappings.tensors import TensorInfo
from .inert import RefusedError
from .unpickle import MAX_PICKLE, unpickle
from .zip_directory import BadDirectoryError, Member, read_directory

_STORED = 0
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")
"""The mark, how the member is stored, the lengths of its name and of its extra field."""
_FIXED, _header = _LOCAL_HEADER.size, _LOCAL_HEADER.unpack_from
_MARK, _NO_HEADER = b"PK\x03\x04", (b"", 0, 0, 0)
_WINDOW = 1 << 13
_KEPT = 1 << 13  # of a pickle's bytes and of pickles, beyond which none is kept to be told again
_SHOWN = 80
_RESAVE = "load it with torch.load where it was made, and save it again with torch.save"


def read_torch_zip(path: Path, notes: list[str] | None = None) -> Any:
    """The object that torch.save wrote, tensors as TensorInfo. Raises MdlError (INPUT), naming what is wrong.

    ``notes`` takes a sentence about records of data that belong to no tensor, if there are any.
    """
    file = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the name of the file
    with path.open("rb") as stream:
        return read_zip_at(stream.fileno(), file, notes=notes)


def read_zip_at(
    descriptor: int, file: str, begin: int = 0, end: int | None = None, *, notes: list[str] | None = None
) -> Any:
    """The same for an open file of that absolute path, or for the bytes [begin, end) of it, outside of which nothing is
    read. Positions count from the file's start."""
    archive, pickled = _open(descriptor, file, begin, end)
    tree = unpickle(pickled, file, archive.locate)
    archive.finish(notes)
    return tree


class Records:
    """Reads archives of one tensor each, of which a file may hold thousands.

    Where two pickles are equal, what they describe differs in the place of its storage only, so each is obeyed once.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[TensorInfo, tuple[str, int, int], int]] = {}

    def read(self, descriptor: int, file: str, begin: int, end: int, notes: list[str]) -> Any:
        """What :func:`read_zip_at` gives, except that a tensor's storage may be named after another archive's."""
        archive, pickled = _open(descriptor, file, begin, end)
        places: list[tuple[tuple[str, int, int], int]] = []

        def locate(*storage: Any) -> int:
            places.append((storage, archive.locate(*storage)))
            return places[-1][1]

        if pickled in self._known:
            tensor, storage, start = self._known[pickled]
            try:
                offset = tensor.offset + archive.locate(*storage) - start
            except RefusedError as problem:
                raise input_error(problem.what, file, problem.do) from None
            tree: Any = TensorInfo("", tensor.shape, tensor.dtype, file, offset, tensor.stride, tensor.storage)
        else:
            tree = unpickle(pickled, file, locate)
            if isinstance(tree, TensorInfo) and len(places) == 1 and len(pickled) + len(self._known) < _KEPT:
                self._known[pickled] = (tree, *places[0])
        archive.finish(notes)
        return tree


def _open(descriptor: int, file: str, begin: int, end: int | None) -> tuple[_Archive, bytes]:
    """An archive, and its pickle."""
    try:
        archive = _Archive(file, descriptor, begin, *_directory(descriptor, file, begin, end))
        return archive, archive.pickled()
    except RefusedError as problem:
        raise input_error(problem.what, file, problem.do) from None


def _directory(descriptor: int, file: str, begin: int, stop: int | None) -> tuple[str, dict[str, Member], int]:
    """Root folder, members by full name, and where the members' bytes must end."""
    try:
        members, doubled, end = read_directory(descriptor, begin, stop)
    except (BadDirectoryError, OSError) as error:
        raise input_error(
            f"this zip archive can't be read ({error}); the file is probably cut short",
            file,
            "copy or download it again, and compare its size with the original",
        ) from None
    if doubled:
        some = ", ".join(list(dict.fromkeys(doubled))[:5])
        raise input_error(f"several members of this archive have the same name: {some}", file, _RESAVE)
    return _root(members, file), members, end


def _root(members: dict[str, Member], file: str) -> str:
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) > 1:
        raise input_error(
            f"this archive holds several objects of torch.save: {', '.join(f'{root}data.pkl' for root in roots[:5])}",
            file,
            "somebody packed this archive anew; unpack it, and save every object to a file of its own",
        )
    if not roots:
        some = ", ".join(list(members)[:5]) or "nothing"
        raise input_error(
            f"this zip archive was not written by torch.save: it has no data.pkl (it holds {some})",
            file,
            "give the checkpoint itself; if it lies inside this archive, unpack that first",
        )
    root = roots[0]
    if f"{root}constants.pkl" in members or any(name.startswith(f"{root}code/") for name in members):
        raise input_error(
            "this is a TorchScript archive (torch.jit.save), which holds a program",
            file,
            "save its weights alone: torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt')",
        )
    return root


class _Archive:
    """An open archive; ``ranges`` collects start and end of every member that was asked for, header and all."""

    def __init__(self, file: str, descriptor: int, begin: int, root: str, members: dict[str, Member], end: int) -> None:
        self.file, self.descriptor, self.begin, self.end = file, descriptor, begin, end
        self.root, self.members = root, members
        self.data = f"{root}data/"
        self.ranges: dict[str, tuple[int, int]] = {}
        self._near, self._seen = 0, b""

    def pickled(self) -> bytes:
        """The bytes of data.pkl, after the marks beside it were checked."""
        order = self.root + "byteorder"
        if order in self.members and (found := self._read(order, 16)) != b"little":
            raise RefusedError(
                f"the byte order of this file is {found.decode('latin-1')!r}; only little-endian data is read",
                "save it again on a little-endian machine (x86, Arm)",
            )
        *_, size, _ = self.members[self.root + "data.pkl"]
        if size > MAX_PICKLE:
            raise RefusedError(
                f"data.pkl has {size:,} bytes: its arrays are pickled as numpy objects, not as torch tensors",
                "convert them with torch.from_numpy, and save the file again with torch.save",
            )
        return self._read(self.root + "data.pkl", MAX_PICKLE)

    def locate(self, key: str, nbytes: int, itemsize: int) -> int:
        """Where the bytes of storage ``key`` start (a :data:`~.unpickle.Locate`)."""
        member = self.data + key
        found = self.members.get(member)
        if found is None:
            raise RefusedError(
                f"storage {key} is named but not in the archive", "the file is incomplete: copy it again"
            )
        if found[4] != nbytes:
            raise RefusedError(
                f"storage {key} has {found[4]:,} bytes in the archive, but {nbytes:,} by its description"
            )
        return self._start(member, found)

    def finish(self, notes: list[str] | None) -> None:
        """Refuse records that overlap, and note those that nothing asked for."""
        _refuse_overlaps(self.ranges, self.file)
        if notes is not None:
            notes.extend(self.unused())

    def unused(self) -> Iterator[str]:
        """A sentence about the records under data/ that were not asked for. torch.save writes none such."""
        unasked = self.members.keys() - self.ranges.keys()
        left = [name for name in self.members if name in unasked and name.startswith(self.data)] if unasked else []
        if left:
            some = ", ".join(name if name.isprintable() else ascii(name) for name in (n[:_SHOWN] for n in left[:5]))
            more = f" and {len(left) - 5:,} more" if len(left) > 5 else ""
            yield f"{Path(self.file).name}: {len(left):,} of its records belong to no tensor, left out: {some}{more}"

    def _read(self, member: str, most: int) -> bytes:
        # Checksums are not looked at: torch can be told to write none.
        found = self.members[member]
        return os.pread(self.descriptor, min(found[4], most), self._start(member, found))

    def _see(self, offset: int, size: int) -> bytes:
        """Hold the bytes of the file from there on. Where the records are small, those that follow are read along."""
        close = 0 <= offset - self._near < 2 * _WINDOW
        self._seen = os.pread(self.descriptor, _WINDOW if close and size < _WINDOW else size, offset)
        self._near = offset
        return self._seen

    def _start(self, member: str, found: Member) -> int:
        """Where the member's bytes start, after its own header was held against the directory."""
        name, flags, method, packed, size, offset = found
        if method != _STORED or flags & 1:
            raise RefusedError(
                f"{member} is compressed or encrypted; torch.save stores its members as they are",
                f"somebody packed this archive anew; {_RESAVE}",
            )
        if not self.begin <= offset < self.end:
            raise RefusedError(f"{member} lies outside the archive", "copy the file again")
        length = len(name)
        at, seen = offset - self._near, self._seen
        if not 0 <= at <= len(seen) - _FIXED - length:
            seen, at = self._see(offset, _FIXED + length), 0
        mark, stored, name_length, extra_length = _header(seen, at) if len(seen) >= _FIXED else _NO_HEADER
        if mark != _MARK:
            raise RefusedError(f"{member} has no header where the archive's directory says", "copy the file again")
        # The length of the extra field differs from the directory's copy: torch pads it to align the data.
        if name_length != length or not seen.startswith(name, at + _FIXED) or stored != _STORED:
            raise RefusedError(
                f"{member} is called or stored otherwise by its own header", f"copy it again, or {_RESAVE}"
            )
        start = offset + _FIXED + length + extra_length
        if start + size > self.end or packed != size:
            raise RefusedError(f"{member} ends behind the end of the archive", "copy the file again")
        self.ranges[member] = offset, start + size
        return start


def _refuse_overlaps(ranges: Mapping[str, tuple[int, int]], file: str) -> None:
    starts, ends = zip(*sorted(ranges.values()), strict=True) if ranges else ((), ())
    if all(map(le, ends, starts[1:])):
        return
    placed = sorted((start, end, member) for member, (start, end) in ranges.items())
    for (_, end, first), (start, _, second) in pairwise(placed):
        if start < end:
            raise input_error(f"{first} and {second} claim the same bytes", file, _RESAVE)
