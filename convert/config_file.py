"""`--config FILE`: hyperparameters in a file, whatever wrote it: params.json, config.json, yaml, a dump of args."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..archs.base import Inventory
from ..archs.given import ConfigFile, Given
from ..errors import usage_error
from .beside import parse_settings

_DO = "give a .json, .yaml or .yml file that holds one table of names and values"


def read_config_file(path: Path) -> ConfigFile:
    """The settings in a file. Raises MdlError (USAGE) where it can't be read or holds none."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise usage_error(f"--config {path}: not a kind of file that is read", do=_DO)
    try:
        return ConfigFile(str(path.absolute()), parse_settings(path))
    except (ValueError, OSError) as error:
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


def _listed(keys: Sequence[str], most: int = 100) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
