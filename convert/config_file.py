"""`--config FILE`: hyperparameters in a file, whatever wrote it: params.json, config.json, yaml, a dump of args."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from ..archs.base import Dim, Inventory
from ..archs.given import ConfigFile, Given
from ..errors import Kind, MdlError, Problem, usage_error
from .beside import parse_settings

_DO = "give a .json, .yaml or .yml file that holds one table of names and values"


def read_config_file(path: Path) -> ConfigFile:
    """The settings in a file. Raises MdlError (USAGE) where it can't be read or holds none."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise usage_error(f"--config {path}: not a kind of file that is read", do=_DO)
    try:
        return ConfigFile(str(path.absolute()), parse_settings(path))
    except OSError as error:
        raise usage_error(f"--config {path}: {(error.strerror or str(error)).lower()}", do=_DO) from error
    except ValueError as error:
        raise usage_error(f"--config {path}: {error}", do=_DO) from error


def with_extras(inventory: Inventory, given: Given) -> Inventory:
    """The inventory as if the file lay beside the weights, where it has a name that families look for."""
    return replace(inventory, extras={**inventory.extras, **given.extras(inventory.extras)})


def with_remark(inventory: Inventory, given: Given) -> Inventory:
    """The inventory with a word on the settings that were not used: none is dropped in silence."""
    unused = given.unused()
    if not unused:
        return inventory
    remark = f"{given.file.name} (--config) also has what this family does not read: {_listed(unused)}"
    return replace(inventory, remarks=(*inventory.remarks, remark))


def refuse_unread(given: Given) -> None:
    """Raise MdlError (INPUT) with every setting of the file that changes what the model computes, but that the family
    has no place for: it would serve another model than the file describes."""
    problems = [
        Problem(
            f"{key} in {given.file.name} (--config) is {value!r}, which changes what the model computes,"
            " and this family does not read it",
            given.file.path,
            "take it out of the file if the checkpoint was trained without it; else this family can't be it",
        )
        for key, value in given.changing().items()
    ]
    if problems:
        raise MdlError(Kind.INPUT, problems)


def told_tied(given: Given) -> Dim | None:
    """Whether the head is the embedding, as the file says it. Raises MdlError (INPUT) where it says no such thing, or
    two things."""
    said = given.find("tied", ("tie_word_embeddings",))
    problems = [
        Problem(
            f"{key} in {given.file.name} (--config) is {value!r}: not a value for tied", do="expected true or false"
        )
        for key, value in said.items()
        if not isinstance(value, bool)
    ]
    if not problems and len({*said.values()}) > 1:
        both = " and ".join(f"{value} by {key}" for key, value in said.items())
        problems = [Problem(f"tied is {both} in {given.file.name} (--config)", do="leave one of them")]
    if problems:
        raise MdlError(Kind.INPUT, problems)
    key = next(iter(said), None)
    return None if key is None else Dim(said[key], "user", f"{key} in {given.file.name} (--config)")


def _listed(keys: Sequence[str], most: int = 100) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
