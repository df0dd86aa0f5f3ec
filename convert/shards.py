"""Which target tensor goes into which safetensors file, and where in it."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from itertools import accumulate

from msgspec import Struct

from ..errors import usage_error
from ..mappings.tensors import ITEMSIZE, Shape
from .plan import Plan, Step

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
PAGE = 4096
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Entry(Struct, frozen=True):
    """One target tensor in a file: output ``index`` of ``step``, at [start, stop) of the file's data part."""

    name: str
    shape: Shape
    dtype: str
    step: Step
    index: int
    start: int
    stop: int


class Shard(Struct, frozen=True):
    """One safetensors file to write."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.entries[-1].stop if self.entries else 0

    def header(self) -> bytes:
        """The file's first bytes: length, then JSON padded with spaces, so that the data begins at a page of memory and
        most tensors do too: maps, and reads past the cache, like that."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for e in self.entries:
            offsets = [e.start, e.stop]
            table[e.name] = {"dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": offsets}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % PAGE)
        return len(text).to_bytes(8, "little") + text


def parse_size(text: str) -> int:
    """Bytes from text such as ``5GB``, ``500MiB`` or ``1000000``. Raises MdlError (USAGE)."""
    digits = text.strip().rstrip("BbKkMmGgTtIi")
    unit = text.strip()[len(digits) :].upper()
    try:
        size = int(float(digits) * _UNITS[unit.removesuffix("B")])
    except (ValueError, KeyError, OverflowError):
        raise usage_error(f"{text!r} is not a size", do="write it like 5GB, 500MB or 2GiB") from None
    if size <= 0:
        raise usage_error(f"{text!r}: a size must be positive")
    return size


def assign(plan: Plan, limit: int) -> tuple[Shard, ...]:
    """As few files of at most ``limit`` bytes as the plan's order allows, of nearly the same size: whoever writes them
    side by side, or loads them so, finishes together. A larger tensor gets a file of its own."""
    content = [
        (name, shape, step, k)
        for step in plan.writes
        for k, (name, shape) in enumerate(zip(step.targets, step.shapes, strict=True))
    ]
    ends = list(accumulate(math.prod(shape) * ITEMSIZE[step.dtype] for _, shape, step, _ in content))
    cuts = _even_cuts(ends, limit)
    return tuple(_shard(k, len(cuts), content[slice(*cut)]) for k, cut in enumerate(cuts))


def _even_cuts(ends: list[int], limit: int) -> list[tuple[int, int]]:
    """[start, stop) of each file, for tensors that end at these bytes: the fewest, then the smallest largest one."""
    most = _cuts(ends, limit)
    low, high = (ends[-1] if ends else 0) // len(most), limit
    while high - low > limit >> 10:
        middle = (low + high) // 2
        cuts = _cuts(ends, middle)
        if len(cuts) > len(most):
            low = middle
        else:
            most, high = cuts, middle
    return most


def _cuts(ends: list[int], limit: int) -> list[tuple[int, int]]:
    """Files filled one after the other."""
    cuts: list[tuple[int, int]] = []
    at = 0
    while at < len(ends):
        begun = ends[at - 1] if at else 0
        stop = max(bisect_right(ends, begun + limit, at), at + 1)
        cuts.append((at, stop))
        at = stop
    return cuts or [(0, 0)]


def _shard(k: int, count: int, content: list[tuple[str, Shape, Step, int]]) -> Shard:
    entries: list[Entry] = []
    at = 0
    # Wide types first: every tensor then starts at a multiple of its element size, which readers rely on.
    for name, shape, step, index in sorted(content, key=lambda item: -ITEMSIZE[item[2].dtype]):
        size = math.prod(shape) * ITEMSIZE[step.dtype]
        entries.append(Entry(name, shape, step.dtype, step, index, at, at + size))
        at += size
    file = "model.safetensors" if count == 1 else f"model-{k + 1:05d}-of-{count:05d}.safetensors"
    return Shard(file, tuple(entries))


def index_json(shards: tuple[Shard, ...]) -> str:
    """model.safetensors.index.json: which file holds which tensor."""
    names = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(shard.nbytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n"
