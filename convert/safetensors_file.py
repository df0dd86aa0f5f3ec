"""Reads the headers of safetensors files and the index of a sharded folder. Strict: a header that lies is refused."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Map
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import msgspec

from ..errors import COPY_AGAIN, Kind, MdlError, Problem, input_error
from ..mappings.tensors import ITEMSIZE, MAX_DIMS, TensorInfo, dense
from .sniff import MAX_HEADER
from .strict_json import read_json

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
"""The format's element types and torch's names of them."""
_MAX_INDEX = 64 << 20
_INT = frozenset((int,))


def read_safetensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, in the order of their bytes, and the file's metadata.

    Every tensor is contiguous; ``storage`` is its own name, for the format knows no shared memory. Raises MdlError
    (INPUT) with all problems of the header at once.
    """
    file = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the name of the file
    with path.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else total
        if total - 8 < length <= MAX_HEADER:
            what = f"this safetensors file ends inside its header: that has {length:,} bytes, the whole file {total:,}"
            raise input_error(what, file, COPY_AGAIN)
        if not 2 <= length <= min(MAX_HEADER, total - 8):
            raise input_error("the length of this safetensors header is out of bounds", file, COPY_AGAIN)
        header = stream.read(length)
    alone = _without_doubles(header)
    if alone is not None:
        with suppress(MdlError):  # whatever is amiss, the strict reader says it
            return _read(alone, [], file, 8 + length, total)
    del alone
    return _read(*_parse(header, file), file, 8 + length, total)


def _read(
    entries: dict[str, Any], doubled: list[str], file: str, base: int, total: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    problems = [Problem(f"the name {name} occurs twice in the header", file) for name in doubled]
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(Problem("__metadata__ is not a table of strings", file))
        metadata = {}
    found = sorted(_tensors(entries, file, base, problems), key=itemgetter(0, 1))
    if not problems:
        _check_layout(found, base, total, file, problems)
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return {tensor.name: tensor for _, _, tensor in found}, cast("dict[str, str]", metadata)


def _parse(header: bytes, file: str) -> tuple[dict[str, Any], list[str]]:
    doubled: list[str] = []

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            doubled.extend(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        return made

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=table)
    except (ValueError, RecursionError) as error:
        raise input_error(f"this safetensors header is not JSON ({error})", file, COPY_AGAIN) from None
    if not isinstance(entries, dict):
        raise input_error("this safetensors header is not a table", file, COPY_AGAIN)
    return cast("dict[str, Any]", entries), doubled


def _without_doubles(header: bytes) -> dict[str, Any] | None:
    """The table, read in a third of the time, if it is certain that no name occurs twice in it: then the header has no
    quotation marks but those of its entries, of five texts each. What does not read so is left to the strict reader."""
    found: Any = None
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        found = msgspec.json.decode(header)
    if not isinstance(found, dict):
        return None
    entries = cast("dict[str, Any]", found)
    metadata = entries.get("__metadata__", ())
    texts = 1 + 2 * len(cast("dict[Any, Any]", metadata)) if isinstance(metadata, dict) else 0
    texts += 5 * (len(entries) - ("__metadata__" in entries))
    return entries if header.count(b'"') == 2 * texts else None


def _whole(values: object) -> list[int] | None:
    """The list if it holds a few whole numbers ≥ 0 of 63 bits only: a product of more could take very long."""
    if (
        isinstance(values, list)
        and len(values) <= MAX_DIMS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in values)
    ):
        return cast("list[int]", values)
    return None


_Placed = tuple[int, int, TensorInfo]
"""Where a tensor begins in the file, how many bytes it has, and what is known of it."""


def _tensors(entries: Map[str, Any], file: str, base: int, problems: list[Problem]) -> Iterator[_Placed]:
    """The tensors of a header's entries. Layers are alike: what a type and a shape say is looked at once."""
    known: dict[tuple[Any, ...], tuple[TensorInfo, int]] = {}
    for name, entry in entries.items():
        key, begin, end = _at_a_glance(entry)
        like, nbytes = known.get(key, (None, 0))
        if like is not None and begin >= 0 and end - begin == nbytes and end < 1 << 63:
            at = base + begin
            made = TensorInfo(name, like.shape, like.dtype, file, at, like.stride, f"{file}:{name}", 0, name)
            yield at, nbytes, made
        elif tensor := _tensor(name, entry, file, base, problems):
            yield tensor.offset, tensor.nbytes, tensor
            if key and tensor.nbytes == end - begin:
                known[key] = tensor, tensor.nbytes


def _at_a_glance(entry: Any) -> tuple[tuple[Any, ...], int, int]:
    """Type and shape of an entry, and its offsets; nothing and zeros of one that has other things in it, or others."""
    if isinstance(entry, dict) and len(entry) == 3:
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2:
            begin, end = offsets
            # 8.0 and true would be equal to 8 and 1
            if type(begin) is type(end) is int and _INT.issuperset(map(type, shape)):
                return (dtype, *shape), begin, end
    return (), 0, 0


