"""Writes a checkpoint in torch's own format, with torch's own code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import machine_error
from ..mappings.lazy import Lazy
from .paths import WITHIN

if TYPE_CHECKING:
    import torch

MARK = ".data/mdl_export"


def save_torch(
    path: Path,
    tensors: Mapping[str, Lazy],
    *,
    wrapper: tuple[str, ...],
    extras: Mapping[str, Any],
    aliases: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    """Save tensors under their path in the file, which is as long as ``wrapper``, with ``extras`` beside it.

    ``aliases`` names tensors that share memory with another. Unchanged tensors are written straight from the
    mapped layout; those that an operation moves are held in memory until the file is complete.
    """
    try:
        import torch
    except ImportError as error:
        raise machine_error("writing a .pt needs torch", do="pip install torch, or pip install mdl[cpu]") from error
    state: dict[str, torch.Tensor] = {}
    for raw, value in tensors.items():
        state[raw] = state[aliases[raw]] if aliases.get(raw) in state else _tensor(value)
        progress(value.nbytes)
    document: dict[str, Any] = {}
    for raw, tensor in state.items():
        *above, name = raw.split("/", len(wrapper))
        *inner, name = name.split(WITHIN)
        table = document
        for key in (*above, *inner):
            table = table.setdefault(key, {})
        table[name] = tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    try:
        torch.save({**extras, **document} if wrapper else document, scratch)
        _mark(scratch)
        scratch.replace(path)
    except RuntimeError as error:  # what torch's own writer says of a full disk
        raise machine_error(f"writing failed: {str(error).splitlines()[0]}", str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)


def _mark(path: Path) -> None:
    """Leave word in the archive that an export wrote it, where torch keeps its own such members and reads none."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{MARK}", "written by mdl export")


def exported(path: Path) -> bool:
    """Whether :func:`save_torch` wrote this file, so that an export may replace it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == MARK for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _tensor(value: Lazy) -> torch.Tensor:
    """A torch tensor over the values; a view of the mapped file where nothing was moved."""
    import warnings

    import numpy as np
    import torch

    with warnings.catch_warnings():  # the map is read-only, and so is our use of it
        warnings.simplefilter("ignore", UserWarning)
        values = np.ascontiguousarray(value.read()).reshape(value.shape)  # contiguous arrays of numpy are never 0-d
        return torch.from_numpy(values).view(getattr(torch, value.dtype))
