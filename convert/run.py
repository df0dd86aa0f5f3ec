"""`mdl convert`: a prepared checkpoint becomes a layout on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ..errors import usage_error
from .agreement import Agreement, agree
from .commit import Say, Terms, Workplace, committed, finished, flush
from .file_cache import too_large
from .finish import Beside, Request, choose_tokenizer, finish, tokenizer_made
from .machine import cores
from .manifest import Manifest
from .prepare import Prepared
from .receipts import Written, holds
from .shards import Shard, assign
from .stored import Files
from .tokenizer import TokenizerInfo
from .values_judged import STRICT, Allow
from .write import Progress, write_shards

SLACK = 64 << 20
"""Bytes for what lies beside the weights: tokenizer, config, file system blocks."""

FEWEST, MOST = 2, 4
"""Threads that copy unless more or fewer are asked for. While one waits for the disk, another reads, on a single core,
too; more than four are held up by the memory and by the files that they write. Each needs a few MB."""

Writer = Callable[[Sequence[Shard], Path, Progress], dict[str, list[Written]]]
"""Writes some of the weight files, into the folder of work that it is given."""


class Converted(Struct, frozen=True):
    """What a conversion did: ``copied`` of the weights' ``nbytes``. ``resumed`` names the weight files that an earlier
    run or another part had finished; ``disk_rate`` is what a plain copy did per second, if that was asked."""

    out: str
    manifest: Manifest
    tokenizer: TokenizerInfo
    files: tuple[str, ...]
    nbytes: int
    copied: int
    seconds: float
    resumed: tuple[str, ...] = ()
    disk_rate: float | None = None


def convert(
    prepared: Prepared,
    out: Path,
    *,
    tokenizer: str | None = None,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    allow: Allow = STRICT,
    workers: int | None = None,
    sync: bool = True,
    writer: Writer | None = None,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> Converted:
    """Write the layout. Raises MdlError; on any failure nothing is left at ``out``.

    ``tokenizer`` is a path, ``none``, or None for "the one beside the checkpoint, if there is exactly one". ``allow``
    says which broken values may be written. ``workers`` threads copy, one per core (:data:`FEWEST` to :data:`MOST`) if
    that is None; without ``sync``, a power cut may lose files that seemed written. ``writer`` writes the weight files
    in place of those threads. ``progress`` is called with the bytes written since the last call, from any thread;
    ``say`` with what a run that fails leaves for the next one.
    """
    begin = time.perf_counter()
    request = requested(prepared, out, tokenizer=tokenizer, allow=allow, sync=sync)
    writer = writer or threads(prepared, workers, sync=sync)
    with tokenizer_made(request) as beside:
        agreement = agree(prepared, assign(prepared.plan, max_shard_size), beside.digest)
        terms = Terms(force=force, need=prepared.plan.nbytes + SLACK, sync=sync)
        done = carry_out(request, out, terms, agreement, beside, writer, progress, say)
    return replace(done, seconds=time.perf_counter() - begin)


def carry_out(
    request: Request,
    out: Path,
    terms: Terms,
    agreement: Agreement,
    beside: Beside,
    writer: Writer,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> Converted:
    """Write what is not there yet, and make the layout. The last of several parts takes what the others finished by
    its receipts, without hashing it again.

    Raises MdlError, and AlreadyMadeError where another part was the last.
    """
    begin = time.perf_counter()
    with committed(out, terms, agreement, say) as place:
        kept = _kept(place, agreement, terms, progress)
        missing = [shard for shard in agreement.shards if shard.file not in kept]
        written = {**kept, **writer(missing, place.work, progress)}
        layout = finish(request, agreement, written, beside, place)
    seconds = time.perf_counter() - begin
    copied = sum(shard.nbytes for shard in missing)
    total = request.prepared.plan.nbytes
    return Converted(str(out), layout.manifest, beside.info, layout.files, total, copied, seconds, tuple(kept))


def threads(prepared: Prepared, workers: int | None, *, sync: bool) -> Writer:
    """A writer that works in threads of this process."""
    workers = workers or min(max(cores(), FEWEST), MOST)
    bypass = too_large(prepared.inventory.files, prepared.plan.nbytes, sync=sync)

    def write(shards: Sequence[Shard], work: Path, progress: Progress) -> dict[str, list[Written]]:
        with Files(bypass=bypass) as files:
            return write_shards(shards, work, files, workers=workers, sync=sync, bypass=bypass, progress=progress)

    return write


def requested(prepared: Prepared, out: Path, *, tokenizer: str | None, allow: Allow, sync: bool) -> Request:
    """What is to be made, after everything that can be refused before a byte is written."""
    prepared.plan.refuse()
    _keep_source(prepared.inventory.files, out)
    source, notes = choose_tokenizer(prepared.checkpoint, tokenizer)
    return Request(prepared, source, (*notes, *prepared.inventory.remarks), allow, sync)


def _keep_source(files: tuple[str, ...], out: Path) -> None:
    """Raise MdlError (USAGE) if the checkpoint lies in the folder that ``--force`` would replace."""
    inside = next((file for file in files if Path(file).resolve().is_relative_to(out.resolve())), None)
    if inside is not None and out.is_dir():
        raise usage_error("holds the checkpoint itself, which would be lost", str(out), "choose another name")


def _kept(place: Workplace, agreement: Agreement, terms: Terms, progress: Progress) -> dict[str, list[Written]]:
    """The weight files that an earlier run finished and whose bytes still have their hashes."""
    there = finished(place.work, agreement) if place.resumed else {}
    kept: dict[str, list[Written]] = {}
    for shard in agreement.shards:
        written = there.get(shard.file)
        if written is not None and (terms.last or holds(place.work, shard, written)):
            if terms.sync:  # it may have been written by a run that did not wait for the disk
                flush(place.layout / shard.file)
            kept[shard.file] = written
            progress(shard.nbytes)
    return kept
