"""Opens a checkpoint, file or folder, whatever its container: which files belong to it and what they hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from ..archs.refused import refuse_folder
from ..errors import Kind, MdlError, Problem, input_error
from . import dcp, zero3
from .beside import find_above, find_arguments, find_configs, find_sidecars, find_tokenizers, last_step
from .deepspeed import optimizer_states
from .grid import Cell, Grid, find_grid, latest, taken_apart
from .legacy import read_legacy
from .pause import collector_paused
from .plain import key_text
from .rank_files import MAX_RANKS, RANK, in_order
from .safetensors_file import check_index, read_safetensors, read_shards
from .sniff import LEGACY, ZIP, is_checkpoint, sniff
from .torch_zip import read_torch_zip

_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".safetensors"})
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_LITGPT = "lit_model.pth"
_NOT_WEIGHTS = re.compile(
    r"(optim|scheduler|training_args|rng_state|random_state|scaler|grad_scaler)"
    r"|(sampler(_\d+)?|dl_state_dict(_\d+)?)\.bin|custom_checkpoint_\d+\.pkl"  # accelerate's, beside its random_states
)
_STATE_SUFFIXES = _SUFFIXES | {".pkl"}
_INDEX = ".index.json"


class Checkpoint(Struct, frozen=True):
    """An opened checkpoint.

    ``trees`` holds one raw tree per rank file, in rank order (the shards of one model are one tree); where ``cells`` is
    not empty, one for each cell, which says of which rank and which part of the layers it is. ``sidecars`` maps
    the stem of a settings file beside the weights (``params``, ``config``, ``meta``) to its parsed content;
    ``metadata`` is what safetensors headers carry beside the tensors. ``tokenizers`` lists files beside the weights
    that look like a tokenizer. All paths are absolute. ``remarks`` is what plans and reports say too.
    """

    path: str
    format: str
    files: tuple[str, ...]
    trees: tuple[Any, ...]
    sidecars: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizers: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    cells: tuple[Cell, ...] = ()


class _Group(Struct, frozen=True):
    """Files that make up one checkpoint: ``ranks`` one tree each, otherwise one tree together; ``parted`` names the
    format in which weights are put together from several."""

    name: str
    files: tuple[Path, ...]
    ranks: bool = False
    parted: str = ""
    index: Path | None = None
    weight_map: dict[str, str] = field(default_factory=dict[str, str])
    grid: Grid | None = None


@collector_paused()
def open_checkpoint(path: Path) -> Checkpoint:
    """Read the metadata of a checkpoint file or folder. Raises MdlError (INPUT) that says what to give instead; if it
    has several files, with the problems of all of them."""
    try:
        return _open(path)
    except OSError as error:
        where = str(error.filename or path)
        raise input_error(
            f"this can't be read ({error.strerror})", where, "check the path and its permissions"
        ) from None


def _open(path: Path) -> Checkpoint:
    notes: list[str] = []
    group = _group_of(path, notes)
    formats: set[str] = set()
    metadata: dict[str, str] = {}
    files = group.files
    if group.parted:
        formats.add(group.parted)
        tree, files = _read_parted(group, notes)
        read: list[Any] = [tree]
    else:
        read = _read_all(files, formats, metadata, notes)
    if len(formats) > 1:
        raise input_error(f"the files of {group.name} have different formats: {', '.join(sorted(formats))}", str(path))
    trees = tuple(read) if group.ranks or len(read) == 1 else (_join(group, read),)
    if group.index is not None and len(read) == 1:
        check_index(group.index, group.weight_map, {name: [group.files[0].name] for name in read[0]})
    trees, cells = taken_apart(trees, group.grid) if group.grid else (trees, ())
    remarks: list[str] = []
    sidecars, tokenizers = _beside(group, notes, remarks)
    return Checkpoint(
        path=_absolute(path),
        format=formats.pop(),
        files=tuple(_absolute(file) for file in files),
        trees=trees,
        sidecars=sidecars,
        tokenizers=tokenizers,
        metadata=metadata,
        notes=tuple(notes),
        remarks=tuple(remarks),
        cells=cells,
    )


def _read_parted(group: _Group, notes: list[str]) -> tuple[Any, tuple[Path, ...]]:
    """The tree of a checkpoint whose files hold parts of weights, or one weight each; and its files."""

    def read(path: Path) -> Any:
        return _read(path, set(), {}, notes)

    if group.parted == dcp.FORMAT:
        return dcp.read_dcp(group.files[0], notes)
    together = zero3.read_zero3 if group.parted == zero3.FORMAT else zero3.read_universal
    return together(group.files, read, notes), group.files


def _in_steps(group: _Group) -> bool:
    """Whether the files are named as DeepSpeed names those of a step, whose settings may lie in configs/."""
    return group.files[0].name.endswith("model_states.pt")


def _group_of(path: Path, notes: list[str]) -> _Group:
    """The checkpoint that a path means: that of the last save, if it is the folder of a whole run."""
    newest = latest(path)
    if newest is not None:
        notes.append(f"{newest.name} is the last save of this folder")
        path = newest
    grid = find_grid(path)
    if grid is None:
        return _group_of_folder(path, notes) if path.is_dir() else _group_of_file(path, notes)
    if path == grid.folder:
        _alone(_Group(grid.name, ()), _others(path), path)
    else:
        notes.append(f"{path.name} is a part of {grid.name}: all of its {len(grid.cells)} files were read")
    return _Group(grid.name, tuple(cell.file for cell in grid.cells), ranks=True, grid=grid)


def _beside(group: _Group, notes: list[str], remarks: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings and tokenizers beside the weights; around a folder of torch.distributed.checkpoint or a universal one,
    whose files are all its own, trainers put them into the folder above."""
    folder = group.grid.folder if group.grid else group.files[0].parent
    if group.parted == zero3.UNIVERSAL:
        folder = folder.parent.parent  # zero/PARAMETER/fp32.pt
    sidecars = find_sidecars(folder, group.files[0].stem)
    tokenizers = find_tokenizers(folder, group.files[0])
    if _in_steps(group):
        sidecars |= find_configs(folder)
    if _in_steps(group) and group.grid:
        sidecars |= find_arguments(folder, lambda file: _read(file, set(), {}, []), notes)
    above = Path(_absolute(folder)).parent
    if group.parted in (dcp.FORMAT, zero3.UNIVERSAL):
        sidecars, tokenizers = sidecars or find_above(above, remarks), tokenizers or find_tokenizers(above)
    return sidecars, tokenizers


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the name of the file


