"""Reads the ``.metadata`` of a folder of torch.distributed.checkpoint: its tensors, and where their pieces lie.

It is a pickle of a few records of torch's. It goes through the same reader as the pickle of a ``.pt``, so that what
comes out are inert records, of whatever class: OLMo-core writes its own for the places. Only fields are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from msgspec import Struct

from ..errors import COPY_AGAIN, Kind, MdlError, Problem, input_error
from ..mappings.tensors import MAX_DIMS, Shape
from .inert import RefusedError, Stub
from .pieces import Box, PiecesError, arrange, box_of
from .plain import key_text
from .unpickle import MAX_PICKLE, unpickle

MAX_PATH = 20
"""Tables within each other that the saved object may have had."""
MAX_PROBLEMS = 20
"""Entries that are wrong, of which the refusal tells."""
_LIMIT = 1 << 63
_SAVE = "copy the folder again; if that does not help, save it again with torch.distributed.checkpoint.save"


class Place(Struct, frozen=True):
    """Bytes of a file of the folder, by its name."""

    file: str
    begin: int
    end: int


class Chunk(Struct, frozen=True):
    """A piece of a tensor, or an object that is none."""

    box: Box
    place: Place


class Entry(Struct, frozen=True):
    """One saved thing. ``path`` are the keys that led to it; ``dtype`` is empty and ``shape`` None for what is no
    tensor. ``chunks`` lists what holds at least one value."""

    name: str
    path: tuple[str, ...]
    shape: Shape | None
    dtype: str
    chunks: tuple[Chunk, ...]


def read_metadata(path: Path, file: str) -> list[Entry]:
    """What a ``.metadata`` lists. Raises MdlError (INPUT): every piece of a tensor lies inside it, no two overlap, none
    is missing, each has a place in a file of this folder. Whether the files are there is not looked at."""
    size = path.stat().st_size
    if size > MAX_PICKLE:
        raise input_error(f"it has {size:,} bytes, more than any list of tensors", file, _SAVE)
    tree = unpickle(path.read_bytes(), file, _no_storage)
    try:
        listed, places, paths = _parts(tree)
        return _entries(listed, places, paths, file)
    except RefusedError as problem:
        raise input_error(problem.what, file, problem.do or _SAVE) from None


def _no_storage(*_: object) -> NoReturn:
    raise RefusedError("it holds tensors itself, which a .metadata never does", COPY_AGAIN)


def _parts(tree: Any) -> tuple[dict[str, Stub], dict[tuple[str, Shape], Place], dict[Any, Any]]:
    """The three tables of the record: what there is, where it lies, which keys led to it."""
    state = tree.state if isinstance(tree, Stub) else {}
    listed, stored, paths = (state.get(key) for key in ("state_dict_metadata", "storage_data", "planner_data"))
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise RefusedError("this is not the .metadata of torch.distributed.checkpoint: it lists no tensors and places")
    if not all(type(name) is str and isinstance(entry, Stub) for name, entry in listed.items()):
        raise RefusedError("its list of tensors has an unknown form")
    places: dict[tuple[str, Shape], Place] = {}
    for index, place in cast("dict[Any, Any]", stored).items():
        key = _index(index)
        if key in places:
            raise RefusedError(f"it gives two places for {_of(*key)}")
        places[key] = _place(place, _of(*key))
    return cast("dict[str, Stub]", listed), places, cast("dict[Any, Any]", paths) if isinstance(paths, dict) else {}


def _of(name: str, at: Shape) -> str:
    return f"the piece of {name[:200]} at {list(at)}" if at else name[:200]


def _index(index: Any) -> tuple[str, Shape]:
    """The key of a place: a tensor's name and where the piece starts."""
    state = index.state if isinstance(index, Stub) else {}
    name, at = state.get("fqn"), state.get("offset")
    if type(name) is not str:
        raise RefusedError("its list of places has an unknown form")
    return name, () if at is None else _shape(at, name)


