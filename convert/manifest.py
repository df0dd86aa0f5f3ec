"""mdl.json: where every tensor of a layout came from, by which operations, and the hash of its bytes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any, cast

from msgspec import Struct, field
from msgspec.structs import asdict

from .. import __version__
from ..archs.base import Value
from ..errors import input_error
from ..mappings import moves, parts, quantised, values
from ..mappings.expand import Join
from ..mappings.jsonable import plain, strict_loads, to_json
from ..mappings.ops import Op
from ..mappings.tensors import Made, TensorInfo
from .plan import Source, Step
from .prepare import Prepared

NAME = "mdl.json"
FORMAT = 1
_OPS: dict[str, type[Op]] = {
    cls.name: cls
    for module in (moves, parts, quantised, values)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Op) and cls.name
}


class Manifest(Struct, frozen=True):
    """The record that a layout carries.

    ``source`` names the checkpoint's files with size and fingerprint; ``dims`` holds value, source and reason of
    each; ``steps`` are the plan's, complete enough to run it backwards without the checkpoint; ``tensors`` maps a
    target to its file, dtype, shape and xxh3-128; ``files`` maps every other file of the layout to its sha256;
    ``values`` names the tensors whose values are broken or strange (see :func:`.values_judged.judge`); ``agreement`` is
    the digest of what all runs that wrote it agreed on (see :mod:`.agreement`). In the file stands also ``digest``, the
    sha256 of all the rest, so that an edited record is noticed.
    """

    mdl: str
    arch: str
    because: tuple[str, ...]
    target: str
    source: Map[str, Any]
    mapping: Map[str, str]
    dims: Map[str, Map[str, Any]]
    dtype: str
    options: Map[str, Any]
    plan: str
    steps: tuple[Map[str, Any], ...]
    tensors: Map[str, Map[str, Any]]
    files: Map[str, str]
    tokenizer: Map[str, Any] = field(default_factory=dict[str, Any])
    values: Map[str, Map[str, Any]] = field(default_factory=dict[str, Map[str, Any]])
    notes: tuple[str, ...] = ()
    agreement: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of mdl.json."""
        content = plain(self)
        return to_json({**content, "digest": digest_of(content)})

    def dim_values(self) -> dict[str, Value]:
        """The dims as plain values: what an eager reference is built from."""
        return {name: dim["value"] for name, dim in self.dims.items()}


def read_manifest(layout: Path) -> Manifest:
    """The manifest of a layout. Raises MdlError (INPUT) if there is none, it is not one, or it was edited."""
    path = layout / NAME
    if not path.is_file():
        do = "give the folder that mdl convert wrote; there is none yet? mdl convert CKPT FOLDER"
        what = f"holds no {NAME}, so mdl did not write it"
        if not layout.is_dir():
            what = "this is a file, not a layout" if layout.exists() else "there is no such folder"
        raise input_error(what, str(layout), do)
    try:
        data = cast("dict[str, Any]", strict_loads(path.read_text(encoding="utf-8")))
        if data.get("format") != FORMAT:
            raise input_error(f"manifest format {data.get('format')}, this mdl reads {FORMAT}", str(path))
        if data.pop("digest", None) != digest_of(data):
            what = "this manifest was edited after mdl convert wrote it: its digest is not that of its content"
            raise input_error(what, str(path), "convert again; to change a layout, convert with other options")
        manifest = Manifest(**data)
        _check_names(manifest)
        return manifest
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise input_error(f"not a manifest: {error}", str(path), "convert again") from error


def _check_names(manifest: Manifest) -> None:
    """Raise ValueError, TypeError or AttributeError where the tables of files are not what they should be. A layout may
    be a stranger's: no name may lead out of its folder."""
    for fact in manifest.tensors.values():
        if not set(fact) >= {"file", "dtype", "shape", "xxh3"} or not isinstance(fact["shape"], list):
            raise ValueError("a tensor has no file, dtype, shape or xxh3")
    for name in {*manifest.files, *(fact["file"] for fact in manifest.tensors.values())}:
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(f"it names a file outside its folder: {name!r}")