def _read_all(files: tuple[Path, ...], formats: set[str], metadata: dict[str, str], notes: list[str]) -> list[Any]:
    read: list[Any] = []
    problems: list[Problem] = []
    for file in files:
        try:
            read.append(_read(file, formats, metadata, notes))
        except MdlError as error:
            problems += error.problems
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return read


def _read(file: Path, formats: set[str], metadata: dict[str, str], notes: list[str]) -> Any:
    kind = sniff(file)
    formats.add(kind)
    if kind == ZIP:
        return read_torch_zip(file, notes)
    if kind == LEGACY:
        return read_legacy(file)
    tensors, found = read_safetensors(file)
    metadata.update(found)
    return tensors


def _join(group: _Group, trees: list[Any]) -> dict[Any, Any]:
    """The shards of one model as one tree, checked against the index if there is one."""
    joined: dict[Any, Any] = {}
    held: dict[str, list[str]] = {}
    for file, tree in zip(group.files, trees, strict=True):
        if not isinstance(tree, dict):
            raise input_error("this shard holds no table of tensors", str(file))
        joined.update(tree)
        for name in tree:
            held.setdefault(key_text(name), []).append(file.name)
    if group.index is not None:
        check_index(group.index, group.weight_map, held)
    doubled = [
        Problem(f"{name} is in several shards: {', '.join(files)}", str(group.files[0].parent))
        for name, files in held.items()
        if len(files) > 1
    ]
    if doubled:
        raise MdlError(Kind.INPUT, doubled)
    return joined


