"""What is known of a weight file that was written: kept beside it until the layout is whole, so that a run that was
ended in the middle, or one that runs on another machine, need not write it again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ..mappings.jsonable import numbers_back, strict_loads, to_json
from .check import hash_range
from .shards import Shard
from .values_seen import Values

SUFFIX = ".receipt.json"


def layout_in(work: Path) -> Path:
    """The folder below ``work`` that becomes the layout by one rename; receipts lie beside it, and stay behind."""
    return work / "layout"


class Written(Struct, frozen=True):
    """One tensor as it was written: the xxh3-128 of its bytes, and what its values look like."""

    name: str
    xxh3: str
    values: Values


def give_receipt(work: Path, shard: Shard, written: Mapping[str, Written], *, sync: bool) -> None:
    """Leave word that a file is whole. The word is there at once or not at all."""
    content = to_json({"file": shard.file, "tensors": [written[entry.name] for entry in shard.entries]})
    write_at_once(work / (shard.file + SUFFIX), content, sync=sync)


def write_at_once(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a small file beside its place, then rename it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    scratch.replace(path)


def receipt(work: Path, shard: Shard) -> list[Written] | None:
    """What a receipt says of a file, or None where there is none for these very tensors."""
    try:
        text = (work / (shard.file + SUFFIX)).read_text(encoding="utf-8")
        found = [_revived(one) for one in numbers_back(strict_loads(text))["tensors"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if [one.name for one in found] == [entry.name for entry in shard.entries] else None


def _revived(data: Mapping[str, Any]) -> Written:
    found: dict[str, Any] = dict(data["values"])
    found["first"] = found["first"] and tuple(found["first"])
    values = Values(**found)
    counts = (values.count, values.nan, values.inf, values.overflowed, values.flushed)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("not counts")
    return Written(str(data["name"]), str(data["xxh3"]), values)


def holds(work: Path, shard: Shard, written: Iterable[Written]) -> bool:
    """Whether a file's bytes are still those that its receipt tells of."""
    path, head = layout_in(work) / shard.file, shard.header()
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != len(head) + shard.nbytes or file.read(len(head)) != head:
                return False
            for entry, one in zip(shard.entries, written, strict=True):
                if hash_range(file, len(head) + entry.start, entry.stop - entry.start) != one.xxh3:
                    return False
    except OSError:
        return False
    return True