def _tensor(name: str, entry: object, file: str, base: int, problems: list[Problem]) -> TensorInfo | None:
    table = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    shape, offsets = _whole(table.get("shape")), _whole(table.get("data_offsets"))
    if set(table) != {"dtype", "shape", "data_offsets"} or shape is None or offsets is None or len(offsets) != 2:
        problems.append(Problem(f"the header's entry of {name} is not a dtype, a shape and two offsets", file))
        return None
    dtype = DTYPES.get(str(table["dtype"]))
    if dtype is None:
        problems.append(Problem(f"{name} has the unknown dtype {str(table['dtype'])[:40]!r}", file))
        return None
    begin, end = offsets
    needed = math.prod(shape) * ITEMSIZE[dtype]
    if end - begin != needed:
        problems.append(
            Problem(f"{name} {dtype} {shape} needs {needed:,} bytes, the header gives {end - begin:,}", file)
        )
    size = tuple(shape)
    return TensorInfo(name, size, dtype, file, base + begin, dense(size), f"{file}:{name}", raw=name)


def _check_layout(found: Iterable[_Placed], base: int, total: int, file: str, problems: list[Problem]) -> None:
    """The format demands that the tensors fill the file behind the header without gaps or overlaps."""
    position = base
    for begin, nbytes, tensor in found:
        if begin != position:
            kind = "a gap before" if begin > position else "another tensor in the bytes of"
            problems.append(Problem(f"the header leaves {kind} {tensor.name}", file, COPY_AGAIN))
        position = begin + nbytes
    if position != total:
        problems.append(
            Problem(f"by its header this file ends at byte {position:,}, but it has {total:,}", file, COPY_AGAIN)
        )


def read_shards(index: Path) -> tuple[dict[str, str], list[Path]]:
    """The ``weight_map`` of a ``*.index.json`` (tensor name to file name) and the shards' paths, sorted.

    Raises MdlError (INPUT) with every missing shard and every name or link that leads out of the folder.
    """
    try:
        content = read_json(index, limit=_MAX_INDEX)
    except ValueError as error:
        raise input_error(f"this index can't be read ({error})", str(index), COPY_AGAIN) from None
    entries: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise input_error("this index has no weight_map of tensor names to file names", str(index), COPY_AGAIN)
    weight_map = cast("dict[str, str]", entries)
    shards = sorted(set(weight_map.values()))
    # A hub's cache keeps the files of a folder elsewhere, but the index in the same place as the shards.
    homes = (index.parent.resolve(), index.resolve().parent)
    problems: list[Problem] = []
    for shard in shards:
        if not shard or shard in (".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            problems.append(Problem(f"the index names a file outside its folder: {shard!r}", str(index)))
        elif not (index.parent / shard).is_file():
            problems.append(Problem(f"the shard {shard} is missing", str(index.parent), "download it again"))
        elif (index.parent / shard).resolve().parent not in homes:
            problems.append(
                Problem(
                    f"{shard} is a link to {(index.parent / shard).resolve()}, outside the folder of its index",
                    str(index),
                    "put the shard itself there, or give the folder where all files of this checkpoint really lie",
                )
            )
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return weight_map, [index.parent / shard for shard in shards]


def check_index(index: Path, weight_map: dict[str, str], held: dict[str, list[str]]) -> None:
    """Raise MdlError (INPUT) with every difference between an index and the shards.

    ``held`` maps each tensor name to the names of the files whose headers hold it.
    """
    problems: list[Problem] = []
    for name in sorted(weight_map.keys() | held.keys()):
        named, files = weight_map.get(name), held.get(name, [])
        if len(files) > 1:
            problems.append(Problem(f"{name} is in several shards: {', '.join(files)}", str(index)))
        elif named is None:
            problems.append(Problem(f"{name} is in {files[0]} but not in the index", str(index)))
        elif named not in files:
            place = f"it is in {files[0]}" if files else "no shard holds it"
            problems.append(Problem(f"the index says that {name} is in {named}, but {place}", str(index)))
    if problems:
        raise MdlError(Kind.INPUT, problems)


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder with ``model.safetensors.index.json``. Raises MdlError (INPUT), all problems at once."""
    index = folder / "model.safetensors.index.json"
    weight_map, shards = read_shards(index)
    tensors: dict[str, TensorInfo] = {}
    held: dict[str, list[str]] = {}
    for shard in shards:
        for name, tensor in read_safetensors(shard)[0].items():
            tensors[name] = tensor
            held.setdefault(name, []).append(shard.name)
    check_index(index, weight_map, held)
    return tensors