def _group_of_file(path: Path, notes: list[str]) -> _Group:
    """The checkpoint that a given file belongs to: itself, or all rank files or shards of which it is one."""
    if path.name.endswith(_INDEX) and path.is_file():
        return _indexed(path)
    if not path.exists():
        raise input_error("there is no such file or folder", str(path), "check the path")
    siblings = sorted(file for file in path.parent.iterdir() if file.is_file())
    shard = _SHARD.fullmatch(path.name)
    group = _Group(path.name, (path,))
    if path.name == dcp.NAME or path.suffix == dcp.SUFFIX:
        group = _distributed(path.parent)
        notes.append(f"{path.name} is one of the files of a {dcp.FORMAT} folder: all of them were read")
    elif zero3.is_part(path.name) and (parted := zero3.zero3_files([file.name for file in siblings], path.parent)):
        group = _Group(zero3.FORMAT, tuple(parted), parted=zero3.FORMAT)
    elif RANK.fullmatch(path.name):
        group = _ranked([file for file in siblings if RANK.fullmatch(file.name)])
    elif shard:
        indices = [file for file in siblings if file.name.endswith(_INDEX)]
        listing = [index for index in indices if path.name in read_shards(index)[0].values()]
        group = _indexed(listing[0]) if listing else _numbered(*_split(shard), _same_set(siblings, shard))
    if len(group.files) > 1:
        notes.append(f"{path.name} is one of the {len(group.files)} files of {group.name}: all of them were read")
    return group


def _split(shard: re.Match[str]) -> tuple[str, str, str]:
    return shard[1], shard[3], shard[4]


def _same_set(files: list[Path], shard: re.Match[str]) -> list[Path]:
    matches = [(file, _SHARD.fullmatch(file.name)) for file in files]
    return [file for file, match in matches if match and _split(match) == _split(shard)]


def _group_of_folder(path: Path, notes: list[str]) -> _Group:
    files = sorted(file for file in path.iterdir() if file.is_file())
    pieces = [file for file in files if file.suffix == dcp.SUFFIX]
    distributed = pieces or any(file.name == dcp.NAME for file in files)
    if distributed:
        files = [file for file in files if file not in pieces and file.name not in dcp.BESIDE]
    if dealt := _dealt(path, [file.name for file in files]):
        return _alone(dealt, _others(path), path)
    beside = [file.name for file in files if file.suffix in _STATE_SUFFIXES and _NOT_WEIGHTS.match(file.name)]
    beside += optimizer_states([file.name for file in files], str(path))
    beside += [file.name for file in files if file.name == "train.pt" and path / "model.pt" in files]  # OLMo's trainer
    notes.extend(f"{name}: not touched (training state, by its name)" for name in beside)
    if path / _LITGPT in files and path / f"{_LITGPT}.lora" in files:
        beside.append(f"{_LITGPT}.lora")
        notes.append(f"{_LITGPT}.lora: not read; litgpt merge_lora writes {_LITGPT} beside it, with it merged")
    groups = _gather([file for file in files if file.name not in beside and not file.name.startswith(".")])
    groups += [_distributed(path)] if distributed else []
    if len(groups) == 1:
        return groups[0]
    if newest := last_step([file for group in groups for file in group.files]):
        notes.append(f"{newest.name} is the last of {len(groups)} steps in this folder: give another by its file name")
        return _Group(newest.name, (newest,))
    if groups:
        _alone(groups[0], groups[1:], path)
    refuse_folder((entry.name for entry in path.iterdir()), str(path))
    below = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    inner = [name for name in below if (path / name / dcp.NAME).is_file() and not _NOT_WEIGHTS.match(name)]
    if len(inner) == 1:
        notes.append(f"the weights are those of the folder {inner[0]}")
        return _distributed(path / inner[0])
    hint = f"; it has the folders {', '.join(below[:8])}" if below else ""
    raise input_error(f"this folder holds no checkpoint{hint}", str(path), "give the file or folder with the weights")


def _dealt(folder: Path, names: list[str]) -> _Group | None:
    """What DeepSpeed dealt out to processes; the universal form first, beside which it keeps files of stage 3."""
    universal = zero3.universal_files(folder)
    if universal and not any(name.endswith("optim_states.pt") for name in names):
        return _Group("zero", tuple(universal), parted=zero3.UNIVERSAL)
    if parted := zero3.zero3_files(names, folder):
        if universal:
            _alone(_Group("zero", ()), [_Group(parted[0].name, ())], folder)
        return _Group(parted[0].name, tuple(parted), parted=zero3.FORMAT)
    return _Group("zero", tuple(universal), parted=zero3.UNIVERSAL) if universal else None


