"""The files of processes that shared a model, each holding a part of every tensor: their names and their order."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import input_error

RANK = re.compile(
    r"(consolidated\.|reshard(?:_no_os)?-model_part-|model(?=\d+-mp))(\d+)(\.pth?|-mp(\d+)\.(?:safetensors|pt))"
)
"""Meta's names, metaseq's, and those of DeepSeek's inference code, which say how many files there are; as .pt those
come from `mdl export`."""
MAX_RANKS = 1000


def in_order(files: list[Path]) -> tuple[str, tuple[Path, ...]]:
    """What to call rank files together, and the files in the order of their numbers: 0, 1, 2, … without a hole.

    Raises MdlError (INPUT) if one is missing, two are the same, or they are of several models.
    """
    folder = str(files[0].parent)
    found = {file: match for file in files if (match := RANK.fullmatch(file.name))}
    kinds = {(match[1], match[4]) for match in found.values()}
    if len(kinds) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise input_error(f"these are not ranks of one model: {names}", folder, "give a folder with one set of files")
    numbers: dict[int, Path] = {}
    for file, match in found.items():
        if (number := int(match[2])) in numbers:
            raise input_error(f"{numbers[number].name} and {file.name} are the same rank", folder)
        numbers[number] = file
    first = found[numbers[min(numbers)]]
    count = _count(max(numbers), first[4], numbers, folder)
    width = min(len(match[2]) for match in found.values())
    if missing := [f"{n:0{width}d}" for n in range(count) if n not in numbers]:
        more = ", …" if len(missing) > 20 else ""
        listed = f"{first[1]}{{{','.join(missing[:20])}{more}}}{first[3]}"
        do = "download them again: every rank holds a part of each tensor"
        raise input_error(f"rank files are missing: {listed}", folder, do)
    return f"{first[1]}{{{0:0{width}d}..{count - 1:0{width}d}}}{first[3]}", tuple(numbers[n] for n in range(count))


def _count(last: int, total: str | None, numbers: dict[int, Path], folder: str) -> int:
    """How many files there have to be."""
    if last >= MAX_RANKS or int(total or 0) > MAX_RANKS:
        what = f"{numbers[last].name} would be one of more than {MAX_RANKS:,} rank files"
        raise input_error(what, folder, "rename it if it is none: no release has so many")
    if total and last >= int(total):
        raise input_error(f"{numbers[last].name}: rank {last} of {total} can't be", folder, "download the folder again")
    return int(total) if total else last + 1
