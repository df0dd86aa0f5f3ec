"""Reads DeepSpeed checkpoints in which no file holds all weights: the slices of ZeRO stage 3, and the universal form.

Stage 3 deals every parameter, flat, to the processes in equal slices, the last of them padded; a process keeps its
slices of all parameters one behind the other, in the order of ``param_shapes``. What is written are the float32 values
that the optimizer holds. The rules are those of DeepSpeed's own utils/zero_to_fp32.py, and for the universal form of
checkpoint/ds_to_universal.py, as of 0.19.8.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..errors import input_error
from ..mappings.tensors import ITEMSIZE, Piece, Shape, TensorInfo, dense

FORMAT = "DeepSpeed ZeRO-3"
UNIVERSAL = "DeepSpeed universal"

_MODEL = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_STATE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_GATHER = "gather the weights with the script that DeepSpeed put into the folder above: python zero_to_fp32.py . OUT"
_AGAIN = "copy the folder again, all of its files"

Read = Callable[[Path], Any]
"""Reads one file of torch.save's: tables, plain values, TensorInfo."""


def zero3_files(names: Sequence[str], folder: Path) -> list[Path]:
    """The files of a stage 3 checkpoint, those with the model's description first, each in the order of the ranks; none
    if this is none. Raises MdlError (INPUT) if a rank's file is missing, or tensors are parallel as well."""
    model, state = _ranked(_MODEL, names), _ranked(_STATE, names)
    if not model:
        return []
    if any(mp for _, mp in (*model, *state)):
        what = "this DeepSpeed ZeRO-3 checkpoint is of a model that was tensor- or pipeline-parallel, too"
        raise input_error(what, str(folder), "join it with the tool of the trainer that wrote it")
    for kind, held in (("model", model), ("optim", state)):
        ranks = sorted(rank for rank, _ in held)
        if ranks != list(range(max(len(model), len(state)))):
            found = ", ".join(map(str, ranks)) or "none"
            what = f"of this DeepSpeed ZeRO-3 checkpoint, *_{kind}_states.pt are here for the ranks {found}"
            raise input_error(
                f"{what}: every rank holds a part of each weight in its optim_states", str(folder), _AGAIN
            )
    return [folder / held[key] for held in (model, state) for key in sorted(held)]


def is_part(name: str) -> bool:
    """Whether a file is named as those of stage 3 with the model's description, of which each rank writes one."""
    return _MODEL.fullmatch(name) is not None


def _ranked(pattern: re.Pattern[str], names: Sequence[str]) -> dict[tuple[int, int], str]:
    made: dict[tuple[int, int], str] = {}
    for name, match in ((name, match) for name in names if (match := pattern.fullmatch(name))):
        if (other := made.setdefault((int(match[1]), int(match[2])), name)) != name:
            what = f"{other} and {name} are files of the same rank"
            raise input_error(what, other, "keep those of one checkpoint in the folder")
    return made


def read_zero3(files: Sequence[Path], read: Read, notes: list[str]) -> dict[str, Any]:
    """What stage 2 would have saved: the first rank's table, with whole weights under ``module``. Raises MdlError."""
    half = len(files) // 2
    trees = [_table(read(path), path) for path in files]
    head = trees[0]
    slices = [
        _Slices(path, _flat(_table(tree.get("optimizer_state_dict"), path), path, half))
        for path, tree in zip(files[half:], trees[half:], strict=True)
    ]
    made = _parameters(head, slices, files[0]) | _frozen(trees[:half], files[0])
    notes.append(f"the weights are the float32 values of the optimizer, joined from {half} ranks (ZeRO-3)")
    return {**head, "module": _module(head, made, files[0])}