def _others(folder: Path) -> list[_Group]:
    """Checkpoints beside one that is in parts, whose trainers name what they put beside it ``…_states.pt``."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    pieces = (folder / dcp.NAME).is_file()
    mine = [
        file
        for file in files
        if not file.name.endswith("_states.pt")
        and not (pieces and (file.suffix == dcp.SUFFIX or file.name in dcp.BESIDE))
        and not _NOT_WEIGHTS.match(file.name)
    ]
    return _gather(mine) + ([_distributed(folder)] if pieces else [])


def _alone(group: _Group, others: list[_Group], folder: Path) -> _Group:
    """The group. Raises MdlError (INPUT) if there are others in its folder."""
    if others:
        names = ", ".join(one.name for one in (group, *others))
        do = "give the one you mean by its file name"
        raise input_error(f"this folder holds several checkpoints: {names}", str(folder), do)
    return group


def _distributed(folder: Path) -> _Group:
    """A folder of torch.distributed.checkpoint, which is read by its list."""
    if not (folder / dcp.NAME).is_file():
        raise input_error(
            f"this folder has {dcp.SUFFIX} files, but not {dcp.NAME}, which says what is where in them",
            str(folder),
            f"copy the folder again (names that begin with a dot are easily left out); without {dcp.NAME} the save"
            " was never finished",
        )
    return _Group(dcp.NAME, (folder / dcp.NAME,), parted=dcp.FORMAT)


def _gather(files: list[Path]) -> list[_Group]:
    """Every checkpoint among the files of one folder."""
    groups = [_indexed(file) for file in files if file.name.endswith(_INDEX)]
    taken = {file for group in groups for file in group.files}
    rest = [file for file in files if file not in taken and _may_be_weights(file)]
    ranks = [file for file in rest if RANK.fullmatch(file.name)]
    if ranks:
        groups.append(_ranked(ranks))
    sharded: dict[tuple[str, str, str], list[Path]] = {}
    for file in rest:
        found = _SHARD.fullmatch(file.name)
        if found:
            sharded.setdefault(_split(found), []).append(file)
        elif file not in ranks:
            groups.append(_Group(file.name, (file,)))
    groups.extend(_numbered(*key, shards) for key, shards in sharded.items())
    return groups


def _may_be_weights(file: Path) -> bool:
    return file.suffix in _SUFFIXES or (file.suffix not in (".json", ".model", ".txt") and is_checkpoint(file))


def _indexed(index: Path) -> _Group:
    weight_map, shards = read_shards(index)
    listed = {shard.name for shard in shards}
    for found in filter(None, (_SHARD.fullmatch(shard) for shard in listed)):
        beside = {file.name for file in _same_set([file for file in index.parent.iterdir() if file.is_file()], found)}
        if beside - listed:
            names = ", ".join(sorted(beside - listed)[:5])
            what = f"{index.name} does not list {names}, which by its name is another shard of the same model"
            raise input_error(what, str(index.parent), "download the index again, or remove what does not belong here")
        break
    return _Group(index.name, tuple(shards), index=index, weight_map=weight_map)


def _ranked(files: list[Path]) -> _Group:
    name, ordered = in_order(files)
    return _Group(name, ordered, ranks=True)


def _numbered(stem: str, total: str, suffix: str, shards: list[Path]) -> _Group:
    """Shards named ``…-00001-of-00003…`` that no index lists."""
    if int(total) > len(shards) + MAX_RANKS:
        raise input_error(
            f"{len(shards)} of {int(total):,} shards are here", str(shards[0].parent), "download the rest"
        )
    wanted = [f"{stem}-{n:05d}-of-{total}.{suffix}" for n in range(1, int(total) + 1)]
    names = {shard.name for shard in shards}
    missing = [name for name in wanted if name not in names]
    if missing or len(names) != len(wanted):
        raise input_error(
            f"shards are missing or misnumbered: {', '.join(missing) or stem}",
            str(shards[0].parent),
            "download the folder again",
        )
    return _Group(f"{stem}-*-of-{total}.{suffix}", tuple(sorted(shards)))
