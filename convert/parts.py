"""`mdl convert --part i/n`: several runs, on one machine or many, each write their share of one layout's files.

No run talks to another. What they share is a folder: the agreement says what is being written there, a receipt beside
each weight file says that it is whole, and whoever finds all receipts there in the end makes the layout of them. A
part may be killed, retried, or run twice at the same time: it writes the same bytes under the same names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ..errors import MdlError, machine_error, usage_error
from .agreement import Agreement, agree
from .commit import (
    AlreadyMadeError,
    Terms,
    begin_work,
    check_out,
    check_room,
    check_work,
    clear,
    finished,
    is_private,
    os_problem,
    real_place,
    work_path,
)
from .finish import Request, pair_up, tokenizer_made
from .locks import claimed, shared
from .prepare import Prepared
from .receipts import holds
from .run import SLACK, Converted, Writer, carry_out, requested, threads
from .shards import Shard, assign
from .values_judged import STRICT, Allow, judge
from .write import Progress


class Part(Struct, frozen=True):
    """The ``number``-th of ``count`` shares, counted from 1."""

    number: int
    count: int

    def share(self, shards: Sequence[Shard]) -> list[Shard]:
        """This part's files: the largest first, each to the part that has the least so far."""
        loads = [0] * self.count
        mine: list[Shard] = []
        for shard in sorted(shards, key=lambda one: -one.nbytes):
            least = loads.index(min(loads))
            loads[least] += shard.nbytes
            if least == self.number - 1:
                mine.append(shard)
        return mine


class Contributed(Struct, frozen=True):
    """What a part did that was not the last one: the files it wrote, and those that are still missing."""

    out: str
    part: int
    parts: int
    files: tuple[str, ...]
    nbytes: int
    seconds: float
    missing: tuple[str, ...]


def parse_part(text: str) -> Part:
    """A part from text such as ``3/8``. Raises MdlError (USAGE)."""
    number, _, count = text.partition("/")
    do = "write --part 3/8 for the third of eight; a SLURM array counts from 1 with --array=1-8"
    if not (number.isdecimal() and count.isdecimal() and len(text) <= 12):
        raise usage_error(f"--part {text}: expected NUMBER/COUNT", do=do)
    part = Part(int(number), int(count))
    if not 1 <= part.number <= part.count:
        raise usage_error(f"--part {text}: parts are counted from 1 to {part.count}", do=do)
    return part


def convert_part(
    prepared: Prepared,
    out: Path,
    part: Part,
    *,
    tokenizer: str | None = None,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    allow: Allow = STRICT,
    workers: int | None = None,
    sync: bool = True,
    progress: Progress = lambda _: None,
) -> Converted | Contributed:
    """Write one part's files; whoever is the last makes the layout. Arguments are those of :func:`.run.convert`.

    Raises MdlError: USAGE if ``out`` exists and holds something else, MACHINE if something else is being written there.
    """
    begin, named = time.perf_counter(), str(out)
    out = real_place(out)
    request = requested(prepared, out, tokenizer=tokenizer, allow=allow, sync=sync)
    writer = threads(prepared, workers, sync=sync)
    with tokenizer_made(request) as beside:
        agreement = agree(prepared, assign(prepared.plan, max_shard_size), beside.digest)
        mine = part.share(agreement.shards)
        try:
            there = os.path.lexists(out)  # asked first: what appears from here on is made by another part
            if agreement.is_made(out):
                return replace(_late(out, part, agreement, begin), out=named)
            if there:
                check_out(out, force)
            copied = _write(out, mine, agreement, request, writer, progress)
        except OSError as error:
            raise os_problem(error, out) from error
        state = replace(_state(out, part, mine, agreement, copied, begin), out=named)
        if state.missing:
            return state
        terms = Terms(force=force, need=prepared.plan.nbytes + SLACK, sync=sync, last=True)
        try:
            made = carry_out(request, out, terms, agreement, beside, writer)
        except AlreadyMadeError:
            return state
    others = tuple(file for file in made.resumed if file not in state.files)
    return replace(made, out=named, copied=copied, seconds=time.perf_counter() - begin, resumed=others)


def _late(out: Path, part: Part, agreement: Agreement, begin: float) -> Contributed:
    """The layout is there already. What a killed run left beside it goes, if nobody else is here."""
    with contextlib.suppress(MdlError), claimed(out):
        clear(out)
    return _state(out, part, [], agreement, 0, begin)


def _state(out: Path, part: Part, mine: list[Shard], agreement: Agreement, copied: int, begin: float) -> Contributed:
    here = finished(work_path(out), agreement)
    missing = tuple(shard.file for shard in agreement.shards if shard.file not in here)
    if missing and agreement.is_made(out):  # asked last: another part may have made it in between
        missing = ()
    names = tuple(shard.file for shard in mine)
    return Contributed(str(out), part.number, part.count, names, copied, time.perf_counter() - begin, missing)


def _write(
    out: Path, mine: list[Shard], agreement: Agreement, request: Request, writer: Writer, progress: Progress
) -> int:
    """Write this part's files, but for those that are there and hold what their receipts say; how many bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with shared(out):
        if agreement.is_made(out):  # this part ran twice, and the layout was made meanwhile
            return 0
        work = work_path(out)
        _join(work, agreement)
        there = finished(work, agreement)
        kept = {one.file: there[one.file] for one in mine if one.file in there and holds(work, one, there[one.file])}
        progress(sum(shard.nbytes for shard in mine if shard.file in kept))
        missing = [shard for shard in mine if shard.file not in kept]
        copied = sum(shard.nbytes for shard in missing)
        check_room(out, copied + SLACK)
        written = {**kept, **writer(missing, work, progress)}
        judge(((entry, one.values) for _, entry, one in pair_up(tuple(mine), written)), request.allow)
        return copied


def _join(work: Path, agreement: Agreement) -> None:
    """Make the folder, or see that what is being written there is the same. Several may try at the same time."""
    begun = work.with_name(f".{work.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        begin_work(begun, agreement)
        begun.rename(work)  # refused where there is one that is not empty
    except OSError:
        if not work.is_dir():
            raise
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    check_work(work)
    if not (is_private(work) and agreement.stands_in(work, whole=True)):
        what = "something else is being written here, or was: another checkpoint, another mdl, or with other options"
        do = f"give every part the same checkpoint and options; if nothing is running, remove {work.name}"
        raise machine_error(what, str(work), do)
