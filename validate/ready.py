"""A layout fit to be served: one whose verification passed, or a raw checkpoint made into one first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..convert.check import check_layout, quick_check
from ..convert.locks import reading
from ..convert.manifest import NAME, fingerprint, read_manifest
from ..convert.prepare import Options, Prepared, prepare
from ..convert.run import convert
from ..errors import Kind, MdlError, usage_error
from .report import green_report, save_report
from .verify import Settings, require_ok, verify


def ready_layout(
    path: Path,
    *,
    unverified: bool,
    say: Callable[[str], None],
    options: Options | None = None,
    tokenizer: str | None = None,
) -> Path:
    """The layout to serve; ``options`` and ``tokenizer`` are for a raw checkpoint, as `mdl convert` takes them.

    A layout must carry a green report, unless ``unverified``. Anything else is taken for a raw checkpoint: it is
    converted and verified in the cache, once. Raises MdlError: PARITY where a verification fails, INPUT where
    files were changed, USAGE for a layout that was never verified.
    """
    if not (path / NAME).is_file():
        return _from_checkpoint(path, options or Options(), tokenizer, unverified=unverified, say=say)
    named = (options or Options()).arch or ""
    if tokenizer is not None or (options or Options()) != Options(arch=named if named.endswith(".py") else None):
        what = "this is a layout: its family, values and tokenizer were settled when it was converted"
        do = (
            "leave --arch (unless it is a file with a class of your own), --set, --config, --weights, --dtype, "
            "--merge-lora and --tokenizer out, or convert the checkpoint again with them"
        )
        raise usage_error(what, str(path), do)
    _check(path, say)
    green, why = green_report(path)
    if not green and not unverified:
        raise usage_error(f"is not proven: {why}", str(path), f"run `mdl verify {path}` first, or pass --unverified")
    return path


def _check(layout: Path, say: Callable[[str], None]) -> None:
    """Raise MdlError (INPUT) if the layout is not what was written. What a glance shows is told before every byte is
    read, which costs little: vLLM reads the same bytes next, then from memory."""
    with reading(layout):
        say("checking the layout's files")
        manifest = read_manifest(layout)
        problems = quick_check(layout, manifest)
        if not problems:
            say("checking every byte of the weights")
            problems = check_layout(layout, manifest)
    if problems:
        raise MdlError(Kind.INPUT, problems)


def _from_checkpoint(
    path: Path, options: Options, tokenizer: str | None, *, unverified: bool, say: Callable[[str], None]
) -> Path:
    say("reading the checkpoint")
    prepared = prepare(path, options)
    prepared.plan.refuse()
    out = _cache() / f"{path.resolve().name}-{_key(prepared, tokenizer)}"
    if not (out / NAME).is_file():
        say(f"converting into {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
        convert(prepared, out, tokenizer=tokenizer)
    else:
        _check(out, say)
    if not unverified and not green_report(out)[0]:
        say("verifying")
        report = verify(out, Settings(arch=options.arch, command=f"mdl verify {out}"), say=say)
        save_report(report, out)
        require_ok(report)
    return out


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mdl"


def _key(prepared: Prepared, tokenizer: str | None) -> str:
    """Names the checkpoint's content, what was said of it, and mdl's version, so that none can change unnoticed."""
    options = prepared.options
    facts = [__version__, [fingerprint(Path(file)) for file in prepared.inventory.files]]
    values = dict(options.config.values) if options.config else None
    said = [options.arch, dict(options.given), options.weights, options.dtype, tokenizer, *([values] if values else [])]
    if any(said):  # a user's own family changes while it is written; a named tokenizer is told by its files' dates
        own = [fingerprint(Path(prepared.arch.file))] if prepared.arch.file else []
        facts += [said, own, prepared.mapping.sha256, _dates(tokenizer)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _dates(tokenizer: str | None) -> list[list[str | int]]:
    place = Path(tokenizer or "none")
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [[str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_size] for file in files if file.is_file()]
