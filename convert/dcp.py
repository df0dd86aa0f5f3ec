"""Reads a folder of torch.distributed.checkpoint (FSDP2, DTensor): where every piece of every tensor lies, no values.

Each record of its ``.distcp`` files is a file of torch.save's own, and is read as one. Optimizer state is not opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct, field

from ..errors import Kind, MdlError, Problem, input_error
from ..mappings.tensors import ITEMSIZE, Piece, TensorInfo, dense
from .dcp_metadata import MAX_PROBLEMS, Chunk, Entry, read_metadata
from .inert import Unreadable
from .plain import is_training
from .torch_zip import Records, read_torch_zip

NAME = ".metadata"
SUFFIX = ".distcp"
FORMAT = "torch DCP"
BESIDE = ("meta.pt", "common.pt")
"""What Lightning and Megatron put into such a folder: settings, in a file of torch.save's."""
MAX_OBJECT = 1 << 20
"""Bytes of an object that is no tensor. Settings are small; what is larger is some state, left out with a note."""
_OPTIMIZERS = frozenset({"optim", "optimizer", "optimizers"})
_AGAIN = "copy the folder again, all of its files"


def read_dcp(path: Path, notes: list[str]) -> tuple[dict[Any, Any], tuple[Path, ...]]:
    """The saved object, tensors as TensorInfo, and the files that hold them; ``path`` is the ``.metadata``.

    Raises MdlError (INPUT), with several problems at once. ``notes`` takes what is left out.
    """
    file = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the name of the file
    work = _Work(path, file, notes)
    wanted: list[Entry] = []
    for entry in read_metadata(path, file):
        keys = _keys(entry)
        state = next((k for k, key in enumerate(keys) if _is_state(key, k, keys, entry)), None)
        if state is None:
            wanted.append(entry)
        else:
            work.put(keys[: state + 1], None, entry.name)
    names = sorted({chunk.place.file for entry in wanted for chunk in entry.chunks})
    work.check_files(names)
    work.read(wanted)
    work.beside()
    return work.tree, (path, *(path.parent / name for name in names))


def _keys(entry: Entry) -> tuple[str, ...]:
    """The path of an entry; a flat name of an optimizer's state is taken apart, so that it is known as such."""
    if len(entry.path) == 1 and (first := entry.path[0].partition(".")[0]) in _OPTIMIZERS and first != entry.path[0]:
        return first, entry.path[0].partition(".")[2]
    return entry.path


def _is_state(key: str, depth: int, keys: tuple[str, ...], entry: Entry) -> bool:
    """Whether a key of a path leads to training state. The last one of several may be a tensor's own name."""
    return is_training(key) and not (0 < depth == len(keys) - 1 and entry.shape is not None)


