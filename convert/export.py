"""`mdl export`: the plan run backwards. A layout becomes the original names and bytes again."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Mapping as Map
from pathlib import Path, PurePath
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

from ..errors import Kind, MdlError, Problem, input_error, usage_error
from ..mappings.expand import Join
from ..mappings.jsonable import numbers_back
from ..mappings.lazy import Lazy
from ..mappings.ops import Op, OpError, invert
from ..mappings.tensors import ITEMSIZE, TensorInfo
from .check import check_layout
from .commit import os_problem
from .locks import claimed, reading
from .manifest import NAME, Manifest, read_manifest, revive_join, revive_op
from .places import check_place, check_replaced
from .safetensors_file import read_safetensors
from .sources import Maps
from .torch_write import exported, save_torch

FOREIGN = frozenset({".safetensors", ".gguf", ".onnx", ".npz", ".h5"})
"""Suffixes that promise another format than the one that is written."""


class Exported(Struct, frozen=True):
    """What an export wrote, and what it could not bring back."""

    out: str
    files: tuple[str, ...]
    tensors: int
    lost: tuple[Problem, ...]


class _Home(Struct, frozen=True):
    """One place where an original tensor, or a rank's part of it, lay: its name and shape in that file."""

    rank: int
    raw: str
    file: str
    shape: tuple[int, ...]


class _Back(Struct, frozen=True):
    """One original tensor: how to make it from targets of the layout."""

    name: str
    homes: tuple[_Home, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]
    index: int
    join: Map[str, Any] | None
    dtype: str


def export(
    layout: Path, out: Path, *, force: bool = False, progress: Callable[[int], None] = lambda _: None
) -> Exported:
    """Write the original checkpoint. ``out`` is a .pt/.pth file, or a folder when there were several rank files.

    What was a folder of torch.distributed.checkpoint comes back as one file: into how many pieces it was cut says
    nothing about the model. The state dict comes back under its wrapper with the plain hyperparameters beside it;
    tensors that a rule dropped, and hyperparameters that had no wrapper to lie beside, are listed in ``lost``. Needs
    torch (its own format is best written by its own code). Raises MdlError: INPUT for a changed layout, USAGE where
    ``out`` can't be made or holds what no export wrote, MACHINE for a disk that takes no more or another run that
    writes there.
    """
    if out.suffix in FOREIGN:
        do = f"name it {out.stem}.pt; the layout itself is safetensors already"
        raise usage_error(f"mdl export writes torch's own format, which is no {out.suffix}", str(out), do)
    with reading(layout):
        manifest = read_manifest(layout)
        places = _places(manifest, out)
        _check_places(places, out, manifest, force)
        problems = check_layout(layout, manifest)
        if problems:
            raise MdlError(Kind.INPUT, problems)
        try:
            with claimed(out):
                _check_places(places, out, manifest, force)
                return _export(layout, manifest, out, progress)
        except OSError as error:
            raise os_problem(error, out) from error


def _places(manifest: Manifest, out: Path) -> dict[str, Path]:
    """Where the content of each of the checkpoint's files goes: shards become one file again, and parts of a grid
    (ranks, pipeline stages) files in the folders that they lay in. Those that were safetensors become torch's own
    format as well, and are named so."""
    files = {home.file for step in manifest.steps for source in step["sources"] for home in _homes(source)}
    if not _many(manifest):
        return dict.fromkeys(files, out)
    folders = {os.path.dirname(file) for file in files}  # noqa: PTH120 - text, whose ".." is not to be resolved
    try:
        above = os.path.commonpath(folders) if folders else ""
        below = {file: PurePath(file).relative_to(above) for file in files}
    except ValueError:
        below = {}
    if len(below) < len(files) or any(".." in path.parts for path in below.values()):
        raise input_error(f"{NAME} names a file outside the folder of its checkpoint", do="convert again")
    own = {file: path.with_suffix(".pt") if path.suffix in FOREIGN else path for file, path in below.items()}
    return {file: out / path for file, path in own.items()}


