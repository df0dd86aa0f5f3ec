"""What people see: tables on stdout, progress on stderr. Every figure comes from a record that --json prints whole."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Kind, MdlError
from .mappings.jsonable import pieces

if TYPE_CHECKING:  # what asks for --json needs no rich
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SHOWN = 10
_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")
_UNSEEN = dict.fromkeys(map(ord, "\a\b\v\f\r"))
"""What rich takes out of whatever it prints, since it moves the cursor back over other words."""
_BETWEEN, _MARK = "/\x00/", "\x01"
"""Stand in no name and in no problem. The first parts names, and a number may stand beside it; the second is put in the
place of one."""
# A number of a name with what stands before it. A pattern that begins with one character is looked for far faster.
_AFTER = {"." + _MARK: re.compile(r"\.\d+(?=[./])"), "/" + _MARK: re.compile(r"/\d+(?=[./])")}


def out() -> Console:
    """stdout. Piped output is never cut to a terminal's width."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=True)


def err() -> Console:
    """stderr."""
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 200, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout; records become objects."""
    for piece in pieces(document):
        sys.stdout.write(piece)


def answer(as_json: bool, document: Callable[[], Any], table: Callable[[], None]) -> None:
    """A command's answer on stdout: one JSON document for programs, or what a person reads."""
    if as_json:
        print_json(document())
    else:
        table()


def print_error(error: MdlError, *, as_json: bool) -> None:
    """The problems: on stderr for people, as a document on stdout for programs. Long lists are cut for people."""
    if as_json:
        print_json({"ok": False, "kind": error.kind.name.lower(), "problems": error.problems})
        return
    sys.stdout.flush()  # what was said before stands before
    console = err()
    label = {Kind.PARITY: "not the same", Kind.USAGE: "usage", Kind.INPUT: "error", Kind.MACHINE: "this machine"}
    groups = _grouped(error)
    most = len(groups) if error.whole else SHOWN
    for what, where, do in groups[:most]:
        console.print(text(f"{label[error.kind]}: ", style="bold red") + text(what))
        if where:
            console.print(text(f"  where: {shown(where)}"))
        if do:
            console.print(text(f"  do:    {do}", style="bold"))
    if len(groups) > most:
        console.print(f"… and {len(groups) - most} more (--json for all)")


def _grouped(error: MdlError) -> list[tuple[str, str, str]]:
    """Problems that differ only in layer numbers, as one line each: ``h.{0..31}``."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for p in error.problems:
        key = (_NUMBER.sub("#", p.what), p.where, p.do)
        groups.setdefault(key, []).append(p.what)
    return [(" / ".join(collapse(whats)), where, do) for (_, where, do), whats in groups.items()]


def collapse(names: Sequence[str]) -> list[str]:
    """Names that differ in one number become one with a range: a.0.b, a.1.b → a.{0..1}.b."""
    return [one for one, _ in alike(names, [None] * len(names))]


def alike(names: Sequence[str], keys: Iterable[Hashable]) -> list[tuple[str, list[int]]]:
    """Names of equal keys that differ in numbers alone, as one each; and which they are, in the order of the first."""
    groups: dict[Hashable, list[int]] = {}
    for k, key in enumerate(keys):
        groups.setdefault(key, []).append(k)
    found: list[tuple[str, list[int]]] = []
    for which in groups.values():
        held = [names[k] for k in which]
        if one := _of_one_number(held):
            found.append((one, which))
            continue
        patterns: dict[str, list[int]] = {}
        for pattern, k in zip(_unnumbered(held), which, strict=True):
            patterns.setdefault(pattern, []).append(k)
        found += [(_collapsed(pattern, [names[k] for k in some]), some) for pattern, some in patterns.items()]
    return sorted(found, key=lambda line: line[1][0])


def _unnumbered(names: list[str]) -> list[str]:
    """Each name with a mark for each of its parts that is a number. All of them are gone through at once: of 50,000,
    one after another would take longer than reading them."""
    text = f"/{_BETWEEN.join(names)}/"
    for mark, numbers in _AFTER.items():
        text = numbers.sub(mark, text)
    return text[1:-1].split(_BETWEEN)


def _of_one_number(names: list[str]) -> str:
    """What becomes of names that are all the same but for one number, in half the time; nothing if they are not."""
    first, *last = _unnumbered(names[:1])[0].split(_MARK)
    if len(last) != 1:
        return ""
    begin, end = len(first), -len(last[0]) or None
    numbers = [name[begin:end] for name in names]
    if [f"{first}{n}{last[0]}" for n in numbers] != names or not (all(numbers) and "".join(numbers).isdecimal()):
        return ""
    return f"{first}{_range(numbers)}{last[0]}" if len(names) > 1 else names[0]


def _collapsed(pattern: str, names: list[str]) -> str:
    first, *words = pattern.split(_MARK)
    if len(names) == 1 or not words:
        return names[0]
    numbers = _NUMBER.findall(_BETWEEN.join(names))
    ranges = (_range(numbers[k :: len(words)]) for k in range(len(words)))
    return first + "".join(part for pair in zip(ranges, words, strict=True) for part in pair)


def _range(numbers: Iterable[str]) -> str:
    distinct = sorted(set(map(int, set(numbers))))
    if len(distinct) == 1:
        return str(distinct[0])
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"{{{distinct[0]}..{distinct[-1]}}}"
    return "{" + ",".join(map(str, distinct)) + "}"


def shown(path: str) -> str:
    """A path as a person would type it: relative to the working directory where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_absolute() and Path(path).is_relative_to(here) else path