class _Work(Struct):
    """The tree, as it grows."""

    path: Path
    file: str
    notes: list[str]
    tree: dict[Any, Any] = field(default_factory=dict[Any, Any])
    problems: list[Problem] = field(default_factory=list[Problem])
    records: Records = field(default_factory=Records)

    def put(self, keys: tuple[str, ...], value: Any, name: str) -> None:
        """Hang a value into the tree."""
        table = self.tree
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                break
        if not isinstance(table, dict) or (table.get(keys[-1]) is not None):
            raise input_error(f"{name[:200]} is in the place of something else", self.file, _AGAIN)
        table[keys[-1]] = value

    def check_files(self, names: list[str]) -> None:
        """Refuse files that are missing, or links that lead elsewhere than where the folder's own list lies."""
        folder = self.path.parent
        homes = (folder.resolve(), self.path.resolve().parent)
        for name in names:
            if not (folder / name).is_file():
                self._problem(f"the file {name!r} is missing", str(folder), _AGAIN)
            elif (folder / name).resolve().parent not in homes:
                what = f"{name} is a link to {(folder / name).resolve()}, outside its folder"
                self._problem(what, self.file, "put the file itself there")
        self._refuse()

    def read(self, entries: list[Entry]) -> None:
        """Read every record, file by file and in the order of the bytes; then put each tensor together."""
        jobs: dict[str, list[tuple[Chunk, Entry]]] = {}
        for entry in entries:
            for chunk in entry.chunks:
                jobs.setdefault(chunk.place.file, []).append((chunk, entry))
        found: dict[str, list[tuple[Chunk, Any]]] = {}
        for name in sorted(jobs):
            ordered = sorted(jobs[name], key=lambda job: (job[0].place.begin, job[0].place.end))
            for entry, chunk, value in self._records(self.path.parent / name, ordered):
                found.setdefault(entry.name, []).append((chunk, value))
        self._refuse()
        for entry in entries:
            held = found.get(entry.name, [])
            if entry.shape is not None:
                self.put(_keys(entry), self._whole(entry, held), entry.name)
            elif held:
                self.put(_keys(entry), held[0][1], entry.name)

    def _records(self, path: Path, jobs: list[tuple[Chunk, Entry]]) -> Iterable[tuple[Entry, Chunk, Any]]:
        file = str(Path(self.file).parent / path.name)
        with path.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            for (one, a), (other, b) in pairwise(jobs):
                if one.place.end > other.place.begin:
                    self._problem(f"{a.name[:200]} and {b.name[:200]} claim the same bytes", file, _AGAIN)
            for chunk, entry in jobs:
                if chunk.place.end > size:
                    what = f"{entry.name[:200]} ends at byte {chunk.place.end:,}, the file at {size:,}"
                    self._problem(what, file, _AGAIN)
                elif not self._full():
                    yield from self._record(stream, file, chunk, entry)

    def _record(self, stream: BinaryIO, file: str, chunk: Chunk, entry: Entry) -> Iterable[tuple[Entry, Chunk, Any]]:
        place = chunk.place
        if entry.shape is None and (why := _unread(stream, chunk)):
            self.notes.append(f"{entry.name}: left out, for {why}")
            return
        try:
            value = self.records.read(stream.fileno(), file, place.begin, place.end, self.notes)
        except MdlError as error:
            for problem in error.problems:
                self._problem(f"{entry.name[:200]}: {problem.what}", file, problem.do)
            return
        if entry.shape is not None and (wrong := _differs(value, chunk, entry)):
            self._problem(f"{entry.name[:200]}: {wrong}", file, _AGAIN)
        else:
            yield entry, chunk, value

    def _whole(self, entry: Entry, held: list[tuple[Chunk, Any]]) -> Any:
        """The record of a tensor: that of its only piece, or of all of them."""
        assert entry.shape is not None  # noqa: S101 - for the type checker
        bad = next((value for _, value in held if isinstance(value, Unreadable)), None)
        if bad or entry.dtype not in ITEMSIZE:
            return bad or Unreadable(f"dtype {entry.dtype[:200]}")
        storage = f"{self.file}:{entry.name}"
        pieces = tuple(Piece(chunk.box.start, _named(value, entry.name, storage)) for chunk, value in held)
        if len(pieces) == 1:
            return pieces[0].info
        shape = entry.shape
        return TensorInfo(entry.name, shape, entry.dtype, self.file, 0, dense(shape), storage, pieces=pieces)

    def beside(self) -> None:
        """Settings that lie in a file of their own."""
        for name in BESIDE:
            if (path := self.path.parent / name).is_file():
                found = read_torch_zip(path, self.notes)
                for key, value in found.items() if isinstance(found, dict) else ():
                    self.tree.setdefault(key, value)

    def _problem(self, what: str, where: str, do: str) -> None:
        if not self._full():
            self.problems.append(Problem(what, where, do))

    def _full(self) -> bool:
        return len(self.problems) >= MAX_PROBLEMS

    def _refuse(self) -> None:
        if self.problems:
            raise MdlError(Kind.INPUT, self.problems)


def _unread(stream: BinaryIO, chunk: Chunk) -> str:
    """Why an object that is no tensor is not read; empty if it is."""
    length = chunk.place.end - chunk.place.begin
    if length > MAX_OBJECT:
        return f"it has {length:,} bytes"
    return "" if os.pread(stream.fileno(), 4, chunk.place.begin) == b"PK\x03\x04" else "torch.save did not write it"


def _differs(value: Any, chunk: Chunk, entry: Entry) -> str:
    """What a record holds instead of the piece that is announced; empty if it is that."""
    shape = tuple(stop - start for start, stop in zip(chunk.box.start, chunk.box.stop, strict=True))
    if isinstance(value, Unreadable):
        return ""
    if not isinstance(value, TensorInfo):
        return "its record holds no tensor"
    if (value.shape, value.dtype) != (shape, entry.dtype):
        return f"its record holds {value.dtype} {list(value.shape)} instead of {entry.dtype[:200]} {list(shape)}"
    return ""


def _named(info: TensorInfo, name: str, storage: str) -> TensorInfo:
    """The record under its name. A storage's number counts within its record only, so it can't tell two apart."""
    return TensorInfo(name, info.shape, info.dtype, info.file, info.offset, info.stride, storage)
