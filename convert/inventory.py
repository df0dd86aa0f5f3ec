"""Finds the weights inside a checkpoint, takes wrappers and prefixes off, and lists what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path as Folder
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ..archs.base import Inventory
from ..errors import Kind, MdlError, Problem, input_error
from ..mappings.tensors import Target, TensorInfo
from .choose import STATE_DICT, Path, at, choose, table_of
from .folded import folded
from .grid import Cell, experts_of, in_order, ranks_of, whole_names
from .inert import NumpyArray, Stub, Unreadable
from .open import Checkpoint
from .paths import WITHIN
from .pause import collector_paused
from .plain import TooLargeError, counts_kept, is_tensor, is_training, key_text, plain, tensors_in

WRAPPER_PARTS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Name parts that torch.compile, DDP, FSDP, activation checkpointing and Fabric put into tensor names, anywhere."""
ATTRIBUTES = frozenset({"model", "net", "lm", "backbone"})
"""Leading name parts that are the attribute of an outer module if all tensors share them."""

_FLAT = re.compile(r"_?flat_param(_\d+)?")
MAX_NESTED = 20
"""Tables inside one another that a state dict may have."""
MAX_VISITED = 1_000_000
"""Entries of such tables. A file may hold one table in many places, and would be walked through once for each."""
MAX_NAME = 1000
"""Characters of a tensor's name."""


@collector_paused()
@counts_kept()
def take_inventory(ckpt: Checkpoint, *, weights: str | None = None) -> Inventory:
    """The tensors of a checkpoint under their family's own names, and everything beside them as plain values. Weights
    that lie in parts stand there as wholes (:mod:`.folded`).

    ``weights`` is the path of the state dict, joined by "/", for a file that holds several. Raises MdlError: USAGE if
    ``weights`` names nothing, INPUT if there are no weights or several candidates, if a tensor can't be read, or if
    taking prefixes off makes two names equal.
    """
    wrapper = choose(ckpt, weights)
    findings = _Findings(list(ckpt.notes))
    if wrapper:
        findings.notes.append(f"the weights lie under {'/'.join(wrapper)}")
    held = [_weights_of(tree, wrapper, rank, ckpt, findings) for rank, tree in enumerate(ckpt.trees)]
    raws = held[0] if len(held) == 1 else dict.fromkeys(name for one in held for name in one)
    names, prefixes = _strip(raws, findings)
    tensors = _together(ckpt, wrapper, held, names, findings)
    ranks = ranks_of(ckpt.cells) if ckpt.cells else len(ckpt.trees)
    _check_whole(tensors, ckpt, ranks, findings)
    if findings.problems:
        raise MdlError(Kind.INPUT, findings.problems)
    if ckpt.trees:
        _beside(ckpt.trees[0], wrapper, findings)
    inventory = Inventory(
        path=ckpt.path,
        tensors=tensors,
        extras=_with_sidecars(findings.extras, ckpt),
        ranks=ranks,
        wrapper=wrapper,
        prefixes=prefixes,
        notes=tuple(findings.notes),
        format=ckpt.format,
        files=ckpt.files,
        parts=len({cell.place for cell in ckpt.cells}) or 1,
        experts=experts_of(ckpt.cells) if ckpt.cells else 1,
        remarks=ckpt.remarks,
    )
    return folded(inventory)


class _Findings(Struct):
    """What is collected on the way."""

    notes: list[str]
    problems: list[Problem] = field(default_factory=list[Problem])
    extras: dict[str, Any] = field(default_factory=dict[str, Any])


def _together(
    ckpt: Checkpoint, wrapper: Path, held: list[dict[str, TensorInfo]], names: dict[str, str], findings: _Findings
) -> dict[str, tuple[TensorInfo, ...]]:
    """The tensors by their names in the whole model, one entry for each rank that holds it, and for each copy."""
    if len(held) == 1 and not ckpt.cells:  # no two of them can be one: names that collide are a problem already
        above = "".join(f"{part}/" for part in wrapper)
        return {
            name: (_located(leaf, name, 0, above + raw),)
            for (raw, name), leaf in zip(names.items(), held[0].values(), strict=True)
        }
    tensors: dict[str, list[TensorInfo]] = {}
    last: dict[str, Cell] = {}
    cells = ckpt.cells or tuple(Cell(Folder(), rank) for rank in range(len(held)))
    whole = whole_names(cells, [[names[raw] for raw in one] for one in held]) if ckpt.cells else []
    for k, (cell, one) in enumerate(zip(cells, held, strict=True)):
        path = (*wrapper[:-1], cell.chunk) if cell.chunk else wrapper
        above = "".join(f"{part}/" for part in path)
        for raw, leaf in one.items():
            name = whole[k][names[raw]] if whole else names[raw]
            entries = tensors.setdefault(name, [])
            before = last.setdefault(name, cell)
            last[name] = cell
            if entries and before.rank == cell.rank and (cell.place != before.place or cell.expert <= before.expert):
                what = f"{name} is in two parts of the model, {entries[-1].file} and {leaf.file}"
                findings.problems.append(Problem(what, ckpt.path, "keep it in one of them only"))
            entries.append(_located(leaf, name, cell.rank, above + raw))
    if ckpt.cells and experts_of(ckpt.cells) > 1:
        return {name: tuple(tensors[name]) for name in in_order(one.values() for one in whole)}
    return {name: tuple(found) for name, found in tensors.items()}


