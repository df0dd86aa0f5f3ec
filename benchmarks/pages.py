"""Tables in the pages of docs/, each between its own first marker and the common last one."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

END = "<!-- end -->"
PACKAGES = ("mdl", "torch", "safetensors", "transformers", "huggingface_hub")


def versions() -> str:
    """What took part, in a line."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table: names to the left, figures to the right."""
    return [row(*columns), "|---|" + "--:|" * (len(columns) - 1)]


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def spread(found: Sequence[float]) -> tuple[str, str, str]:
    """Median, least and greatest."""
    if not found:
        return "–", "–", "–"
    return f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}"


def put_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table behind the marker that it goes by; what is not named stays. Raises ValueError where a page has no
    such marker."""
    text = page.read_text(encoding="utf-8")
    for begin, made in tables.items():
        if begin not in text:
            raise ValueError(f"{page} has no {begin.strip()}")
        found = re.escape(begin) + ".*?" + re.escape(END)
        text = re.sub(found, lambda _, b=begin + made: b + END, text, flags=re.S)
    page.write_text(text, encoding="utf-8")