def _place(place: Any, what: str) -> Place:
    state = place.state if isinstance(place, Stub) else {}
    file, begin, length = (cast("Any", state.get(key)) for key in ("relative_path", "offset", "length"))
    if type(file) is not str or not _whole(begin) or not _whole(length):
        raise RefusedError(f"the place of {what} is no file with an offset and a length ≥ 0")
    if not file or file in (".", "..") or any(c in file for c in "/\\\0"):
        raise RefusedError(
            f"it names a file outside its folder: {file[:200]!r}, for {what}",
            "give the folder that was saved; a checkpoint needs nothing from elsewhere",
        )
    if state.get("transform_descriptors"):
        raise RefusedError(
            f"{what} is compressed or otherwise transformed",
            "load it with the extensions that it was saved with, and save it again without",
        )
    return Place(file, begin, begin + length)


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _shape(value: object, name: str) -> Shape:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS or not all(map(_whole, value)):
        raise RefusedError(f"a size or offset of {name[:200]} is not a list of a few whole numbers ≥ 0")
    return tuple(value)


def _entries(
    listed: dict[str, Stub], places: dict[tuple[str, Shape], Place], paths: dict[Any, Any], file: str
) -> list[Entry]:
    found: list[Entry] = []
    problems: list[Problem] = []
    left = len(places)  # one list of pieces can be meant by many tensors, but each piece has a place of its own
    for name, record in listed.items():
        try:
            entry = _entry(name, record, places, _keys(paths.get(name), name), left)
        except (RefusedError, PiecesError) as problem:
            problems.append(Problem(f"{name[:200]}: {problem}", file, _SAVE))
            if len(problems) == MAX_PROBLEMS:
                break
        else:
            found.append(entry)
            left -= len(entry.chunks)
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return found


def _entry(name: str, record: Stub, places: dict[tuple[str, Shape], Place], path: tuple[str, ...], left: int) -> Entry:
    if "chunks" not in record.state:  # bytes: an object that is no tensor
        place = places.get((name, ()))
        if place is None:
            raise RefusedError("nothing says in which file it lies")
        return Entry(name, path, None, "", (Chunk(Box((), ()), place),))
    shape = _shape(record.state.get("size"), name)
    chunks = record.state["chunks"]
    if not isinstance(chunks, list) or len(chunks) > left:
        raise RefusedError("it has more pieces than there are places, or no list of them")
    boxes = [box for chunk in chunks for box in _box(chunk, name, len(shape))]
    if 0 not in shape:
        arrange(shape, boxes)
    missing = [box.start for box in boxes if (name, box.start) not in places]
    if missing:
        raise RefusedError(f"nothing says in which file {_of(name, missing[0])} lies")
    held = tuple(Chunk(box, places[name, box.start]) for box in boxes)
    return Entry(name, path, shape, _dtype(record.state.get("properties")), held if 0 not in shape else ())


def _box(chunk: object, name: str, dims: int) -> Iterator[Box]:
    """The block of a piece; none where the piece is empty, as on a rank that got no rows."""
    state = chunk.state if isinstance(chunk, Stub) else {}
    at, sizes = (_shape(state.get(key), name) for key in ("offsets", "sizes"))
    if len(at) != dims or len(sizes) != dims:
        raise RefusedError(f"one of its pieces has {len(at)} and {len(sizes)} dimensions, it has {dims}")
    if 0 not in sizes:
        yield box_of(at, sizes)


def _dtype(properties: Any) -> str:
    """The element type. The record pickles as a tuple that begins with it, or as a table."""
    state = properties.state if isinstance(properties, Stub) else {}
    packed = state.get("state")
    dtype = packed[0] if isinstance(packed, tuple) and packed else state.get("dtype")
    if type(dtype) is not str:
        raise RefusedError("nothing says of which type its values are")
    return dtype


def _keys(path: object, name: str) -> tuple[str, ...]:
    """The keys that led to an entry; without them its name is one."""
    known = isinstance(path, tuple) and path and all(type(key) in (str, int) for key in path)
    if not known:
        return (name,)
    if len(cast("tuple[Any, ...]", path)) > MAX_PATH:
        raise RefusedError("it lay in tables inside tables without end")
    return tuple(key_text(key) for key in cast("tuple[Any, ...]", path))
