"""Checkpoints that are cut two ways: into tensor-parallel ranks, and along the layers of the model.

Megatron-LM writes one file per rank and pipeline stage (megatron/training/checkpointing.py): mp_rank_TT/ or, where
there are several stages, mp_rank_TT_PPP/, each with model_optim_rng.pt. Every stage numbers its layers from 0, and with
a virtual pipeline it holds several runs of layers, model0, model1, …: run 0 of all stages comes first, then run 1.
Where experts are spread over processes, one number more, EEE, says which of them a file has; each numbers its own from
0, and what is no expert's lies in all of these files.

GPT-NeoX, on DeepSpeed's pipelines, writes one file per rank and layer, layer_LL-model_TT-model_states.pt, and its own
settings into configs/ beside them (megatron/checkpointing.py). Layers count the modules of the whole pipeline: 00 is
the embedding, 02 the first block. The same weights without a pipeline are called sequential.LL.….

A :class:`Cell` says which part one tree is, so that names can be made those of the whole model before anybody looks at
them: :func:`whole_names`. A family never sees stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ..errors import Kind, MdlError, Problem, input_error

_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LATEST = "latest_checkpointed_iteration.txt"
_LATEST_DEEPSPEED = "latest"
_LAYER_FILE = re.compile(r"layer_(\d{2,4})-model_(\d{2,3})-model_states\.pt")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(|\..*)")
_GROUPED = re.compile(r"(.*\.mlp\.experts\.)(weight[12])")
_OF_EXPERTS, _OF_ALL = ".mlp.experts.", "word_embeddings.weight"
_LAYER = re.compile(r"((?:.*\.)?(?:decoder|encoder|transformer)\.layers\.)(\d+)(\..*)")
_CHUNK = re.compile(r"model(\d{1,3})")
_COPY = "copy the folder again: every file holds a part of the model"


class Cell(Struct, frozen=True):
    """Which part of a model a tree holds.

    ``place`` orders the parts along the layers, ``expert`` those of the experts; ``prefix`` is put before its tensors'
    names; ``chunk`` is the key under which its weights lie where others have "model".
    """

    file: Path
    rank: int = 0
    place: int = 0
    expert: int = 0
    prefix: str = ""
    chunk: str = ""


class Grid(Struct, frozen=True):
    """The files of one checkpoint, and the folder that they lie in. ``numbers`` is how many the names of its folders
    hold: of two, only what lies in the files tells whether the second is a stage's or the experts'."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    numbers: int = 0


def latest(folder: Path) -> Path | None:
    """The folder of the last save in the folder of a whole run, as Megatron-LM's own loader finds it; None elsewhere.

    Raises MdlError (INPUT) where the save that is named is not there.
    """
    file = folder / _LATEST
    if not file.is_file():
        return _latest_of_layers(folder)
    said = _first_words(file)
    name = said if said == "release" else f"iter_{int(said):07d}" if said.isdecimal() else ""
    if not name:
        raise input_error(f"{_LATEST} holds {said[:20]!r}, neither a number nor 'release'", str(file))
    if not (folder / name).is_dir():
        raise input_error(f"{_LATEST} names {name}, which is not there", str(folder), "give the folder of another save")
    return folder / name


def _first_words(file: Path) -> str:
    """The little that such a file holds; one of that name may be anything, of any size."""
    with file.open("rb") as stream:
        return stream.read(100).decode("utf-8", errors="replace").strip()


def _latest_of_layers(folder: Path) -> Path | None:
    file = folder / _LATEST_DEEPSPEED
    name = _first_words(file) if file.is_file() else ""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or not (folder / name).is_dir():
        return None
    return folder / name if any(_LAYER_FILE.fullmatch(entry.name) for entry in (folder / name).iterdir()) else None