def _located(i: TensorInfo, name: str, rank: int, raw: str) -> TensorInfo:
    return TensorInfo(name, i.shape, i.dtype, i.file, i.offset, i.stride, i.storage, rank, raw, i.pieces)


def _weights_of(tree: Any, wrapper: Path, rank: int, ckpt: Checkpoint, findings: _Findings) -> dict[str, TensorInfo]:
    """The tensors of one rank by the name their writer gave; what can't be read becomes a problem."""
    node = table_of(at(tree, wrapper))
    where = ckpt.path
    if len(ckpt.trees) > 1:
        where = str(ckpt.cells[rank].file) if ckpt.cells else ckpt.files[rank]
    if not node:
        findings.problems.append(Problem(f"rank {rank} has no weights under {'/'.join(wrapper) or 'its top'}", where))
    held = _as_they_stand(node)
    return held if len(held) == len(node) else _looked_through(node, wrapper, where, rank, findings)


def _looked_through(
    node: dict[Any, Any], wrapper: Path, where: str, rank: int, findings: _Findings
) -> dict[str, TensorInfo]:
    """The same for a table, entry by entry."""
    held: dict[str, TensorInfo] = {}
    left_out: list[str] = []
    unwritable: list[str] = []
    entries = [(key, value) for key, value in node.items() if not _is_outside(key, value, wrapper)]
    for name, value in _flat(entries):
        if not name.isprintable() or len(name) > MAX_NAME:
            unwritable.append(ascii(name[:MAX_NAME]))
        elif isinstance(value, TensorInfo):
            if name in held:
                findings.problems.append(Problem(f"{name} occurs twice in the weights", where, "save one of them only"))
            held[name] = value
        elif is_tensor(value) or tensors_in(value):
            findings.problems.append(
                Problem(f"{name} can't be read ({_reason(value)})", where, "save it as a plain torch tensor")
            )
        else:
            left_out.append(name)
    if unwritable:
        what = f"names of tensors hold characters that can't be printed, or too many: {_some(unwritable)}"
        findings.problems.append(Problem(what, where, "rename them before saving: letters, digits, dots, underscores"))
    if left_out and rank == 0:
        findings.notes.append(f"not tensors, left out: {_some(left_out)}")
    return held


def _as_they_stand(node: dict[Any, Any]) -> dict[str, TensorInfo]:
    """The entries of a table whose names tell that they are weights, if there is nothing to say about any name."""
    held = {name: v for name, v in node.items() if type(name) is str and isinstance(v, TensorInfo) and "." in name}
    plain_names = held and "".join(held).isprintable() and len(max(held, key=len)) <= MAX_NAME
    return held if plain_names else {}


def _reason(value: Any) -> str:
    if isinstance(value, Unreadable):
        return value.reason
    if isinstance(value, NumpyArray):
        return f"numpy array {value.dtype.code} {list(value.shape)}"
    return f"a {value.qualname}, which holds tensors" if isinstance(value, Stub) else "an object that holds tensors"


def _is_outside(key: object, value: Any, wrapper: Path) -> bool:
    """Whether an entry of the table that holds the weights is none of them: training state or, if bare, settings."""
    if type(key) is str and "." in key:
        return False
    if is_training(key):
        return not (wrapper and isinstance(value, TensorInfo))
    return not wrapper and "." not in key_text(key) and not is_tensor(value) and not tensors_in(value)