def _many(manifest: Manifest) -> bool:
    """Whether the checkpoint comes back as a folder of files."""
    return any(manifest.source.get(key, 1) > 1 for key in ("ranks", "parts", "experts"))


def _check_places(places: Map[str, Path], out: Path, manifest: Manifest, force: bool) -> None:
    """Raise MdlError (USAGE) where a file can't be made, or is not one that an export may replace."""
    if _many(manifest) and out.is_dir():
        if not force:
            raise usage_error("exists already; nothing was written", str(out), "choose another name, or pass --force")
    else:
        check_place(out)
    for path in places.values():
        if path.parent.is_dir():
            check_place(path)
            check_replaced(path, force=force, ours=exported)


def _export(layout: Path, manifest: Manifest, out: Path, progress: Callable[[int], None]) -> Exported:
    backs, lost = _reverse(manifest)
    if manifest.source["extras"] and not _has_room(manifest):
        names = ", ".join(manifest.source["extras"])
        lost.append(Problem(f"what lay beside the weights ({names}) is not written", str(layout / NAME)))
    with Maps() as files:
        stored: dict[str, TensorInfo] = {}
        for file in sorted({fact["file"] for fact in manifest.tensors.values()}):
            stored |= read_safetensors(layout / file)[0]
        written = _write(manifest, backs, stored, files, out, progress)
    return Exported(str(out), written, len(backs), tuple(lost))


def _reverse(manifest: Manifest) -> tuple[list[_Back], list[Problem]]:
    backs: list[_Back] = []
    lost = _composed(manifest)
    for step in manifest.steps:
        if step["kind"] == "drop":
            lost.append(Problem(f"{step['sources'][0]['name']} was dropped: {step['reason']}", step["rule"]))
        elif step["kind"] not in ("fill", "tie"):
            try:
                backs += _undo(step)
            except OpError as error:
                names = ", ".join(s["name"] for s in step["sources"])
                lost.append(Problem(f"{names}: {error}", step["rule"]))
    by_name = {back.name: back for back in backs}
    for step in manifest.steps:
        if step["kind"] == "tie":
            source = step["sources"][0]
            twin = by_name.get(step["reason"].removeprefix("equal to "))
            if twin is None:
                lost.append(Problem(f"{source['name']}: its twin could not be brought back", step["rule"]))
                continue
            backs.append(replace(twin, name=source["name"], homes=_homes(source), join=source["join"]))
    order = {name: k for k, name in enumerate(cast("list[str]", manifest.source["order"]))}
    return sorted(backs, key=lambda back: order[back.name]), lost


def _composed(manifest: Manifest) -> list[Problem]:
    """What is to be said of sources that lay in parts: they come back as wholes, for a layout holds nothing else."""
    by: dict[str, list[tuple[str, str, Map[str, Any]]]] = {}
    for step in manifest.steps:
        for source in step["sources"]:
            for rank in source["ranks"]:
                if "made" in rank:
                    by.setdefault(rank["made"]["how"], []).append((source["name"], step["rule"], rank["made"]))
    told: list[Problem] = []
    for how, found in by.items():
        name, rule, made = found[0]
        parts = ", ".join(part["raw"].rpartition("/")[2] for part in made["parts"])
        count = "1 tensor comes back as a whole" if len(found) == 1 else f"{len(found):,} tensors come back as wholes"
        told.append(Problem(f"{count}, whose parts a layout does not hold: {how}, such as {name} of {parts}", rule))
    return told


