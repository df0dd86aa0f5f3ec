"""Which families there are, and which one a checkpoint belongs to. The registry is the folder."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..errors import MdlError, input_error, machine_error, usage_error
from .base import Arch, Inventory, Match
from .guard import guarded
from .installed import family_points
from .own_file import import_file, import_root
from .refused import refuse

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_NOT_FAMILIES = {"__init__", "base", "given", "guard", "installed", "own_file", "refused", "registry", "settings"}


@lru_cache(maxsize=1)
def all_archs() -> dict[str, Arch]:
    """Every family by name: the files of this folder, then installed packages with an ``mdl.archs`` entry point."""
    folder = Path(__file__).parent
    stems = sorted(path.stem for path in folder.glob("*.py") if path.stem not in _NOT_FAMILIES)
    found = {stem: _arch_of(importlib.import_module(f".{stem}", __package__), stem) for stem in stems}
    for point in family_points():
        module = _imported(point)
        arch = _arch_of(module, point.name)
        if arch.name in found:
            raise machine_error(f"two architectures are called {arch.name}", point.value, "uninstall one of them")
        mapping = arch.mapping or str(Path(str(module.__file__)).with_suffix(".yaml"))
        found[arch.name] = guarded(replace(arch, mapping=mapping), str(module.__file__), named=False)
    return found


def _imported(point: EntryPoint) -> ModuleType:
    try:
        return importlib.import_module(point.module)
    except Exception as error:
        what = f"the installed architecture {point.name} raised {type(error).__name__}: {error}"
        raise machine_error(what, point.value, "mend or uninstall the package that brings it") from error


def load_arch(spec: str) -> Arch:
    """The family named on the command line: a name from ``mdl archs``, or a file that defines ARCH.

    A file's code runs: it is the user's own. Raises MdlError (USAGE) for an unknown name, INPUT for a bad file.
    """
    if not spec.endswith(".py"):
        archs = all_archs()
        if spec not in archs:
            raise usage_error(f"no architecture {spec!r}", do=f"one of: {', '.join(archs)}; or a path to a .py file")
        return archs[spec]
    path = Path(spec).resolve()
    if not path.is_file():
        raise usage_error(f"--arch {spec}: no such file")
    arch = _arch_of(import_file(path), str(path))
    mapping = arch.mapping or str(path.with_suffix(".yaml"))
    return guarded(replace(arch, mapping=mapping, root=str(import_root(path))), str(path), named=True)


def mapping_path(arch: Arch) -> Path:
    """Where the family's mapping file lies."""
    return Path(arch.mapping) if arch.mapping else Path(__file__).parent.parent / "mappings" / f"{arch.name}.yaml"


_TRANSFORMERS = re.compile(
    r"((^|\.)layers\.0\.self_attn\.[qkv]_proj|^gpt_neox\.layers\.0\.attention\.query_key_value"
    r"|(^|\.)h\.0\.self_attention\.query_key_value)\.weight$"
)
"""Names of an attention that many classes of transformers share."""


def detect(inventory: Inventory, archs: Iterable[Arch] | None = None) -> Match:
    """The one family that recognises the checkpoint. Raises MdlError (INPUT) for none, for several, and for what is
    known to have no way to vLLM, unless a user's own family recognises it."""
    candidates = list(archs if archs is not None else all_archs().values())
    matches = [Match(arch, because) for arch in candidates if (because := evidence(arch, inventory))]
    if not any(match.arch.file for match in matches):
        refuse(inventory)
    if not matches:
        raise _nothing(inventory, candidates)
    if len(matches) > 1:
        names = ", ".join(match.arch.name for match in matches)
        what = f"could be any of {names} ({_reasons(matches)})"
        raise input_error(what, inventory.path, "say which with --arch NAME")
    return matches[0]


def _reasons(matches: Iterable[Match]) -> str:
    """Why each of several families, families with the same reasons together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for match in matches:
        groups.setdefault(match.because, []).append(match.arch.name)
    if len(groups) == 1:
        return "; ".join(next(iter(groups)))
    return " / ".join(f"{', '.join(names)}: {'; '.join(because)}" for because, names in groups.items())


def evidence(arch: Arch, inventory: Inventory) -> tuple[str, ...]:
    """Why the checkpoint is of the family, in sentences; empty if it is not.

    A family looks at the shapes that its own checkpoints have. Where it stumbles over others, it is none of them.
    """
    try:
        return tuple(arch.detect(inventory))
    except (LookupError, TypeError, ValueError):
        return ()


def _nothing(inventory: Inventory, candidates: list[Arch]) -> MdlError:
    some = ", ".join(list(inventory.tensors)[:6])
    known = ", ".join(arch.name for arch in candidates)
    there = f"no known architecture has these tensors ({len(inventory.tensors)} of them: {some} …)"
    if _of_transformers(inventory):
        return input_error(
            f"{there}; models of Hugging Face's transformers have such names, but no config.json that names a class"
            " (architectures) and a model_type lies beside them",
            inventory.path,
            "pass --config config.json: the one that save_pretrained wrote of this model, or of the one that it was"
            " made from; other code wrote them? --arch NAME (`mdl archs`)",
        )
    return input_error(
        f"{there}; known: {known}",
        inventory.path,
        "--arch NAME if you know better, or add your own with --arch FILE.py (docs/architectures.md)",
    )


def _of_transformers(inventory: Inventory) -> bool:
    """Whether an attention has a name, or GPT-2's way of storing its weight [C, 3C], that transformers has."""
    conv = next((t for name, (t, *_) in inventory.tensors.items() if name.endswith("h.0.attn.c_attn.weight")), None)
    if conv is not None and len(conv.shape) == 2 and conv.shape[1] == 3 * conv.shape[0]:
        return True
    return any(_TRANSFORMERS.search(name) for name in inventory.tensors)


def _arch_of(module: object, name: str) -> Arch:
    arch = getattr(module, "ARCH", None)
    if not isinstance(arch, Arch):
        raise input_error("defines no ARCH = Arch(…)", name, "end the file with ARCH = Arch(name=…, …)")
    return arch
