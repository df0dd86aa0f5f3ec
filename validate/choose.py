"""What a verification compares with: the checkpoint that a layout came from, and the reference that runs on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..archs.base import Arch
from ..archs.given import ConfigFile
from ..convert.manifest import Manifest, fingerprint
from ..convert.prepare import DTYPES, Options, Prepared, prepare
from ..errors import input_error, usage_error
from .candidates import check_count
from .reference import Reference, builtin_reference, check_spec, rounded_to, user_reference

if TYPE_CHECKING:
    from .verify import Settings


def check_settings(settings: Settings) -> None:
    """Raise MdlError for what is wrong with the settings by themselves, before anything is read or started."""
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise usage_error(f"--dtype {settings.dtype}: not a type to serve in", do=f"one of: {', '.join(DTYPES)}")
    if settings.golden and (settings.prompts or settings.reference):
        raise usage_error("--golden has its own inputs and its own reference", do="leave --prompt and --reference out")
    if settings.reference_python and not settings.reference:
        raise usage_error("--reference-python needs --reference", do="name the code to run: FILE.py:FUNCTION")
    if settings.reference_timeout is not None and not settings.reference_python:
        do = "give --reference-python too: code in mdl's own process can't be ended alone"
        raise usage_error("--reference-timeout is for code in another process", do=do)
    if settings.reference_timeout is not None and settings.reference_timeout <= 0:
        raise usage_error(f"--reference-timeout {settings.reference_timeout}: not a time", do="give seconds")
    if settings.decide and not (settings.reference or settings.golden):
        do = "give your own forward, --reference FILE.py:FUNCTION, or --golden FILE: mdl's was told the same values"
        raise usage_error("--decide needs a forward pass that knows", do=do)
    check_count(settings.decide)
    if settings.reference:
        check_spec(settings.reference, settings.reference_python)
    if settings.against and not settings.against.exists():
        raise usage_error("--against: there is no such file or folder", str(settings.against), "check the path")


def source_of(manifest: Manifest, settings: Settings) -> Prepared:
    """The raw checkpoint that the layout came from, measured afresh: nothing is taken from the layout itself."""
    path = settings.against or Path(manifest.source["path"])
    if not path.exists():
        raise input_error("the checkpoint of this layout is not there any more", str(path), "give it: --against CKPT")
    prepared = prepare(path, said_now(manifest, settings))
    now = [fingerprint(Path(file)) for file in prepared.inventory.files]
    _check_same(now, manifest.source["files"], path, own=len(prepared.checkpoint.files))
    return prepared


def _check_same(now: list[dict[str, Any]], before: list[dict[str, Any]], path: Path, own: int) -> None:
    """Raise MdlError (INPUT) where files changed: the checkpoint's ``own``, or those of an adapter, which follow."""
    one, other = ([(f["size"], f["xxh3_ends"]) for f in files] for files in (now, before))
    if one[:own] != other[:own]:
        raise input_error("is not the checkpoint that this layout was made from", str(path), "convert it again")
    if one != other:
        files = ", ".join(f["file"] for f in now[own:])
        what = "is not the adapter that was merged into this layout"
        raise input_error(what, files, "give that one with --merge-lora, or convert again")


def said_now(manifest: Manifest, settings: Settings) -> Options:
    """The options that a layout was made with, but for what was moved since. Raises MdlError where that is not told."""
    before = manifest.options
    recorded = before.get("config")
    said = Options(
        arch=_arch(manifest, settings),
        given=before.get("given", {}),
        weights=before.get("weights"),
        dtype=before.get("dtype"),
        config=settings.config or (ConfigFile(recorded["path"], recorded["values"]) if recorded else None),
        merge_lora=before.get("merge_lora"),
    )
    if settings.merge_lora:
        if not said.merge_lora:
            do = "convert again with --merge-lora"
            raise usage_error("--merge-lora: no adapter was merged into this layout", settings.merge_lora, do)
        return replace(said, merge_lora=settings.merge_lora)
    if said.merge_lora and not Path(said.merge_lora).exists():
        what = "the adapter that was merged into this layout is not there any more"
        raise input_error(what, said.merge_lora, "give it: --merge-lora PATH")
    return said


def _arch(manifest: Manifest, settings: Settings) -> str | None:
    """The family as it is named now, or as it was when the layout was made. A file's code runs only if it is named now:
    the layout may be a stranger's."""
    said = manifest.options.get("arch")
    if settings.arch or not said or not said.endswith(".py"):
        return settings.arch or said
    gone = "" if Path(said).is_file() else ", which is not there any more"
    what = f"this layout was made with the architecture file {said}{gone}; code runs only where it is named"
    raise usage_error(what, manifest.source["path"], "if you trust that file: mdl verify LAYOUT --arch FILE.py")


def mapping_note(manifest: Manifest, prepared: Prepared) -> tuple[str, ...]:
    """A word where the mapping is not the one that made the layout: the `layout` check shows what follows from it."""
    if manifest.mapping.get("sha256") == prepared.mapping.sha256:
        return ()
    return (f"{prepared.mapping.path} is not the mapping that this layout was made with: another sha256",)


def linked_reference(arch: Arch) -> str:
    """The family's ``reference``, with its path from here."""
    file, _, function = arch.reference.rpartition(":")
    return f"{os.path.normpath(Path(arch.file).parent / file)}:{function}"


def choose_reference(prepared: Prepared, settings: Settings, prompts: Sequence[Sequence[int]] = ()) -> Reference:
    """The golden file, the user's code (here or in another Python), or the family's own eager module, in that order."""
    checkpoint = Path(prepared.inventory.path)
    if settings.golden:
        from .golden import golden_reference

        golden = golden_reference(settings.golden, files=[Path(file) for file in prepared.checkpoint.files])
        recorded = golden.inputs.seed if golden.inputs else None
        if settings.seed not in (None, recorded):
            what = f"--seed {settings.seed}, but the golden file's inputs are those of seed {recorded}"
            raise usage_error(what, str(settings.golden), "leave --seed out, or record it again with that seed")
        return golden
    if settings.reference and settings.reference_python:
        from .golden import TIMEOUT, foreign_reference

        return foreign_reference(
            settings.reference,
            checkpoint,
            settings.reference_python,
            prepared,
            settings.seed or 0,
            prompts=prompts,
            timeout=settings.reference_timeout or TIMEOUT,
        )
    if settings.reference:
        return user_reference(settings.reference, checkpoint, rounded=rounded_to(prepared.plan))
    if prepared.arch.reference:
        spec = linked_reference(prepared.arch)
        check_spec(spec)
        return user_reference(spec, checkpoint, rounded=rounded_to(prepared.plan))
    if not prepared.arch.eager:
        do = "give your own code: --reference FILE.py:FUNCTION"
        raise input_error(f"{prepared.arch.name} has no forward of its own", prepared.arch.file, do)
    return builtin_reference(prepared.arch, prepared.dims, prepared.plan)
