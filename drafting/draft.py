"""`mdl new`: read a checkpoint's names and shapes, decide what they are, and write a package that says so."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from ..archs.registry import all_archs, detect
from ..convert.inventory import take_inventory
from ..convert.open import open_checkpoint
from ..convert.planner import UNCLAIMED
from ..convert.prepare import Options, prepare
from ..errors import MdlError, Problem, input_error, usage_error
from . import package
from .arch_file import Subject, arch_text, heads_of, settings_of
from .choose import choose
from .mapping import draft_rules, mapping_text, tail
from .names import Names, grouped
from .settings import Setting
from .together import roles_of

MOST = 64
"""Combinations that `mdl verify --decide` tries at once (validate/candidates.py)."""
MARK = "# Drafted by mdl new"


class Draft(Struct, frozen=True):
    """What was written. ``open`` is what `mdl plan` lists as left to decide; ``known`` a family of mdl's that
    recognises the checkpoint; ``decide`` what a reference could decide."""

    folder: str
    target: str
    because: tuple[str, ...]
    files: tuple[str, ...]
    certain: int
    doubtful: int
    open: tuple[Problem, ...]
    known: str
    decide: Mapping[str, tuple[str, ...]]
    arch: str


def draft(
    folder: Path,
    checkpoint: Path,
    *,
    reference: str | None = None,
    target: str | None = None,
    weights: str | None = None,
    force: bool = False,
) -> Draft:
    """Write the package ``folder``, whose name is that of the family.

    Raises MdlError: USAGE for a name that can't be one, a folder that is there (unless ``force``, which replaces the
    files of a draft), or a reference that names no function; INPUT for a checkpoint that can't be read.
    """
    name = folder.name
    _check_name(name, folder)
    if folder.exists() and not force:
        raise usage_error("is there already", str(folder), "choose another name, or --force to write the draft anew")
    if folder.exists() and not (folder / name / "arch.py").is_file():
        raise usage_error("is no draft of mdl new, so it is not replaced", str(folder), "choose another name")
    inventory = take_inventory(open_checkpoint(checkpoint), weights=weights)
    if inventory.ranks > 1 or inventory.parts > 1:
        do = "join them into one file first (torch.save of the whole state dict), or write the family by hand"
        raise input_error("lies in the files of several ranks, which a draft can't join", str(checkpoint), do)
    names = grouped({tensor: infos[0].shape for tensor, infos in inventory.tensors.items()})
    roles = roles_of(names)
    choice = choose(roles, target)
    made = draft_rules(roles, choice, names.layers)
    shown = os.path.relpath(checkpoint.resolve(), folder.resolve())
    linked = _linked(reference, folder.resolve() / name)
    subject = Subject(name, checkpoint.name, names, roles, inventory.extras, choice, made, linked, weights or "")
    decide = _decidable([heads_of(subject), *settings_of(subject)])
    texts = package.files(subject, shown, _linked(reference, folder.resolve()), decide_options(decide))
    texts[f"{name}/arch.py"] = arch_text(subject)
    texts[f"{name}/{name}.yaml"] = _mapping(subject, names, checkpoint)
    _write(folder, texts)
    arch = folder / name / "arch.py"
    return Draft(
        folder=str(folder),
        target=subject.target,
        because=choice.because,
        files=tuple(texts),
        certain=sum(role.certain for role in roles),
        doubtful=sum(not role.certain for role in roles),
        open=left_to_decide(checkpoint, Options(arch=str(arch.resolve()), weights=weights)),
        known=_known(inventory),
        decide=decide,
        arch=str(arch),
    )


def left_to_decide(checkpoint: Path, options: Options) -> tuple[Problem, ...]:
    """What `mdl plan` would say."""
    try:
        plan = prepare(checkpoint, options).plan
        return (*plan.open, *plan.problems)
    except MdlError as error:
        return error.problems


def questions_of(made: Draft) -> list[str]:
    """What is left to decide, without the single tensors of a kind that a question has named already; `mdl plan` lists
    them too."""
    whats = [problem.what for problem in made.open]
    asked = any(what.startswith("left to decide: ") for what in whats)
    return [what for what in whats if not (asked and what.endswith(UNCLAIMED))]


def _known(inventory: object) -> str:
    """The family of mdl's that recognises the checkpoint without any package, if there is one."""
    try:
        return detect(inventory).arch.name  # type: ignore[arg-type]  # an Inventory
    except MdlError:
        return ""


def _check_name(name: str, folder: Path) -> None:
    """Raise MdlError (USAGE) for a name that can't be a package's, or is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        do = "small letters, digits and underscores, such as my_model"
        raise usage_error(f"{name!r} can't be the name of a package", do=do)
    known = all_archs().get(name)
    if known is not None and not (known.file and Path(known.file).is_relative_to(folder.resolve())):
        raise usage_error(f"a family is called {name} already", do="choose another name (`mdl archs` lists them)")
    found = importlib.util.find_spec(name)
    if found is not None and found.origin and not Path(found.origin).is_relative_to(folder.resolve()):
        raise usage_error(f"a Python package is called {name} already", found.origin, "choose another name")


def _linked(reference: str | None, folder: Path) -> str:
    """The reference with its path from a folder. Raises MdlError (USAGE) for what names no function of a file."""
    if not reference:
        return ""
    file, colon, function = reference.rpartition(":")
    if not colon or not function.isidentifier() or not Path(file).is_file():
        do = "write --reference FILE.py:FUNCTION, such as model.py:build"
        raise usage_error(f"--reference {reference}: names no function of a file", do=do)
    return f"{os.path.relpath(Path(file).resolve(), folder)}:{function}"


def _decidable(settings: list[Setting]) -> dict[str, tuple[str, ...]]:
    """What ``--decide`` can try: open questions with a few possible answers."""
    tried = {s.name: ("true", "false") if s.kind == "boolean" else s.values for s in settings if s.open}
    return {name: tuple(map(str, values)) for name, values in tried.items() if len(values) > 1}


def decide_options(decide: Mapping[str, tuple[str, ...]]) -> str:
    """The questions as options of `mdl verify`: as many as are tried at once; the others have to be said."""
    words, count = [], 1
    for name, values in decide.items():
        count *= len(values)
        words.append(f"--decide {name}={','.join(values)}" if count <= MOST else f"--set {name}=?")
    return " ".join(words)


def _mapping(s: Subject, names: Names, checkpoint: Path) -> str:
    ranges = [("i", "layers")] if names.layers else []
    ranges += [("e", "experts")] if names.experts else []
    firsts = {role.group.layers[0] for role in s.roles if tail(role.group, names.layers)}
    ranges += [(one, f"layers - {first}") for one, first in zip("j", sorted(firsts), strict=False)]
    notes = [
        f"{MARK[2:]} from {checkpoint.name}, for {s.target}: {s.choice.because[0]}.",
        "The comment of a line is its evidence; a TODO is a question. See mdl's docs/mappings.md.",
    ]
    return mapping_text(f"{s.name} -> {s.target}", s.made, ranges, notes)


def _write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
