"""`mdl convert`: a prepared checkpoint becomes a layout on the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import input_error
from .config import write_configs
from .manifest import NAME, Manifest, make_manifest
from .open import Checkpoint
from .prepare import Options, Prepared
from .shards import assign, index_json
from .sources import Files
from .tokenizer import TokenizerInfo, write_tokenizer
from .write import committed, write_shard

INDEX = "model.safetensors.index.json"
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
    progress: Callable[[int], None] = lambda _: None,
) -> Converted:
    """Write the layout. Raises MdlError; on any failure nothing is left at ``out``.

    ``tokenizer`` is a path, ``none``, or None for "the one beside the checkpoint, if there is exactly one".
    ``progress`` is called with the bytes written since the last call.
    """
    prepared.plan.refuse()
    begin = time.perf_counter()
    source, notes = choose_tokenizer(prepared.checkpoint, tokenizer)
    shards = assign(prepared.plan, max_shard_size)
    with committed(out, force=force, need=prepared.plan.nbytes + _SLACK) as folder:
        info = _tokenizer(source, folder, prepared)
        tensors: dict[str, dict[str, Any]] = {}
        with Files() as files:
            for shard in shards:
                hashes = write_shard(shard, folder, files, progress)
                for entry in shard.entries:
                    facts = {"file": shard.file, "dtype": entry.dtype, "shape": list(entry.shape)}
                    tensors[entry.name] = facts | {"xxh3": hashes[entry.name]}
        names = [*write_configs(folder, prepared.config, info, _generation(prepared)), *info.files]
        if len(shards) > 1:
            (folder / INDEX).write_text(index_json(shards), encoding="utf-8")
            names.append(INDEX)
        manifest = make_manifest(
            prepared,
            tensors=tensors,
            files={name: _sha256(folder / name) for name in names},
            options=dataclasses.asdict(options),
            tokenizer=dataclasses.asdict(info),
            notes=notes,
        )
        (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
    written = (*(shard.file for shard in shards), *names, NAME)
    return Converted(str(out), manifest, info, written, prepared.plan.nbytes, time.perf_counter() - begin)


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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
