"""`mdl check`: a layout against its manifest, offline. Finds a flipped bit, a missing shard, an edited config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import MdlError, Problem
from ..mappings.jsonable import strict_loads
from ..mappings.tensors import TensorInfo
from .manifest import Manifest
from .safetensors_file import check_index, read_safetensors

INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 20
_AGAIN = "convert again"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
_READ = frozenset(
    {
        "adapter_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "config_sentence_transformers.json",
        "generation_config.json",
        "hf_quant_config.json",
        "merges.txt",
        "modules.json",
        "params.json",
        "preprocessor_config.json",
        "processor_config.json",
        "quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tekken.json",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Beside the weights, what vLLM, or the tokenizer that it makes, reads from a folder where it lies there."""

Headers = dict[str, list[TensorInfo]]
"""By name, every place where a header of the layout holds a tensor. There should be one."""


def check_layout(layout: Path, manifest: Manifest, progress: Callable[[int], None] = lambda _: None) -> list[Problem]:
    """Every way in which the folder differs from its manifest: files, headers, index, and every tensor's bytes.

    ``progress`` is called with the bytes hashed since the last call.
    """
    return _checked(layout, manifest, lambda info, fact: _check_bytes(info, fact, progress))


def quick_check(layout: Path, manifest: Manifest) -> list[Problem]:
    """The same without the tensors' bytes: small files' hashes, sizes, headers, index. Milliseconds, whatever the
    size; a flipped bit in a weight is not seen."""
    return _checked(layout, manifest, lambda info, fact: [])


def unreadable(layout: Path, manifest: Manifest) -> list[Problem]:
    """Files that are missing, and weight files that are cut short or whose header lies: nothing runs without them."""
    missing = [layout / name for name in manifest.files if not (layout / name).is_file()]
    return [*(Problem("is missing", str(path), _AGAIN) for path in missing), *_read_headers(layout, manifest)[1]]


def _checked(
    layout: Path, manifest: Manifest, check_bytes: Callable[[TensorInfo, Mapping[str, Any]], list[Problem]]
) -> list[Problem]:
    problems = _check_files(layout, manifest)
    stored, broken = _read_headers(layout, manifest)
    problems += [*broken, *_check_index(layout, stored, {Path(p.where).name for p in broken})]
    for name, fact in manifest.tensors.items():
        places = stored.pop(name, [])
        if not places and not any(fact["file"] in p.where for p in broken):
            problems.append(Problem(f"{name} is not there", str(layout / fact["file"]), _AGAIN))
        for info in places:
            problems += _check_header(info, fact) or check_bytes(info, fact)
    problems += [Problem(f"{n} is in no manifest", i.file, _AGAIN) for n, places in stored.items() for i in places]
    return problems


def _check_files(layout: Path, manifest: Manifest) -> list[Problem]:
    problems: list[Problem] = []
    for name, digest in manifest.files.items():
        path = layout / name
        if not path.is_file():
            problems.append(Problem("is missing", str(path), _AGAIN))
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(Problem("was changed after mdl convert wrote it", str(path), _AGAIN))
    known = {*manifest.files, *_weight_files(manifest)}
    for path in sorted(layout.iterdir()):  # vLLM loads every weight file that it finds, or those of an index
        if path.name not in known and (path.name.endswith(_WEIGHTS) or path.name in _READ):
            problems.append(Problem("was not written by mdl convert, and vLLM would read it", str(path), "move it"))
    return problems


def _weight_files(manifest: Manifest) -> list[str]:
    return sorted({fact["file"] for fact in manifest.tensors.values()})


def _read_headers(layout: Path, manifest: Manifest) -> tuple[Headers, list[Problem]]:
    stored: Headers = {}
    problems: list[Problem] = []
    for file in _weight_files(manifest):
        path = layout / file
        if not path.is_file():
            problems.append(Problem("is missing", str(path), _AGAIN))
            continue
        try:
            for name, info in read_safetensors(path)[0].items():
                stored.setdefault(name, []).append(info)
        except MdlError as error:
            problems += error.problems
    return stored, problems


def _check_index(layout: Path, stored: Headers, broken: set[str]) -> list[Problem]:
    """The index against the headers, entry by entry, but for those of broken files, which have been told already."""
    path = layout / INDEX
    if not path.is_file():
        return []
    try:
        found = cast("dict[str, str]", strict_loads(path.read_text(encoding="utf-8"))["weight_map"])
        named = {name: str(file) for name, file in found.items() if file not in broken}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [Problem("is not an index: it has no weight_map of tensor names to file names", str(path), _AGAIN)]
    try:
        check_index(path, named, {name: [Path(i.file).name for i in places] for name, places in stored.items()})
    except MdlError as error:
        return list(error.problems)
    return []


def _check_header(info: TensorInfo, fact: Mapping[str, Any]) -> list[Problem]:
    where = f"{info.file}: {info.name}"
    if Path(info.file).name != fact["file"]:
        return [Problem(f"is in another file than the manifest says: {fact['file']}", where, _AGAIN)]
    if [info.dtype, list(info.shape)] != [fact["dtype"], list(fact["shape"])]:
        what = f"is {info.dtype} {list(info.shape)}, the manifest says {fact['dtype']} {fact['shape']}"
        return [Problem(what, where, _AGAIN)]
    return []


def _check_bytes(info: TensorInfo, fact: Mapping[str, Any], progress: Callable[[int], None]) -> list[Problem]:
    with Path(info.file).open("rb") as file:
        if hash_range(file, info.offset, info.nbytes, progress) == fact["xxh3"]:
            return []
    do = "the disk or a program changed them: convert again"
    return [Problem("the bytes are not those that were written", f"{info.file}: {info.name}", do)]


def hash_range(file: BinaryIO, offset: int, nbytes: int, progress: Callable[[int], None] = lambda _: None) -> str:
    """The xxh3-128 of a range of a file, or of what there is of it."""
    import xxhash

    digest = xxhash.xxh3_128()
    file.seek(offset)
    while nbytes:
        chunk = file.read(min(nbytes, _CHUNK))
        if not chunk:
            break
        digest.update(chunk)
        nbytes -= len(chunk)
        progress(len(chunk))
    return digest.hexdigest()