def _table(found: Any, path: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise input_error("this file of a DeepSpeed ZeRO-3 checkpoint holds no table", str(path), _GATHER)
    return cast("dict[str, Any]", found)


def _flat(state: dict[str, Any], path: Path, ranks: int) -> list[TensorInfo]:
    """What one rank holds of all parameters."""
    stage, count, flat = (state.get(key) for key in ("zero_stage", "partition_count", "fp32_flat_groups"))
    flat = flat if isinstance(flat, list) else [flat]
    if stage != 3 or not all(isinstance(one, TensorInfo) and len(one.shape) == 1 for one in flat):
        what = f"zero_stage is {stage!r} here, and fp32_flat_groups holds no flat tensors: not the form of ZeRO-3"
        raise input_error(what, str(path), _GATHER)
    if count != ranks:
        what = f"the weights were dealt to {count} ranks, and the files of {ranks} are here"
        raise input_error(what, str(path), _AGAIN)
    return cast("list[TensorInfo]", flat)


class _Slices:
    """One rank's flat tensors, read from the front to the back as one."""

    def __init__(self, path: Path, flat: list[TensorInfo]) -> None:
        self.path, self.flat = path, flat
        self._left = [(one, 0) for one in reversed(flat)]

    def take(self, count: int) -> Iterator[TensorInfo]:
        """The next values, in as many parts as flat tensors hold them."""
        while count:
            if not self._left:
                what = "param_shapes has more values than the flat tensors of this rank"
                raise input_error(what, str(self.path), _GATHER)
            one, start = self._left.pop()
            here = min(count, one.shape[0] - start)
            if here:
                yield part(one, start, here)
            if start + here < one.shape[0]:
                self._left.append((one, start + here))
            count -= here

    def finish(self) -> None:
        """Refuse values that no parameter claims."""
        if left := sum(one.shape[0] - start for one, start in self._left):
            what = f"{left:,} values of this rank's flat tensors belong to no parameter of param_shapes"
            raise input_error(what, str(self.path), _GATHER)


def part(info: TensorInfo, start: int, count: int) -> TensorInfo:
    """``count`` values of a flat tensor, from ``start`` on."""
    offset = info.offset + start * info.stride[0] * ITEMSIZE[info.dtype]
    return TensorInfo("", (count,), info.dtype, info.file, offset, info.stride, info.storage)


def _parameters(head: dict[str, Any], slices: list[_Slices], path: Path) -> dict[str, TensorInfo]:
    groups = head.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise input_error("param_shapes, the list of all parameters, is missing", str(path), _GATHER)
    made: dict[str, TensorInfo] = {}
    for name, said in ((n, s) for group in groups for n, s in group.items()):
        shape = _shape(name, said, path)
        count = -(-math.prod(shape) // len(slices))
        made[name] = joined_flat(name, shape, [list(one.take(count)) for one in slices], path)
    for one in slices:
        one.finish()
    return made


def _shape(name: Any, said: Any, path: Path) -> Shape:
    """A shape that a file tells. Raises MdlError (INPUT) for anything else."""
    sizes = cast("Shape", tuple(said)) if isinstance(said, tuple | list) else (-1,)
    if not isinstance(name, str) or not all(type(n) is int and n >= 0 for n in sizes):
        raise input_error(f"{str(name)[:200]} has no shape, but {str(said)[:200]!r}", str(path), _GATHER)
    return sizes


def _frozen(trees: list[dict[str, Any]], path: Path) -> dict[str, TensorInfo]:
    """Parameters that were not trained, which the model's files hold in slices."""
    shapes = _table(trees[0].get("frozen_param_shapes") or {}, path)
    held = [_table(tree.get("frozen_param_fragments") or {}, path) for tree in trees]
    for value in (one.get(name) for one in held for name in shapes):
        if not isinstance(value, TensorInfo) or len(value.shape) != 1:
            what = "frozen_param_fragments lacks a parameter of frozen_param_shapes"
            raise input_error(what, str(path), _GATHER)
    return {
        name: joined_flat(name, _shape(name, said, path), [[one[name]] for one in held], path)
        for name, said in shapes.items()
    }


def joined_flat(name: str, shape: Shape, parts: Sequence[Sequence[TensorInfo]], path: Path) -> TensorInfo:
    """A tensor whose values lie flat, in parts one behind another; what exceeds it at the end is padding."""
    pieces: list[Piece] = []
    at, whole = 0, math.prod(shape)
    for info in (info for rank in parts for info in rank):
        count = min(info.shape[0], whole - at)
        if count > 0:
            pieces.append(Piece((at,), part(info, 0, count)))
            at += count
    if at < whole:
        raise input_error(f"{name[:200]} has {whole:,} values, its slices hold {at:,}", str(path), _GATHER)
    file = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the name of the file
    dtype = pieces[0].info.dtype if pieces else "float32"
    return TensorInfo(name, shape, dtype, file, 0, dense(shape), f"{file}:{name}", pieces=tuple(pieces))


def _module(head: dict[str, Any], made: Mapping[str, TensorInfo], path: Path) -> dict[str, Any]:
    """The state dict in the module's own order: parameters, buffers, and second names of what is shared."""
    module, shared = _table(head.get("module"), path), _table(head.get("shared_params") or {}, path)
    whole: dict[str, Any] = {}
    for name, value in module.items():
        whole[name] = made.get(name) or made.get(shared.get(name, "")) or value
    return whole | {name: info for name, info in made.items() if name not in whole}


def universal_files(folder: Path) -> list[Path]:
    """The files with the float32 values of the universal form, each in a folder of its parameter's name, and behind
    them those with the model's description that its converter copies beside; none if this is none.

    Raises MdlError (INPUT) for a parameter whose values are missing.
    """
    below = folder / "zero" if (folder / "zero").is_dir() else Path(os.path.abspath(folder))  # noqa: PTH100 - as above
    if below.name != "zero" or not any(below.glob("*/fp32.pt")):
        return []
    made = [path / "fp32.pt" for path in sorted(below.iterdir()) if path.is_dir()]
    if missing := [file.parent.name for file in made if not file.is_file()]:
        what = f"there is no fp32.pt for {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
        raise input_error(what, str(below), _AGAIN)
    return made + sorted(path for path in below.parent.glob("*model_states.pt") if _is_description(path.name))


def _is_description(name: str) -> bool:
    return bool(_MODEL.fullmatch(name) or _WHOLE.fullmatch(name))


def read_universal(files: Sequence[Path], read: Read, notes: list[str]) -> dict[str, Any]:
    """The weights, by name. Raises MdlError (INPUT) with the file that is not of that form."""
    weights: dict[str, Any] = {}
    described = [path for path in files if _is_description(path.name)]
    for path in (path for path in files if path not in described):
        found = read(path)
        value = found.get("param") if isinstance(found, dict) else found
        if not isinstance(value, TensorInfo):
            raise input_error("this file holds no tensor under 'param'", str(path), _AGAIN)
        weights[path.parent.name] = value
    notes.append("the weights are the float32 values of a universal checkpoint; moments were not opened")
    if not described:
        notes.append("no *_model_states.pt lies beside zero: what was not trained, or is a buffer, would be there")
        return {"module": weights}
    return {"module": weights | _untrained(weights, described, [_table(read(path), path) for path in described])}


def _untrained(weights: Mapping[str, Any], files: Sequence[Path], trees: list[dict[str, Any]]) -> dict[str, Any]:
    """What the optimizer had no values of: frozen parameters and buffers.

    Raises MdlError (INPUT) where one is in parts, or a parameter is nowhere.
    """
    head, path = trees[0], files[0]
    frozen = {n: s for n, s in _table(head.get("frozen_param_shapes") or {}, path).items() if n not in weights}
    parts, module = [_table(tree.get("frozen_param_fragments") or {}, path) for tree in trees], head.get("module")
    found: dict[str, Any] = {}
    if frozen and _WHOLE.fullmatch(path.name) and len(trees) == 1:
        found = {name: parts[0].get(name) for name in frozen}
        for name, value in found.items():
            if not isinstance(value, TensorInfo) or value.shape != _shape(name, frozen[name], path):
                raise input_error(f"frozen_param_fragments does not hold {name[:200]} whole", str(path), _GATHER)
    elif frozen and all(_MODEL.fullmatch(file.name) for file in files):
        found = _frozen([{**tree, "frozen_param_shapes": frozen} for tree in trees], path)
    elif frozen:
        what = f"{len(frozen)} frozen parameters ({', '.join(sorted(frozen)[:3])} …) are in parts of several ranks"
        raise input_error(what, str(path), _GATHER)
    shared = _table(head.get("shared_params") or {}, path)
    groups = head.get("param_shapes") or []
    listed = [n for one in (groups if isinstance(groups, list) else [groups]) for n in _table(one, path)]
    if missing := [str(n) for n in listed if n not in weights and n not in found and n not in shared]:
        what = f"param_shapes has {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}, and zero no folder for it"
        raise input_error(what, str(path), _AGAIN)
    if len(trees) == 1 or all(_MODEL.fullmatch(file.name) for file in files):  # of one whole model
        names = head.get("buffer_names") or []
        values = module if isinstance(module, dict) else {}
        found |= {n: values[n] for n in names if isinstance(values.get(n), TensorInfo) and n not in weights}
    known = {**weights, **found}
    return found | {name: known[own] for name, own in shared.items() if own in known and name not in known}
