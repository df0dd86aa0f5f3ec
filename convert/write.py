"""Carries a plan out: streams every tensor to its place, in bounded memory, and commits with one rename."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import xxhash

from ..errors import input_error, machine_error, usage_error
from ..mappings.lazy import Lazy
from ..mappings.ops import OpError
from .plan import Step
from .shards import Shard
from .sources import Files, lazy_source

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


def write_shard(shard: Shard, folder: Path, files: Files, progress: Progress) -> dict[str, str]:
    """Write one safetensors file and flush it to the disk. Returns the xxh3-128 of each tensor's bytes."""
    hashes: dict[str, str] = {}
    header = shard.header()
    with (folder / shard.file).open("xb", buffering=0) as out:
        with contextlib.suppress(OSError, AttributeError):  # a hint; not every file system takes it
            os.posix_fallocate(out.fileno(), 0, len(header) + shard.nbytes)
        _put(out.fileno(), memoryview(header))
        for entry in shard.entries:
            digest = xxhash.xxh3_128()
            value = lazy_targets(files, entry.step)[entry.index]
            if value.shape != entry.shape or value.dtype != entry.dtype:
                raise OpError(f"{entry.name} became {value.dtype} {list(value.shape)}, planned was {list(entry.shape)}")
            for block in value.blocks(BLOCK):
                view = block.reshape(-1).view("uint8").data
                digest.update(view)
                _put(out.fileno(), view)
                progress(len(view))
            hashes[entry.name] = digest.hexdigest()
        os.fsync(out.fileno())
    return hashes


def _put(descriptor: int, view: memoryview) -> None:
    """Write all of it: a single write may stop short (signals, nearly full disks)."""
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def committed(out: Path, *, force: bool, need: int) -> Generator[Path]:
    """A scratch folder beside ``out`` that becomes ``out`` by one rename, or vanishes if anything goes wrong.

    Raises MdlError: USAGE if ``out`` exists and is not to be replaced, MACHINE if the disk has not ``need`` bytes.
    """
    _tidy(out)
    _check_out(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < need:
        do = f"free {(need - free) / 1e9:.1f} GB there, or write to another disk"
        raise machine_error(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", str(out.parent), do)
    scratch = out.with_name(f"{out.name}.partial-{os.getpid()}")
    scratch.mkdir()
    try:
        yield scratch
        _sync(scratch)
        _swap(scratch, out)
        _sync(out.parent)
    except OSError as error:
        raise machine_error(f"writing failed: {error}", str(out)) from error
    except OpError as error:
        raise input_error(str(error), str(out)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_out(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise usage_error("exists already; nothing was written", str(out), "choose another name, or pass --force")
    if not (out / "mdl.json").is_file():
        raise usage_error(
            "--force only replaces what mdl wrote, and this holds no mdl.json", str(out), "remove it yourself"
        )


def _tidy(out: Path) -> None:
    """Clear up after runs that were killed. A layout that one of them had just set aside comes back."""
    for path in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        pid, _, aside = path.name.removeprefix(f"{out.name}.partial-").partition("-")
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if aside and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether another process has this id. Our own says nothing: in containers every run may have the same."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _swap(scratch: Path, out: Path) -> None:
    if out.exists():
        old = out.with_name(f"{out.name}.partial-{os.getpid()}-old")
        out.rename(old)
        try:
            scratch.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)  # the new layout is in place; the next run tries again
    else:
        scratch.rename(out)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
