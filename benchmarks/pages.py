"""Tables in the pages of docs/, each between its own first marker and the common last one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

END = "<!-- end -->"


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