def _flat(entries: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Entries of a state dict; tables of tensors inside it are entered, their names joined by :data:`WITHIN`."""
    waiting = [("", iter(entries))]
    visited = 0
    while waiting:
        prefix, rest = waiting[-1]
        for key, value in rest:
            if isinstance(value, dict) and tensors_in(value):
                visited += len(value)
                if len(waiting) > MAX_NESTED or visited > MAX_VISITED:
                    raise input_error("the weights lie in tables inside tables without end", do=STATE_DICT)
                waiting.append((f"{prefix}{key_text(key)}{WITHIN}", iter(dict.items(value))))
                break
            yield prefix + (key if type(key) is str else key_text(key)), value
        else:
            waiting.pop()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _strip(raws: Iterable[str], findings: _Findings) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names without wrapper parts and shared attributes, by raw name; and what was taken off."""
    everything = "\n".join(raws)
    nested = WITHIN in everything
    everything = everything.replace(WITHIN, ".")
    names = {raw: raw.replace(WITHIN, ".") if nested else raw for raw in raws}
    prefixes: list[str] = []
    for part in sorted(part for part in WRAPPER_PARTS if f"{part}." in everything):
        hits = [raw for raw in names if f"{part}." in names[raw]]
        touched = [raw for raw in hits if part in names[raw].split(".")[:-1]]
        for raw in touched:
            *path, leaf = names[raw].split(".")
            names[raw] = ".".join([*(p for p in path if p != part), leaf])
        if touched:
            prefixes.append(f"{part}.")
            findings.notes.append(f"took {part}. off {len(touched):,} of {len(names):,} tensor names")
    while len(names) > 1:
        shared = next(iter(names.values())).partition(".")[0]
        if shared not in ATTRIBUTES or not all(name.startswith(f"{shared}.") for name in names.values()):
            break
        names = {raw: name.partition(".")[2] for raw, name in names.items()}
        prefixes.append(f"{shared}.")
        findings.notes.append(f"took {shared}. off all tensor names, which share it")
    _check_collisions(names, findings)
    return names, tuple(prefixes)


def with_prefix_of(inventory: Inventory, target: Target) -> Inventory:
    """The inventory under the names of the target class where they differ by its attribute alone.

    A base model's file lacks the attribute under which the model with a head holds it (``model.``); :func:`_strip`
    takes it off where all tensors share it.
    """
    wanted = {*target.shapes, *target.ties}
    prefixes = {name.partition(".")[0] + "." for name in target.shapes if name not in inventory.tensors}
    for prefix in sorted(prefixes):
        under = {name for name in inventory.tensors if name not in wanted and prefix + name in wanted}
        if len(under) * 2 > len(inventory.tensors) and not any(prefix + n in inventory.tensors for n in under):
            names = {n: n if n in wanted else prefix + n for n in inventory.tensors}
            tensors = {
                names[n]: tuple(replace(i, name=names[n]) for i in found) for n, found in inventory.tensors.items()
            }
            note = f"put {prefix} before the tensor names, as the class has it"
            notes = tuple(n for n in inventory.notes if n != f"took {prefix} off all tensor names, which share it")
            return replace(inventory, tensors=tensors, notes=(*notes, note) if notes == inventory.notes else notes)
    return inventory


def _check_collisions(names: dict[str, str], findings: _Findings) -> None:
    if len(set(names.values())) == len(names):
        return
    raws: dict[str, list[str]] = {}
    for raw, name in names.items():
        raws.setdefault(name, []).append(raw)
    for name, several in raws.items():
        if len(several) > 1:
            what = f"{' and '.join(several)} would both be named {name} without their prefixes"
            findings.problems.append(Problem(what, do="save one of them only"))


def _check_whole(tensors: dict[str, tuple[TensorInfo, ...]], ckpt: Checkpoint, ranks: int, findings: _Findings) -> None:
    """Notes and problems that concern all tensors at once."""
    if ranks > 1 and (partial := [n for n, found in tensors.items() if len({i.rank for i in found}) < ranks]):
        findings.notes.append(f"present in some rank files only: {_some(partial)}")
    named_so = [name for name in tensors if "flat_param" in name] if "flat_param" in "\n".join(tensors) else []
    if flat := [name for name in named_so if _FLAT.fullmatch(name.rpartition(".")[2])]:
        findings.problems.append(
            Problem(
                f"{_some(flat)}: flat parameters of FSDP; each holds many weights end to end, or a part of that",
                ckpt.path,
                "save it in the trainer with StateDictType.FULL_STATE_DICT, or with torch.distributed.checkpoint",
            )
        )
    empty = [name for name, found in tensors.items() if 0 in found[0].shape]
    if tensors and 2 * len(empty) > len(tensors):
        findings.problems.append(
            Problem(
                f"{len(empty):,} of {len(tensors):,} tensors are empty, like the placeholders of DeepSpeed ZeRO-3",
                ckpt.path,
                "gather the weights with the zero_to_fp32.py that DeepSpeed put beside the checkpoint",
            )
        )


def _beside(tree: Any, wrapper: Path, findings: _Findings) -> None:
    """Everything on the way to the weights that is not weights, as extras or, if too large, as a note."""
    for depth in range(len(wrapper) + 1):
        for key, value in table_of(at(tree, wrapper[:depth])).items():
            within = depth == len(wrapper)
            if _is_outside(key, value, wrapper) if within else key != wrapper[depth]:
                _note_or_keep(key_text(key), "/".join((*wrapper[:depth], key_text(key))), value, findings)


def _note_or_keep(key: str, path: str, value: Any, findings: _Findings) -> None:
    if is_training(key):
        findings.notes.append(f"{path}: not touched (training state)")
    elif not is_tensor(value) and (count := tensors_in(value)):
        findings.notes.append(f"{path}: not touched ({count:,} tensors)")
    else:
        try:
            findings.extras[path if key in findings.extras else key] = plain(value)
        except TooLargeError as error:
            findings.notes.append(f"{path}: left out, for {error}")


def _with_sidecars(extras: dict[str, Any], ckpt: Checkpoint) -> dict[str, Any]:
    for name, value in ckpt.sidecars.items():
        extras[f"{name}.json" if name in extras else name] = value
    if ckpt.metadata:
        extras["safetensors_metadata" if "metadata" in extras else "metadata"] = dict(ckpt.metadata)
    return extras