def line(words: str) -> None:
    """A line on stdout, as it stands."""
    sys.stdout.write(words.translate(_UNSEEN) + "\n")


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def seconds(duration: float) -> str:
    """Seconds for people; what takes less than one has taken some time too."""
    return f"{max(duration, 0.01):.2f} s" if duration < 0.995 else f"{duration:.1f} s"


def text(words: str, style: str = "") -> Text:
    """Words that are printed as they stand, whatever brackets are in them."""
    from rich.text import Text

    return Text(words, style=style)


def table(*headers: str) -> Table:
    """A plain table: no boxes, so that it pastes well."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in headers:
        made.add_column(header, overflow="fold")
    return made


def show_facts(pairs: Iterable[tuple[str, str | Iterable[str]]]) -> None:
    """Name and value lines on stdout, values possibly on several lines. A terminal gets them folded to its width by
    rich, which takes a tenth of a second to import; a pipe gets them as they are."""
    rows: list[tuple[str, str]] = []
    for name, value in pairs:
        values = [value] if isinstance(value, str) else value
        lines = [one for whole in values for one in whole.split("\n")]
        rows += [(name if k == 0 else "", one) for k, one in enumerate(lines)]
    if _styled():
        out().print(_facts(rows))
        return
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, one in rows:
        line(f"{name:{width}}{one}".rstrip(" "))


def _styled() -> bool:
    """Whether stdout shows colours. Some ask for them where a pipe is read by what can show them, as in CI."""
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def _facts(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, one in rows:
        made.add_row(name, text(one))
    return made


_live: Console | None = None
"""Where progress is being drawn at this moment: what is printed elsewhere would be glued to it."""


def say(sentence: str) -> None:
    """A line on stderr that is not progress: it stays, and --quiet does not silence it."""
    if _live is None:
        sys.stderr.write(sentence.translate(_UNSEEN) + "\n")
    else:
        _live.print(text(sentence))


@contextmanager
def byte_progress(title: str, total: int, *, quiet: bool, as_json: bool) -> Generator[Callable[[int], None]]:
    """A progress bar with bytes, rate and time left, on a terminal's stderr only."""
    if quiet or as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    global _live  # noqa: PLW0603 - there is one terminal
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task(title, total=total)
        _live = progress.console
        try:
            yield lambda n: progress.advance(task, n)
        finally:
            _live = None


@contextmanager
def steps(*, quiet: bool) -> Generator[Callable[[str], None]]:
    """A spinner that says what is being done, on a terminal's stderr only."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with err().status("starting") as status:
        yield status.update