def digest_of(content: Map[str, Any]) -> str:
    """The sha256 of a document's JSON in one fixed spelling: other spacing or another order of keys is no change."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_manifest(
    prepared: Prepared,
    *,
    tensors: Map[str, Map[str, Any]],
    files: Map[str, str],
    options: Map[str, Any],
    tokenizer: Map[str, Any],
    values: Map[str, Map[str, Any]],
    notes: tuple[str, ...] = (),
    agreement: str = "",
) -> Manifest:
    """Put the record together after everything else is written."""
    inventory, mapping = prepared.inventory, prepared.mapping
    steps = tuple(describe_step(step) for step in prepared.plan.steps)
    return Manifest(
        mdl=__version__,
        arch=prepared.arch.name,
        because=prepared.match.because,
        target=prepared.target,
        source={
            "path": inventory.path,
            "format": inventory.format,
            "wrapper": list(inventory.wrapper),
            "prefixes": list(inventory.prefixes),
            "ranks": inventory.ranks,
            "parts": inventory.parts,
            "experts": inventory.experts,
            "files": [fingerprint(Path(file)) for file in inventory.files],
            "order": list(inventory.tensors),
            "extras": plain(inventory.extras),
        },
        mapping={"file": Path(mapping.path).name, "sha256": mapping.sha256},
        dims={name: asdict(dim) for name, dim in prepared.dims.entries.items()},
        dtype=prepared.plan.dtype,
        options=options,
        plan=plan_digest(steps),
        steps=steps,
        tensors=tensors,
        files=files,
        tokenizer=tokenizer,
        values=values,
        notes=(*inventory.notes, *notes),
        agreement=agreement,
    )


def plan_digest(steps: Iterable[Map[str, Any]]) -> str:
    """The sha256 of described steps. Where the checkpoint lies does not change it: only its files' names count."""
    text = json.dumps([_without_folders(step) for step in steps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_folders(step: Map[str, Any]) -> dict[str, Any]:
    def named(rank: Map[str, Any]) -> dict[str, Any]:
        return {**rank, "file": Path(rank["file"]).name}

    return {**step, "sources": [{**s, "ranks": [named(rank) for rank in s["ranks"]]} for s in step["sources"]]}


def fingerprint(path: Path) -> dict[str, Any]:
    """Name, size and the xxh3-128 of a file's first and last MiB: cheap, and enough to notice another file."""
    import xxhash

    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        if size > 1 << 20:
            file.seek(max(size - (1 << 20), 1 << 20))
            digest.update(file.read(1 << 20))
    return {"file": str(path), "size": size, "xxh3_ends": digest.hexdigest()}


def describe_step(step: Step) -> dict[str, Any]:
    """A step as plain JSON values."""
    return {
        "kind": step.kind,
        "targets": list(step.targets),
        "shapes": [list(s) for s in step.shapes],
        "dtype": step.dtype,
        "source_dtype": step.source_dtype,
        "sources": [_describe_source(source) for source in step.sources],
        "ops": [describe_op(op) for op in step.ops],
        "rule": step.rule.rpartition("/")[2],  # the folder depends on where mdl was called from
        "reason": step.reason,
    }


@functools.cache
def describe_op(op: Op) -> dict[str, Any]:
    """An operation as ``{"op": name, **arguments}``. Layers share theirs: the answer is not to be changed."""
    return {"op": op.name, **{name: _described(argument) for name, argument in asdict(op).items()}}


def _described(argument: Any) -> Any:
    if isinstance(argument, Op):
        return describe_op(argument)
    if isinstance(argument, tuple):
        return [_described(a) for a in cast("tuple[Any, ...]", argument)]
    return plain(argument)


def revive_op(data: Map[str, Any]) -> Op:
    """The operation that :func:`describe_op` described."""
    return _OPS[data["op"]](**{name: _revived(v) for name, v in data.items() if name != "op"})


def _revived(argument: Any) -> Any:
    if isinstance(argument, dict):  # the only tables among arguments are operations
        return revive_op(cast("dict[str, Any]", argument))
    return tuple(_revived(a) for a in cast("list[Any]", argument)) if isinstance(argument, list) else argument


def revive_join(data: Map[str, Any] | None) -> Join | None:
    """The join of a described source."""
    if not data:
        return None
    return Join(data["how"], data["where"], data["axis"], tuple(data["sizes"]), tuple(data.get("view", ())))


def _describe_source(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "shape": list(source.shape),
        "join": plain(source.join) if source.join else None,
        "ranks": [_describe_stored(info) for info in source.infos],
    }


def _describe_stored(info: TensorInfo) -> dict[str, Any]:
    made = {"made": _describe_made(info.made)} if info.made else {}
    return {"rank": info.rank, "raw": info.raw, "shape": list(info.shape), "file": info.file, **made}


def _describe_made(made: Made) -> dict[str, Any]:
    """By what a whole is made of which parts. Their files' folders are among the source's files."""
    parts = [
        {
            "raw": i.raw,
            "shape": list(i.shape),
            "dtype": i.dtype,
            "file": Path(i.file).name,
            **({"made": _describe_made(i.made)} if i.made else {}),
        }
        for i in made.parts
    ]
    return {"how": made.how, "scale": plain(made.scale), "turned": made.turned, "parts": parts}
