"""`mdl convert`: a prepared checkpoint becomes a layout on the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import input_error, usage_error
from .check import INDEX
from .commit import committed
from .config import write_configs
from .manifest import NAME, Manifest, make_manifest
from .open import Checkpoint
from .prepare import Options, Prepared
from .shards import Shard, assign, index_json
from .sources import Files
from .tokenizer import TokenizerInfo, write_tokenizer
from .values_judged import Allow, judge
from .write import Progress, Written, write_shard

STRICT = Allow()
_SLACK = 64 << 20  # tokenizer, config, file system blocks


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    out: str
    manifest: Manifest
    tokenizer: TokenizerInfo
    files: tuple[str, ...]
    nbytes: int
    seconds: float


def convert(
    prepared: Prepared,
    out: Path,
    *,
    options: Options,
    tokenizer: str | None = None,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    allow: Allow = STRICT,
    progress: Progress = lambda _: None,
) -> Converted:
    """Write the layout. Raises MdlError; on any failure nothing is left at ``out``.

    ``tokenizer`` is a path, ``none``, or None for "the one beside the checkpoint, if there is exactly one".
    ``allow`` says which broken values may be written; ``progress`` is called with the bytes written since the last
    call.
    """
    prepared.plan.refuse()
    _keep_source(prepared.inventory.files, out)
    begin = time.perf_counter()
    source, notes = choose_tokenizer(prepared.checkpoint, tokenizer)
    shards = assign(prepared.plan, max_shard_size)
    with committed(out, force=force, need=prepared.plan.nbytes + _SLACK) as scratch:
        folder = scratch.path
        info = _tokenizer(source, folder, prepared)
        written = _write_weights(shards, folder, progress)
        values = judge(((one.entry, one.values) for shard in written for one in written[shard]), allow)
        names = [*write_configs(folder, prepared.config, info, _generation(prepared)), *info.files]
        if len(shards) > 1:
            (folder / INDEX).write_text(index_json(shards), encoding="utf-8")
            names.append(INDEX)
        manifest = make_manifest(
            prepared,
            tensors={one.entry.name: _facts(shard, one) for shard in written for one in written[shard]},
            files={name: _sha256(folder / name) for name in names},
            options=dataclasses.asdict(options),
            tokenizer=dataclasses.asdict(info),
            values=values,
            notes=(*notes, *scratch.notes),
        )
        (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
        _flush([*names, NAME], folder)
    files = (*(shard.file for shard in shards), *names, NAME)
    return Converted(str(out), manifest, info, files, prepared.plan.nbytes, time.perf_counter() - begin)


def _keep_source(files: tuple[str, ...], out: Path) -> None:
    """Raise MdlError (USAGE) if the checkpoint lies in the folder that ``--force`` would replace."""
    inside = next((file for file in files if Path(file).resolve().is_relative_to(out.resolve())), None)
    if inside is not None and out.is_dir():
        raise usage_error("holds the checkpoint itself, which would be lost", str(out), "choose another name")


def _write_weights(shards: tuple[Shard, ...], folder: Path, progress: Progress) -> dict[str, list[Written]]:
    """Every weight file, by its name."""
    with Files() as files:
        return {shard.file: write_shard(shard, folder, files, progress) for shard in shards}


def _facts(file: str, one: Written) -> dict[str, Any]:
    entry = one.entry
    return {"file": file, "dtype": entry.dtype, "shape": list(entry.shape), "xxh3": one.xxh3}


def choose_tokenizer(checkpoint: Checkpoint, given: str | None) -> tuple[str, tuple[str, ...]]:
    """Which tokenizer to write, and what to say about the choice. Several beside the checkpoint are a question."""
    if given is not None:
        return given, ()
    found = checkpoint.tokenizers
    if not found:
        return "none", ("no tokenizer lies beside the checkpoint: the layout takes token ids (give --tokenizer PATH)",)
    only, *others = found
    if others:
        what = f"several tokenizers lie beside the checkpoint: {', '.join(found)}"
        raise input_error(what, checkpoint.path, "choose one with --tokenizer PATH")
    return only, (f"tokenizer: {Path(only).name}, found beside the checkpoint",)


def _generation(prepared: Prepared) -> dict[str, Any] | None:
    """The generation_config.json beside the checkpoint: the stop tokens and sampling settings of its makers."""
    found = prepared.inventory.extras.get("generation_config")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _tokenizer(source: str, folder: Path, prepared: Prepared) -> TokenizerInfo:
    context = prepared.dims.get("context")
    return write_tokenizer(
        source,
        folder,
        model_vocab=prepared.dims.integer("vocab"),
        context=context if isinstance(context, int) else None,
    )


def _flush(names: list[str], folder: Path) -> None:
    """To the disk before the rename, or a power cut leaves a layout with empty files. The weights are there already."""
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