def find_grid(path: Path) -> Grid | None:
    """The grid that a folder holds, or that a file or a rank's folder is a part of; None for anything else.

    Raises MdlError (INPUT) where a cell of the grid is missing.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or _LAYER_FILE.fullmatch(path.name):
        layers = [(file, found) for file in sorted(folder.iterdir()) if (found := _LAYER_FILE.fullmatch(file.name))]
        if layers:
            cells = [Cell(f, int(n[2]), int(n[1]), prefix=f"sequential.{int(n[1])}.") for f, n in layers]
            _check_whole(cells, folder, holes=True)
            return Grid("layer_*-model_*-model_states.pt", folder, _sorted(cells))
    if _RANK.fullmatch(folder.absolute().name) and (path.is_dir() or path.name in _FILES):
        folder = folder.absolute().parent
    elif not path.is_dir():
        return None
    ranks = {entry: found for entry in sorted(folder.iterdir()) if (found := _RANK.fullmatch(entry.name))}
    files = {entry: file for entry in ranks if (file := _weights(entry)) is not None}
    if not files:
        return None
    parts = {file: [int(n) for n in ranks[entry].groups() if n] for entry, file in files.items()}
    numbers = {len(part) for part in parts.values()}
    if len(numbers) > 1:
        raise input_error("it holds folders of ranks with a stage's number and without", str(folder), "keep one kind")
    cells = [Cell(file, rank, place, expert) for file, part in parts.items() for rank, place, expert in [_three(part)]]
    return Grid("mp_rank_*", folder, _sorted(cells), numbers.pop())


def _three(numbers: list[int]) -> tuple[int, int, int]:
    rank, place, expert, *_ = (*numbers, 0, 0)
    return rank, place, expert


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def _sorted(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    return tuple(sorted(cells, key=_order))


def _order(cell: Cell) -> tuple[int, int, int]:
    return cell.place, cell.rank, cell.expert


def _check_whole(cells: Sequence[Cell], folder: Path, *, holes: bool = False) -> None:
    """Raise MdlError (INPUT) unless there is a cell for each rank at each place, and each part of the experts there;
    ``holes`` says that places may be missing, for modules without weights.

    Whole experts lie in one rank each, whichever of the ranks it is in whose process they were
    (--expert-tensor-parallel-size 1).
    """
    held = {_order(cell) for cell in cells}
    ranks, experts = ranks_of(cells), experts_of(cells)
    places = sorted({cell.place for cell in cells})
    whole = experts > 1 and len(held) == experts * len(places)
    one = {(e % ranks, e) for e in range(experts)} if whole else set()
    wanted = [(p, r, e) for p in places for r in range(ranks) for e in range(experts) if not one or (r, e) in one]
    lost = [cell for cell in wanted if cell not in held]
    missing = [f"rank {r} of part {p}" + f", experts {e}" * (experts > 1) for p, r, e in lost]
    missing += [f"rank {r}" for r in range(ranks) if one and r not in {r for r, _ in one}]
    missing += [f"part {p}" for p in range(places[-1]) if p not in places and not holes]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise input_error(f"files are missing: {', '.join(missing[:5])}{more}", str(folder), _COPY)


def taken_apart(trees: Sequence[Any], grid: Grid) -> tuple[tuple[Any, ...], tuple[Cell, ...]]:
    """The trees with one for each run of layers, its weights under "model", and the cell of each, in order.

    Raises MdlError (INPUT) where a cell of the grid is missing, the arguments of the run say another number of them, or
    the files hold different numbers of runs.
    """
    cells = grid.cells
    if grid.numbers == 2 and _is_of_experts(trees):
        cells = tuple(replace(cell, place=0, expert=cell.place) for cell in cells)
    if grid.numbers:
        _check_whole(cells, grid.folder)
    pairs = sorted(zip(cells, trees, strict=True), key=lambda pair: _order(pair[0]))
    cells, trees = tuple(cell for cell, _ in pairs), tuple(tree for _, tree in pairs)
    _compare(trees, cells, grid.folder)
    chunks = [_chunks(tree) for tree in trees]
    if len({len(found) for found in chunks}) > 1:
        raise input_error("its files hold different numbers of runs of layers", str(grid.folder), _COPY)
    if not chunks[0]:
        return trees, cells
    stages = 1 + max(cell.place for cell in cells)
    found: list[tuple[Cell, Any]] = []
    for tree, cell, keys in zip(trees, cells, chunks, strict=True):
        rest = {key: value for key, value in tree.items() if key not in keys}
        for k, key in enumerate(keys):
            part = replace(cell, place=k * stages + cell.place, chunk=key)
            found.append((part, {**rest, "model": tree[key]}))
    found.sort(key=lambda item: _order(item[0]))
    return tuple(tree for _, tree in found), tuple(cell for cell, _ in found)


def _is_of_experts(trees: Sequence[Any]) -> bool:
    """Whether files with two numbers are parts of the experts, not of the layers: by the arguments of the run, or,
    where there are none, by an embedding in each of them beside experts."""
    said = _argument(trees[0], "expert_model_parallel_size")
    if said is not None:
        return said != 1 and _argument(trees[0], "pipeline_model_parallel_size") in (None, 1)
    tables = [tree.get("model") if isinstance(tree, dict) else None for tree in trees]
    names = [[name for name in table if type(name) is str] if isinstance(table, dict) else [] for table in tables]
    return all(
        any(name.endswith(_OF_ALL) for name in one) and any(_OF_EXPERTS in name for name in one) for one in names
    )


def _compare(trees: Sequence[Any], cells: Sequence[Cell], folder: Path) -> None:
    """Hold the files to what the arguments of the run say of their number."""
    here = {"tensor": ranks_of(cells), "pipeline": len({cell.place for cell in cells}), "expert": experts_of(cells)}
    for kind, count in here.items():
        said = _argument(trees[0], f"{kind}_model_parallel_size")
        if said not in (None, count):
            what = f"{kind}_model_parallel_size is {said} in args, but there are files of {count}"
            raise input_error(what, str(folder), _COPY)


def _argument(tree: Any, name: str) -> Any:
    arguments = tree.get("args") if isinstance(tree, dict) else None
    return getattr(arguments, "state", {}).get(name)


def _chunks(tree: Any) -> list[str]:
    """The keys model0, model1, … of a file that has no model."""
    if not isinstance(tree, dict) or "model" in tree:
        return []
    found = [key for key in tree if type(key) is str and _CHUNK.fullmatch(key)]
    return sorted(found, key=lambda key: int(key.removeprefix("model")))


def whole_names(cells: Sequence[Cell], held: Sequence[Iterable[str]]) -> list[dict[str, str]]:
    """For each cell the names that its tensors have in the whole model, by those that they have in its file: layers and
    experts are numbered through, and of what holds several experts in one, each part gets a number.

    Raises MdlError (INPUT) where a part's layers neither count from 0 nor go on where the part before ended.
    """
    starts: dict[int, int] = {}
    at = 0
    problems: list[Problem] = []
    for cell, names in zip(cells, held, strict=True):
        if cell.place in starts:  # another rank of the same part
            continue
        numbers = {int(match[2]) for name in names if (match := _LAYER.fullmatch(name))}
        if numbers and numbers not in (set(range(len(numbers))), set(range(at, at + len(numbers)))):
            what = f"its layers are numbered {sorted(numbers)[:8]}, neither from 0 nor from {at}, where it begins"
            problems.append(Problem(what, str(cell.file), "save the checkpoint again with one pipeline stage"))
        starts[cell.place] = at if 0 in numbers else 0
        at += len(numbers)
    if problems:
        raise MdlError(Kind.INPUT, problems)
    spread = experts_of(cells)
    made: list[dict[str, str]] = []
    for cell, names in zip(cells, held, strict=True):
        whole = {name: cell.prefix + _renumbered(name, starts[cell.place]) for name in names}
        made.append(_of_all_experts(whole, cell.expert) if spread > 1 else whole)
    return made


def in_order(files: Iterable[Iterable[str]]) -> list[str]:
    """The names of all files, each file's in its own order: one that the files before lack stands behind the one that
    it follows."""
    after: dict[str, list[str]] = {"": []}
    for names in files:
        at, known = "", set(after)
        for name in names:
            if name in known:
                at = name
            else:
                after[at].append(name)
                after[name] = []
    found: list[str] = []
    waiting = list(reversed(after[""]))
    while waiting:
        found.append(waiting.pop())
        waiting += reversed(after[found[-1]])
    return found


def _of_all_experts(names: dict[str, str], part: int) -> dict[str, str]:
    """Names in one part of the experts, with the numbers that these have among all of them."""
    numbers = [int(found[2]) for name in names.values() if (found := _EXPERT.fullmatch(name))]
    start = part * (1 + max(numbers, default=-1))
    made: dict[str, str] = {}
    for raw, name in names.items():
        one, many = _EXPERT.fullmatch(name), _GROUPED.fullmatch(name)
        made[raw] = f"{one[1]}{int(one[2]) + start}{one[3]}" if one else f"{many[1]}{part}.{many[2]}" if many else name
    return made


def _renumbered(name: str, start: int) -> str:
    found = _LAYER.fullmatch(name) if start else None
    return f"{found[1]}{int(found[2]) + start}{found[3]}" if found else name


def ranks_of(cells: Sequence[Cell]) -> int:
    """How many tensor-parallel ranks there are."""
    return 1 + max(cell.rank for cell in cells)


def experts_of(cells: Sequence[Cell]) -> int:
    """Over how many files of each rank the experts are spread."""
    return 1 + max(cell.expert for cell in cells)
