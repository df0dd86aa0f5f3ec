"""What `mdl inspect` shows: what lies in a checkpoint, and whose it is if that can be told."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import render
from .errors import Kind, MdlError
from .mappings.jsonable import Each
from .mappings.tensors import ITEMSIZE

if TYPE_CHECKING:
    from .archs.base import Dims, Inventory
    from .convert.prepare import Options, Recognised
    from .mappings.tensors import TensorInfo

SWITCHES = 5
"""Yes or no with one and the same reason: from this many on they are one line."""
ROWS = 100
"""Lines of the list of tensors: those of a checkpoint of any number of layers are fewer."""


def inspect(path: Path, options: Options, *, json: bool) -> None:
    """`mdl inspect`: print what is known. Where something is lacking, what lies in the files is shown all the same, and
    then the MdlError is raised that says what."""
    from .convert.prepare import recognise

    try:
        recognised = recognise(path, options)
    except MdlError as error:
        if not json and error.kind is Kind.INPUT:
            show_files(path, options)
        raise
    render.answer(json, lambda: inspection(recognised), lambda: show_inspection(recognised))


def show_files(path: Path, options: Options) -> None:
    """The tensors of a checkpoint that nobody recognised yet; nothing if the files can't be read either."""
    from .convert.inventory import take_inventory
    from .convert.open import open_checkpoint

    try:
        inventory = take_inventory(open_checkpoint(path), weights=options.weights)
    except MdlError:
        return
    settings = [f"{key}: {_short(value)}" for key, value in inventory.extras.items()]
    lines = [_checkpoint(inventory), ("beside", settings or ("no settings",)), _notes(inventory)]
    console = render.out()
    render.show_facts(lines)
    console.print()
    rows = list(_alike(inventory))
    made = render.table("tensors", "shape", "type")
    for row in rows[:ROWS]:
        made.add_row(*row)
    console.print(made)
    if len(rows) > ROWS:
        console.print(render.text(f"and {len(rows) - ROWS} more lines"))
    console.print()


def _alike(inventory: Inventory) -> Iterable[tuple[str, str, str]]:
    """One row for the tensors that differ by numbers in their names alone: a layer is shown once."""
    infos = [found[0] for found in inventory.tensors.values()]
    for name, which in render.alike(list(inventory.tensors), map(attrgetter("shape", "dtype"), infos)):
        yield name, str(list(infos[which[0]].shape)), infos[which[0]].dtype


def _short(value: Any) -> str:
    said = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return said if len(said) <= 300 else f"{said[:300]} …"


def _checkpoint(inv: Inventory) -> tuple[str, str | Iterable[str]]:
    infos = [info for ranks in inv.tensors.values() for info in ranks]
    count = Counter(map(attrgetter("shape", "dtype"), infos))
    dtypes = ", ".join(sorted({dtype for _, dtype in count}))
    total = render.size(sum(times * math.prod(shape) * ITEMSIZE[dtype] for (shape, dtype), times in count.items()))
    ranks = f", {inv.ranks} ranks" if inv.ranks > 1 else ""
    what = f"{inv.format}, {len(inv.tensors)} tensors, {dtypes}, {total}{ranks}"
    return "checkpoint", f"{render.shown(inv.path)} ({what})"


def _notes(inv: Inventory) -> tuple[str, str | Iterable[str]]:
    return "notes", (*inv.notes, *inv.remarks) or ("nothing was unwrapped or ignored",)


def inspection(r: Recognised) -> dict[str, Any]:
    """What `mdl inspect --json` prints."""
    inv = r.inventory
    return {
        "path": inv.path,
        "format": inv.format,
        "files": inv.files,
        "ranks": inv.ranks,
        "arch": r.arch.name,
        "target": r.target,
        "because": r.match.because,
        "dims": r.dims.entries,
        "tokenizers": r.checkpoint.tokenizers,
        "notes": (*inv.notes, *inv.remarks),
        "tensors": Each(_listed, (info for infos in inv.tensors.values() for info in infos)),
    }


def _listed(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "shape": info.shape, "dtype": info.dtype, "rank": info.rank, "raw": info.raw}


def show_inspection(r: Recognised) -> None:
    """The table of `mdl inspect`."""
    inv, console = r.inventory, render.out()
    lines: list[tuple[str, str | Iterable[str]]] = [
        _checkpoint(inv),
        ("architecture", f"{r.arch.name}: {r.arch.title} ({r.arch.source}) → {r.target}"),
        ("because", r.match.because),
        ("tokenizer", [render.shown(p) for p in r.checkpoint.tokenizers] or ("none beside it",)),
        _notes(inv),
    ]
    render.show_facts(lines)
    console.print()
    show_dims(r.dims)


def show_dims(dims: Dims) -> None:
    """Every size and constant with where it comes from; switches of a mapping, which one reason set, in one line."""
    made = render.table("value", "", "from", "because")
    for (source, because), group in itertools.groupby(
        dims.entries.items(), lambda one: (one[1].source, one[1].because)
    ):
        rows = [(name, dim.value) for name, dim in group]
        if len(rows) >= SWITCHES and all(isinstance(value, bool) for _, value in rows):
            on = [name for name, value in rows if value]
            rows, because = [("switches", f"{len(on)} of {len(rows)}")], f"{because}: {', '.join(on) or 'none'}"
        style = "yellow" if source in ("default", "user") else ""
        for name, value in rows:
            made.add_row(name, str(value), render.text(source, style=style), because)
    render.out().print(made)
