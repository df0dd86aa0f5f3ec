"""Carries a plan out: streams every tensor to its place, in bounded memory, and looks at every value on the way."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import xxhash

from ..mappings.lazy import Array, Lazy
from ..mappings.ops import OpError
from ..mappings.scratch import Scratch
from .file_cache import Calls, call_size
from .plan import Step
from .receipts import Written, give_receipt, layout_in
from .shards import Entry, Shard
from .sources import lazy_source
from .stored import Files
from .values_seen import Seen

BLOCK = 1 << 20
"""Bytes handled at a time. Larger blocks leave the CPU's cache and gain nothing where they are only moved."""
WORKED = 2 << 20
"""The same where values are turned or computed, which takes many calls for each block: between two of them threads hand
Python's lock to each other, which takes as long as some of the calls (:data:`mdl.mappings.rounding.TILE`)."""

TURNED = 32 << 20
"""Bytes of matrices that are turned, handled at a time by all threads together: what isn't handled at once has to
be read again."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written, from any thread."""


def lazy_targets(files: Files, step: Step) -> list[Lazy]:
    """The values of each target of a step, not yet read."""
    if step.kind == "fill":
        return [Lazy.zeros(shape, step.dtype) for shape in step.shapes]
    values = [lazy_source(files, source) for source in step.sources]
    for op in step.ops:
        values = op.apply(values)
    return [value.cast(step.dtype) for value in values]


def write_shards(
    shards: Sequence[Shard],
    work: Path,
    files: Files,
    *,
    workers: int = 1,
    sync: bool = True,
    bypass: bool = False,
    progress: Progress,
) -> dict[str, list[Written]]:
    """Write safetensors files, a tensor at a time by each of ``workers`` threads. A file appears in the layout below
    ``work`` when it is whole and, with ``sync``, on the disk; then its receipt is laid beside that. ``bypass`` keeps it
    out of the file cache.

    What can't be finished vanishes. Raises whatever stopped the first thread that was stopped.
    """
    calls = Calls(bypass=bypass, most=call_size(sum(shard.nbytes for shard in shards)))
    queue = _Queue(files, [_Open(shard, work, sync, calls) for shard in shards], TURNED // workers, progress)
    try:
        if workers == 1:
            queue.run()
        else:
            _in_threads(queue, workers)
    finally:
        queue.drop()
    return {one.shard.file: [one.written[entry.name] for entry in one.shard.entries] for one in queue.outputs}


def _in_threads(queue: _Queue, workers: int) -> None:
    pool = ThreadPoolExecutor(workers, "mdl-write")
    try:
        wait([pool.submit(queue.run) for _ in range(workers)])
    finally:
        queue.stopped = True  # the signal that ends this thread ends the others after their block
        _ended(pool)
    if queue.failed is not None:
        raise queue.failed


def _ended(pool: ThreadPoolExecutor) -> None:
    """Wait for the threads, whatever comes: what they write into is closed afterwards."""
    while True:
        try:
            pool.shutdown()
        except KeyboardInterrupt:
            continue
        return


class _Open:
    """A weight file on its way: written under a name that no other run uses. ``busy`` threads write it, and ``todo``
    nobody has taken yet."""

    def __init__(self, shard: Shard, work: Path, sync: bool, calls: Calls) -> None:
        self.shard, self.work, self.sync, self.calls = shard, work, sync, calls
        self.path = work / f".{shard.file}.{os.getpid()}-{os.urandom(4).hex()}"
        self.head = shard.header()
        self.written: dict[str, Written] = {}
        self.todo = deque(shard.entries)
        self.busy = 0
        self.descriptor = -1

    def open(self) -> None:
        """Make the file, with its header."""
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _reserve(self.descriptor, len(self.head) + self.shard.nbytes)
        self.put(memoryview(self.head), 0)

    def put(self, view: memoryview, at: int) -> None:
        """Write all of it: a single write stops at what the kernel is given at a time, or short of that (signals,
        nearly full disks)."""
        while view:
            written = self.calls.write(self.descriptor, view, at)
            view, at = view[written:], at + written

    def finish(self) -> None:
        """Give the whole file its name."""
        if self.sync:
            os.fsync(self.descriptor)
        self.close()
        self.path.rename(layout_in(self.work) / self.shard.file)
        give_receipt(self.work, self.shard, self.written, sync=self.sync)

    def close(self) -> None:
        """Close it, if it is open."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class _Queue:
    """The tensors still to be written, for several threads to take from."""

    def __init__(self, files: Files, outputs: list[_Open], turned: int, progress: Progress) -> None:
        self.outputs = outputs
        self.stopped = False
        self.failed: BaseException | None = None
        self._files, self._turned, self._progress = files, turned, progress
        self._left = list(outputs)
        self._lock = threading.Lock()

    def run(self) -> None:
        """Take tensors and write them until there are none, or until a thread fails."""
        room = Scratch()
        try:
            while (job := self._take()) is not None:
                output, entry = job
                written = self._write(entry, output, room)
                if written is not None and self._last(output, written):
                    output.finish()
        except BaseException as error:
            self.failed = self.failed or error
            self.stopped = True
            raise

    def drop(self) -> None:
        """Remove what is not finished."""
        for output in self.outputs:
            output.close()
            with suppress(OSError):
                output.path.unlink(missing_ok=True)

    def _take(self) -> tuple[_Open, Entry] | None:
        """A tensor of the first file that the fewest threads write: the kernel lets one write a file at a time."""
        with self._lock:
            if self.stopped or not self._left:
                return None
            output = next((one for one in self._left if not one.busy), None) or min(self._left, key=lambda o: o.busy)
            entry = output.todo.popleft()
            if not output.todo:
                self._left.remove(output)
            if output.descriptor < 0:
                output.open()
            output.busy += 1
            return output, entry

    def _last(self, output: _Open, written: Written) -> bool:
        with self._lock:
            output.busy -= 1
            output.written[written.name] = written
            return len(output.written) == len(output.shard.entries)

    def _write(self, entry: Entry, output: _Open, room: Scratch) -> Written | None:
        digest, seen = xxhash.xxh3_128(), Seen(entry.shape, entry.dtype)
        value = lazy_targets(self._files, entry.step)[entry.index].watched(seen.rounded)
        if value.shape != entry.shape or value.dtype != entry.dtype:
            raise OpError(f"{entry.name} became {value.dtype} {list(value.shape)}, planned was {list(entry.shape)}")
        at = len(output.head) + entry.start
        size = WORKED if value.node.computed or value.node.turned else BLOCK
        for block in value.blocks(size, room, self._turned):
            for piece in _in_cache(block.reshape(-1), size):
                if self.stopped:
                    return None
                view = memoryview(piece.view("uint8").data)
                seen.feed(piece)
                digest.update(view)
                output.put(view, at)
                at += len(view)
                self._progress(len(view))
        return Written(entry.name, digest.hexdigest(), seen.result())


def _in_cache(block: Array, size: int) -> Iterator[Array]:
    """A block in pieces of ``size`` bytes, which stay near the CPU while they are looked at, hashed and written."""
    count = size // block.itemsize
    return (block[at : at + count] for at in range(0, block.size, count))


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