def _undo(step: Map[str, Any]) -> list[_Back]:
    stored, written = step["source_dtype"], step["dtype"]
    if stored != written and ITEMSIZE[written] <= ITEMSIZE[stored]:  # widening keeps every bit, nothing else does
        raise OpError(f"was rounded from {stored} to {written}")
    ops = tuple(revive_op(op) for op in step["ops"])
    shapes = [tuple(cast("list[int]", s["shape"])) for s in step["sources"]]
    back = invert(ops, shapes, step["source_dtype"])
    for source in step["sources"]:
        if source["join"] and source["join"]["how"] in ("sum", "mean"):
            raise OpError(f"the {source['join']['how']} of rank files cannot be taken apart")
    found: list[_Back] = []
    for index, source in enumerate(step["sources"]):
        found.append(_Back(source["name"], _homes(source), tuple(step["targets"]), back, index, source["join"], stored))
    return found


def _homes(source: Map[str, Any]) -> tuple[_Home, ...]:
    return tuple(_Home(r["rank"], r["raw"], r["file"], tuple(r["shape"])) for r in source["ranks"])


def _rank_values(whole: Lazy, join: Join | None, homes: tuple[_Home, ...]) -> list[Lazy]:
    """For each place the part of a whole tensor that it held; copies of one rank hold the same."""
    order = {rank: k for k, rank in enumerate(dict.fromkeys(home.rank for home in homes))}
    if join is None or join.how in ("equal", "disjoint"):
        return [whole] * len(homes)
    parts = [_rank_value(whole, join, order[home.rank], len(order)) for home in homes]
    return [p if p.shape == home.shape else p.reshape(home.shape) for p, home in zip(parts, homes, strict=True)]


def _rank_value(whole: Lazy, join: Join, rank: int, ranks: int) -> Lazy:
    if join.how == "cat":
        share = whole.shape[join.axis] // ranks
        return whole.slice(join.axis, rank * share, (rank + 1) * share)
    parts: list[Lazy] = []
    at = 0
    for size in join.sizes:
        share = size // ranks
        parts.append(whole.slice(join.axis, at + rank * share, at + (rank + 1) * share))
        at += size
    return parts[0].concat(parts[1:], join.axis)


def _write(
    manifest: Manifest,
    backs: list[_Back],
    stored: Map[str, TensorInfo],
    files: Maps,
    out: Path,
    progress: Callable[[int], None],
) -> tuple[str, ...]:
    places = _places(manifest, out)
    per_file: dict[Path, dict[str, Lazy]] = {}
    for back in backs:
        values = [files.tensor(stored[name]) for name in back.targets]
        for op in back.ops:
            values = op.apply(values)
        whole = values[back.index].cast(back.dtype)
        for home, value in zip(back.homes, _rank_values(whole, revive_join(back.join), back.homes), strict=True):
            per_file.setdefault(places[home.file], {})[home.raw] = value
    wrapper = tuple(manifest.source["wrapper"])
    extras = numbers_back(manifest.source["extras"]) if _has_room(manifest) else {}
    ties = (step for step in manifest.steps if step["kind"] == "tie")
    aliases = {s["sources"][0]["ranks"][0]["raw"]: raw for s in ties if (raw := _twin_raw(manifest, s))}
    for path, tensors in sorted(per_file.items()):
        save_torch(path, tensors, wrapper=wrapper, extras=extras, aliases=aliases, progress=progress)
    return tuple(str(path) for path in sorted(per_file))


def _twin_raw(manifest: Manifest, tie: Map[str, Any]) -> str:
    """The twin's path in the file; empty where rank files cut the two differently, so that they share no memory."""
    twin = tie["reason"].removeprefix("equal to ")
    sources = (source for step in manifest.steps for source in step["sources"])
    found = next((source for source in sources if source["name"] == twin), None)
    return found["ranks"][0]["raw"] if found and _cut(found) == _cut(tie["sources"][0]) else ""


def _cut(source: Map[str, Any]) -> list[Any]:
    return [rank["shape"] for rank in source["ranks"]]


def _has_room(manifest: Manifest) -> bool:
    """Whether the file written has a place for hyperparameters: beside the state dict, under its wrapper."""
    return bool(manifest.source["wrapper"]) and not _many(manifest)
