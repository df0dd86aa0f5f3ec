"""A checkpoint of another family than the one that --arch names: told before anybody is asked for its sizes."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from ..archs.base import Arch, Inventory
from ..archs.own_file import left_open
from ..errors import MdlError, Problem, input_error
from ..mappings.expand import names_target
from ..mappings.parse import Mapping
from ..mappings.rules import Section

_SHOWN = 3
_CAPTURE = re.compile(r"\\\{[^{}]+\\\}")


def refuse_strangers(mapping: Mapping, inventory: Inventory, arch: Arch) -> None:
    """Raise MdlError (INPUT) if no tensor has a name that the family's mapping knows.

    Sizes would be asked for otherwise, one by one, of a family that this is not.
    """
    patterns = list(dict.fromkeys(_known(mapping)))
    if not patterns or not inventory.tensors or names_target(mapping):
        return
    known = re.compile("|".join(_CAPTURE.sub("[^.]+", re.escape(pattern)) for pattern in patterns))
    if any(known.fullmatch(name) for name in inventory.tensors):
        return
    here, there = (", ".join(list(names)[:_SHOWN]) for names in (inventory.tensors, patterns))
    raise input_error(
        f"no tensor has a name that {arch.title} gives: here are {here} …, there {there} …",
        inventory.path,
        "this is another family: leave --arch out to have it recognised, or write one (docs/architectures.md)",
    )


@contextmanager
def with_what_is_open(arch: Arch, mapping: Mapping, inventory: Inventory) -> Generator[None]:
    """Add, to the sizes that a family of the user's own can't settle, all else that is left to decide in its files, and
    the tensors of which its mapping does not speak: one list to work off."""
    try:
        yield
    except MdlError as error:
        if not arch.file:
            raise
        found = _unclaimed(mapping, inventory) if not names_target(mapping) else []
        raise MdlError(error.kind, [*left_open(arch), *error.problems, *found], whole=True) from error


def _unclaimed(mapping: Mapping, inventory: Inventory) -> list[Problem]:
    patterns = list(dict.fromkeys(_known(mapping)))
    known = re.compile("|".join(_CAPTURE.sub("[^.]+", re.escape(pattern)) for pattern in patterns) or "(?!)")
    return [
        Problem(f"{name} {list(found[0].shape)} is in the checkpoint, but no rule claims it", inventory.path)
        for name, found in inventory.tensors.items()
        if not known.fullmatch(name)
    ]


def _known(mapping: Mapping) -> Iterator[str]:
    for section in (mapping.file.section, *mapping.file.when.values()):
        yield from _sources(section)


def _sources(section: Section) -> Iterator[str]:
    yield from (*section.keep, *section.rename, *section.tie)
    for rule in section.transform:
        yield from [rule.from_] if isinstance(rule.from_, str) else rule.from_
    yield from section.drop
