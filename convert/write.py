"""Carries a plan out: streams every tensor to its place, in bounded memory, and looks at every value on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..mappings.lazy import Lazy
from ..mappings.ops import OpError
from .plan import Step
from .shards import Entry, Shard
from .sources import Files, lazy_source
from .values_seen import Seen, Values

BLOCK = 4 << 20
"""Bytes handled at a time. Larger blocks leave the CPU's cache and gain nothing."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


def lazy_targets(files: Files, step: Step) -> list[Lazy]:
    """The values of each target of a step, not yet read."""
    if step.kind == "fill":
        return [Lazy.zeros(shape, step.dtype) for shape in step.shapes]
    values = [lazy_source(files, source) for source in step.sources]
    for op in step.ops:
        values = op.apply(values)
    return [value.cast(step.dtype) for value in values]


@dataclass(frozen=True)
class Written:
    """One tensor as it was written: the xxh3-128 of its bytes, and what its values look like."""

    entry: Entry
    xxh3: str
    values: Values


def write_shard(shard: Shard, folder: Path, files: Files, progress: Progress) -> list[Written]:
    """Write one safetensors file and flush it to the disk."""
    header = shard.header()
    with (folder / shard.file).open("xb", buffering=0) as out:
        _reserve(out.fileno(), len(header) + shard.nbytes)
        _put(out.fileno(), memoryview(header))
        written = [_write_tensor(entry, out.fileno(), files, progress) for entry in shard.entries]
        os.fsync(out.fileno())
    return written


def _write_tensor(entry: Entry, descriptor: int, files: Files, progress: Progress) -> Written:
    digest, seen = xxhash.xxh3_128(), Seen(entry.shape, entry.dtype)
    value = lazy_targets(files, entry.step)[entry.index].watched(seen.rounded)
    if value.shape != entry.shape or value.dtype != entry.dtype:
        raise OpError(f"{entry.name} became {value.dtype} {list(value.shape)}, planned was {list(entry.shape)}")
    for block in value.blocks(BLOCK):
        view = block.reshape(-1).view("uint8").data
        seen.feed(block)
        digest.update(view)
        _put(descriptor, view)
        progress(len(view))
    return Written(entry, digest.hexdigest(), seen.result())


def _reserve(descriptor: int, nbytes: int) -> None:
    """Ask for the whole file at once, so that a full disk is told before an hour of copying. Not every file system
    takes the hint."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except AttributeError:
        return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _put(descriptor: int, view: memoryview) -> None:
    """Write all of it: a single write may stop short (signals, nearly full disks)."""
    while view:
        view = view[os.write(descriptor, view) :]
