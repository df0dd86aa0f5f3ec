"""What can go wrong, in four kinds; each kind has one exit code, and every problem says what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from msgspec import Struct
from msgspec.structs import force_setattr

MAX_TEXT = 4000
"""Characters of one part of a problem; of a longer text its ends are shown."""

COPY_AGAIN = "copy or download the file again, and compare its size with the original"
"""What to do about a file that is damaged."""


class Kind(Enum):
    """The closed set of failures. The value is the process's exit code."""

    PARITY = 1
    """vLLM does not compute what the reference computes, or refuses a layout whose files are all there."""
    USAGE = 2
    """The command line asks for something that makes no sense."""
    INPUT = 3
    """This input (checkpoint, mapping, layout) can't be used as it is."""
    MACHINE = 4
    """This machine lacks something: vLLM, memory, disk."""


class Problem(Struct, frozen=True, order=True):
    """One thing that is wrong. ``where`` and ``do`` may be empty when ``what`` says it all."""

    what: str
    where: str = ""
    do: str = ""

    def __post_init__(self) -> None:
        """Parts come from files that strangers made: no control character of theirs reaches a terminal."""
        for name in ("what", "where", "do"):
            text = getattr(self, name)
            if not text.isprintable() or len(text) > MAX_TEXT:
                force_setattr(self, name, _shown(text))


def _shown(text: str) -> str:
    """A text as it can be printed: line breaks stay, other unprintable characters are spelled out."""
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]} … {text[-MAX_TEXT // 4 :]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class MdlError(Exception):
    """A failure that the user can act on: shown as text, never as a traceback (unless ``--debug``).

    All problems of one step are raised together, so that a user mends them in one go. A list to be worked off is
    shown ``whole``; of others, people see the first ten.
    """

    def __init__(self, kind: Kind, problems: Iterable[Problem], *, whole: bool = False) -> None:
        self.kind = kind
        self.whole = whole
        self.problems = tuple(problems)
        super().__init__("; ".join(p.what for p in self.problems))

    def __str__(self) -> str:
        return "\n".join(" | ".join(part for part in (p.what, p.where, p.do) if part) for p in self.problems)


def input_error(what: str, where: str = "", do: str = "") -> MdlError:
    """An :class:`MdlError` of kind INPUT with a single problem."""
    return MdlError(Kind.INPUT, [Problem(what, where, do)])


def usage_error(what: str, where: str = "", do: str = "") -> MdlError:
    """An :class:`MdlError` of kind USAGE with a single problem."""
    return MdlError(Kind.USAGE, [Problem(what, where, do)])


def machine_error(what: str, where: str = "", do: str = "") -> MdlError:
    """An :class:`MdlError` of kind MACHINE with a single problem."""
    return MdlError(Kind.MACHINE, [Problem(what, where, do)])
