"""The ways to carry a conversion out: in this process, on a Ray cluster, or as one of several parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ..errors import usage_error
from .commit import Say, os_problem
from .disk_speed import copy_rate
from .prepare import Prepared
from .run import FEWEST, Converted, convert
from .values_judged import STRICT, Allow
from .write import Progress

if TYPE_CHECKING:
    from .parts import Contributed, Part


class Mode(Struct, frozen=True):
    """How to copy. None of it changes a byte of what is written. With ``benchmark``, the disk's own speed is measured
    first."""

    workers: int | None = None
    sync: bool = True
    part: Part | None = None
    ray: bool = False
    benchmark: bool = False


def convert_in(
    mode: Mode,
    prepared: Prepared,
    out: Path,
    *,
    tokenizer: str | None = None,
    max_shard_size: int,
    force: bool = False,
    allow: Allow = STRICT,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> Converted | Contributed:
    """Convert as ``mode`` says. Other arguments, and what is raised, are those of :func:`.run.convert`.

    Raises MdlError (USAGE) also for a part that is to use Ray or to measure the disk.
    """
    if mode.part is not None:
        if mode.ray or mode.benchmark:
            raise usage_error(f"--part does not go with --{'ray' if mode.ray else 'benchmark'}", do="choose one")
        from .parts import convert_part

        return convert_part(
            prepared,
            out,
            mode.part,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            force=force,
            allow=allow,
            workers=mode.workers,
            sync=mode.sync,
            progress=progress,
        )
    writer = None
    if mode.ray:
        from .ray_tasks import ray_writer

        # Every thread is one of Ray's CPUs, and how many those machines have is not known here.
        writer = ray_writer(prepared, max_shard_size, mode.workers or FEWEST, sync=mode.sync)
    rate = _disk_rate(prepared, out, sync=mode.sync) if mode.benchmark else None
    done = convert(
        prepared,
        out,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        force=force,
        allow=allow,
        workers=mode.workers,
        sync=mode.sync,
        writer=writer,
        progress=progress,
        say=say,
    )
    return replace(done, disk_rate=rate)


def _disk_rate(prepared: Prepared, out: Path, *, sync: bool) -> float:
    """Bytes per second of a plain copy from where the checkpoint lies to where the layout will."""
    prepared.plan.refuse()
    above = next((one for one in out.absolute().parents if one.is_dir()), Path("/"))
    try:
        largest = max(map(Path, prepared.inventory.files), key=lambda file: file.stat().st_size)
        return copy_rate(largest, above / out.name, sync=sync)
    except OSError as error:
        raise os_problem(error, out) from error
