"""An arch file of the user's own: imported from where it lies, its neighbours in reach, and what it leaves open."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from ..errors import Problem, input_error
from .base import Arch
from .guard import blamed

_TODO = re.compile(r"#\s*TODO:\s*(.*)")
_ASKED = re.compile(r"m\.set\(.*\bask=")
"""A value that the measure asks for, with its alternatives, as long as nothing settles it: said once is enough."""


def import_root(file: Path) -> Path:
    """The folder from which a file is imported: its own, or the one around the package that it is a part of."""
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def import_file(file: Path) -> ModuleType:
    """The module of a file, with its folder (or the one around its package) first on the module path.

    A file in a package is imported under its full name, so that ``"package.module:Class"`` means the same here as where
    the package is installed. Raises MdlError (INPUT) with the line that fails.
    """
    root = import_root(file)
    if str(root) not in sys.path[:1]:
        sys.path.insert(0, str(root))  # so that the file can import its neighbours, such as an eager model
    if root == file.parent or file.is_relative_to(Path(__file__).parent.parent):
        return _alone(file)
    name = ".".join(file.relative_to(root).with_suffix("").parts)
    top = name.partition(".")[0]
    for loaded in [one for one in sys.modules if one == top or one.startswith(f"{top}.")]:
        del sys.modules[loaded]  # it may have been edited since, or lie elsewhere
    importlib.invalidate_caches()
    with blamed("importing it", str(file)):
        return importlib.import_module(name)


def _alone(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mdl_user_arch_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise input_error("cannot be imported as Python", str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with blamed("importing it", str(file)):
        spec.loader.exec_module(module)
    return module


def left_open(arch: Arch) -> list[Problem]:
    """Every ``# TODO:`` in the arch file, its mapping and the module of its own class: what is still to be decided."""
    if not arch.file:
        return []
    files = [Path(arch.mapping or arch.file), Path(arch.file)]
    if arch.served:
        files.append(_beside(arch, arch.served.partition(":")[0]))
    return [problem for file in dict.fromkeys(files) if file.is_file() for problem in _marks(file)]


def _beside(arch: Arch, module: str) -> Path:
    return import_root(Path(arch.file)).joinpath(*module.split(".")).with_suffix(".py")


def _marks(file: Path) -> list[Problem]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [(number, line, _TODO.search(line)) for number, line in enumerate(lines, 1)]
    return [
        Problem(f"left to decide: {mark[1].strip()}", f"{file}:{number}", "decide it, and take the TODO away")
        for number, line, mark in found
        if mark and not _ASKED.search(line)
    ]
