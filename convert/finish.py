"""Everything around the weights: tokenizer, config, index and manifest, which turn weight files into a layout."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import asdict

from ..errors import input_error
from ..mappings.jsonable import plain
from .agreement import Agreement
from .check import INDEX
from .commit import Workplace, flush
from .config import write_configs
from .manifest import NAME, Manifest, digest_of, make_manifest
from .open import Checkpoint
from .prepare import Prepared
from .receipts import Written
from .shards import Entry, Shard, index_json
from .tokenizer import READY, TokenizerInfo, is_pair, write_tokenizer
from .values_judged import Allow, judge


class Request(Struct, frozen=True):
    """What is to be made: of which checkpoint and options, with which tokenizer."""

    prepared: Prepared
    tokenizer: str
    notes: tuple[str, ...]
    allow: Allow
    sync: bool


class Beside(Struct, frozen=True):
    """The tokenizer's files, made in a folder of their own before a byte of the weights is copied."""

    folder: Path
    info: TokenizerInfo
    digest: str


class Layout(Struct, frozen=True):
    """What a finished folder holds."""

    manifest: Manifest
    files: tuple[str, ...]


def finish(
    request: Request,
    agreement: Agreement,
    written: Mapping[str, list[Written]],
    beside: Beside,
    place: Workplace,
) -> Layout:
    """Write what lies beside the weights. ``written`` tells of every weight file, by its name.

    Raises MdlError (INPUT) for values that may not be written.
    """
    folder, prepared, info = place.layout, request.prepared, beside.info
    pairs = pair_up(agreement.shards, written)
    values = judge(((entry, one.values) for _, entry, one in pairs), request.allow)
    for name in info.files:
        shutil.copyfile(beside.folder / name, folder / name)
    names = [*write_configs(folder, prepared.config, info, _generation(prepared)), *info.files]
    if len(agreement.shards) > 1:
        (folder / INDEX).write_text(index_json(agreement.shards), encoding="utf-8")
        names.append(INDEX)
    manifest = make_manifest(
        prepared,
        tensors={entry.name: _facts(shard, entry, one) for shard, entry, one in pairs},
        files={name: _sha256(folder / name) for name in names},
        options=plain(request.prepared.options),
        tokenizer=asdict(info),
        values=values,
        notes=(*request.notes, *place.notes),
        agreement=agreement.whole,
    )
    (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
    if request.sync:
        _flush([*names, NAME], folder)
    return Layout(manifest, (*(shard.file for shard in agreement.shards), *names, NAME))


def pair_up(shards: tuple[Shard, ...], written: Mapping[str, list[Written]]) -> list[tuple[Shard, Entry, Written]]:
    """Every tensor with its file and what is known of it, in the plan's order."""
    return [
        (shard, entry, one) for shard in shards for entry, one in zip(shard.entries, written[shard.file], strict=True)
    ]


def _facts(shard: Shard, entry: Entry, one: Written) -> dict[str, Any]:
    return {"file": shard.file, "dtype": entry.dtype, "shape": list(entry.shape), "xxh3": one.xxh3}


def choose_tokenizer(checkpoint: Checkpoint, given: str | None) -> tuple[str, tuple[str, ...]]:
    """Which tokenizer to write, and what to say about the choice. Several beside the checkpoint are a question."""
    if given is not None:
        return given, ()
    found = checkpoint.tokenizers
    if not found:
        return "none", ("no tokenizer lies beside the checkpoint: the layout takes token ids (give --tokenizer PATH)",)
    ready = [file for file in found if Path(file).name == READY]
    if len(found) > 1 and not ready and not is_pair(found):
        what = f"several tokenizers lie beside the checkpoint: {', '.join(found)}"
        raise input_error(what, checkpoint.path, "choose one with --tokenizer PATH")
    only = next(iter(ready or found))
    others = [Path(file).name for file in found if file != only]
    left = f"; it is ready, so {', '.join(others)} beside it was not read" if ready and others else ""
    folders = (Path(checkpoint.path), Path(checkpoint.path).parent, *(Path(file).parent for file in checkpoint.files))
    near = folders[:1] if folders[0].is_dir() else folders[1:]
    parent = Path(only).parent
    where = "beside the checkpoint" if parent in near else "in the folder above the checkpoint"
    if parent not in (*folders, *(folder.parent for folder in folders)):
        where = f"in {os.path.relpath(parent, near[-1])}"
    return only, (f"tokenizer: {Path(only).name}, found {where}{left}",)


@contextlib.contextmanager
def tokenizer_made(request: Request) -> Generator[Beside]:
    """The tokenizer comes first: what is wrong with it is told before an hour of copying, and by every part."""
    context = request.prepared.dims.get("context")
    with tempfile.TemporaryDirectory(prefix="mdl-") as scratch:
        folder = Path(scratch)
        info = write_tokenizer(
            request.tokenizer,
            folder,
            model_vocab=request.prepared.dims.integer("vocab"),
            context=context if isinstance(context, int) else None,
        )
        yield Beside(folder, info, digest_of({name: _sha256(folder / name) for name in info.files}))


def _generation(prepared: Prepared) -> dict[str, Any] | None:
    """The generation_config.json beside the checkpoint: the stop tokens and sampling settings of its makers."""
    found = prepared.inventory.extras.get("generation_config")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _flush(names: list[str], folder: Path) -> None:
    """To the disk before the rename, or a power cut leaves a layout with empty files. The weights are there already."""
    for name in names:
        flush(folder / name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
