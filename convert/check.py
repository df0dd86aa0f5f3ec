"""`mdl check`: a layout against its manifest, offline. Finds a flipped bit, a missing shard, an edited config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MdlError, Problem
from ..mappings.tensors import TensorInfo
from .manifest import Manifest
from .safetensors_file import read_safetensors

_CHUNK = 4 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def check_layout(layout: Path, manifest: Manifest, progress: Callable[[int], None] = lambda _: None) -> list[Problem]:
    """Every way in which the folder differs from its manifest: files, headers, index, and every tensor's bytes."""
    problems = _check_files(layout, manifest)
    stored, more = _read_headers(layout, manifest)
    problems += more
    for name, fact in manifest.tensors.items():
        info = stored.pop(name, None)
        if info is None:
            if not any(fact["file"] in p.where for p in more):
                problems.append(Problem(f"{name} is not there", str(layout / fact["file"]), "convert again"))
        else:
            problems += _check_tensor(info, fact, progress)
    problems += [Problem(f"{name} is in no manifest", info.file, "convert again") for name, info in stored.items()]
    return problems


def _check_files(layout: Path, manifest: Manifest) -> list[Problem]:
    problems: list[Problem] = []
    for name, digest in manifest.files.items():
        path = layout / name
        if not path.is_file():
            problems.append(Problem("is missing", str(path), "convert again"))
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(Problem("was changed after mdl convert wrote it", str(path), "convert again"))
    known = {fact["file"] for fact in manifest.tensors.values()}
    for path in sorted(layout.iterdir()):  # vLLM loads every weight file that it finds, or those of an index
        if path.name.endswith(_WEIGHTS) and path.name not in known and path.name not in manifest.files:
            problems.append(Problem("was not written by mdl convert, and vLLM would read it", str(path), "move it"))
    return problems


def _read_headers(layout: Path, manifest: Manifest) -> tuple[dict[str, TensorInfo], list[Problem]]:
    stored: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for file in sorted({fact["file"] for fact in manifest.tensors.values()}):
        path = layout / file
        if not path.is_file():
            problems.append(Problem("is missing", str(path), "convert again"))
            continue
        try:
            stored |= read_safetensors(path)[0]
        except MdlError as error:
            problems += error.problems
    return stored, problems


def _check_tensor(info: TensorInfo, fact: Mapping[str, Any], progress: Callable[[int], None]) -> list[Problem]:
    where = f"{info.file}: {info.name}"
    if [info.dtype, list(info.shape)] != [fact["dtype"], list(fact["shape"])]:
        what = f"is {info.dtype} {list(info.shape)}, the manifest says {fact['dtype']} {fact['shape']}"
        return [Problem(what, where, "convert again")]
    if _hash_range(info, progress) != fact["xxh3"]:
        return [
            Problem(
                "the bytes are not those that were written", where, "the disk or a program changed them: convert again"
            )
        ]
    return []


def _hash_range(info: TensorInfo, progress: Callable[[int], None]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with Path(info.file).open("rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
            progress(len(chunk))
    return digest.hexdigest()
