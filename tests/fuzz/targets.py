"""What is fuzzed, and what has to hold for every input: the tests and the coverage-guided harness share this file.

A reader answers, or it raises MdlError of kind INPUT whose every problem says what is wrong. On the way it opens
nothing but what it was given, imports nothing, runs nothing, and takes a bounded amount of memory; and every tensor
of an answer lies inside its file. Anything else is a :class:`BrokenPromise`.
"""

from __future__ import annotations

import codecs
import gc
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mdl.convert import open as opening
from mdl.convert.dcp_metadata import read_metadata
from mdl.convert.inert import RefusedError, Stub
from mdl.convert.inventory import take_inventory
from mdl.convert.legacy import read_legacy
from mdl.convert.safetensors_file import read_safetensors
from mdl.convert.torch_zip import read_torch_zip
from mdl.convert.unpickle import unpickle
from mdl.errors import Kind, MdlError, Problem
from mdl.mappings import expr, parse
from mdl.mappings.expand import expand
from mdl.mappings.tensors import ITEMSIZE, TensorInfo

SIZES = {"layers": 2, "heads": 2, "hidden": 4}
"""What a mapping is bound to."""
ROOM = 1 << 20
"""Bytes of the imaginary file around a bare pickle."""
MEMORY = 512 << 20
"""Bytes of address space that reading one small input may add."""


class BrokenPromise(AssertionError):  # noqa: N818 - it is no error of this program's own
    """A reader did what it must never do."""


class _Stopped(BaseException):
    """Ends what the watch does not permit. Not an Exception, which a reader's `except Exception` would swallow."""


@dataclass
class Target:
    """A reader under test. ``read`` takes the input and the file that holds it; gives the answer and the bytes that
    its tensors may lie in."""

    read: Callable[[bytes, Path], tuple[Any, int]]
    compiles: bool = False
    """Whether it may turn text into a syntax tree (sizes in mappings), which runs nothing."""


def _unpickle(data: bytes, path: Path) -> tuple[Any, int]:
    def locate(key: str, nbytes: int, _itemsize: int) -> int:
        if nbytes > ROOM:
            raise RefusedError(f"storage {key} is larger than the file")
        return 0

    return unpickle(data, str(path), locate), ROOM


def _file(read: Callable[[Path], Any]) -> Callable[[bytes, Path], tuple[Any, int]]:
    return lambda data, path: (read(path), len(data))


def _metadata(path: Path) -> Any:
    entries = read_metadata(path, str(path))
    for entry in entries:
        held = sum(prod(b - a for a, b in zip(c.box.start, c.box.stop, strict=True)) for c in entry.chunks)
        if entry.shape is not None and (held != prod(entry.shape) or any(c.place.begin < 0 for c in entry.chunks)):
            raise BrokenPromise(f"pieces that are not the tensor: {entry}")
    return [(entry.name, entry.path) for entry in entries]


def _inventory(path: Path) -> Any:
    inventory = take_inventory(opening.open_checkpoint(path))
    for found in inventory.tensors.values():
        f"{found[0].numel:,} {found[0].nbytes:,}"  # every command shows them
    return [list(found) for found in inventory.tensors.values()], inventory.extras


def _mapping(data: bytes, path: Path) -> tuple[Any, int]:
    mapping = parse.load_mapping(path)
    if all(_small(size) for size in mapping.file.ranges.values()):  # others ask for names without number, and get them
        for problem in expand(mapping, SIZES, {"tied": True}).problems:
            _check_problem(problem)
    return mapping, len(data)


def _small(size: int | str) -> bool:
    try:
        return expr.evaluate(size, SIZES) <= 4
    except expr.ExprError:
        return True  # becomes a problem


TARGETS = {
    "unpickle": Target(_unpickle),
    "torch_zip": Target(_file(read_torch_zip)),
    "legacy": Target(_file(read_legacy)),
    "safetensors": Target(_file(read_safetensors)),
    "dcp_metadata": Target(_file(_metadata)),
    "mapping": Target(_mapping, compiles=True),
    "inventory": Target(_file(_inventory)),
}


def check(name: str, data: bytes, path: Path) -> MdlError | None:
    """Read ``data`` with one target; ``path`` is overwritten with it first.

    Returns the refusal, None if the input was accepted. Raises BrokenPromise if a promise does not hold; any other
    exception of the reader comes through as it is, which a test counts as a failure too.
    """
    target = TARGETS[name]
    path.write_bytes(data)
    try:
        with _watched(path, target):
            answer, size = target.read(data, path)
    except MdlError as error:
        _check_refusal(error)
        return error
    _check_tensors(answer, size)
    return None


def _check_refusal(error: MdlError) -> None:
    if error.kind is not Kind.INPUT or not error.problems:
        raise BrokenPromise(f"a refusal of kind {error.kind.name} with {len(error.problems)} problems")
    for problem in error.problems:
        _check_problem(problem)
    if isinstance(error.__cause__, MemoryError):
        raise BrokenPromise("the reader asked for more memory than it may have") from error


def _check_problem(problem: Problem) -> None:
    if not problem.what.strip():
        raise BrokenPromise(f"a problem that does not say what is wrong: {problem}")


def _check_tensors(answer: Any, size: int) -> None:
    for info in tensors(answer):
        last = sum((n - 1) * step for n, step in zip(info.shape, info.stride, strict=True))
        end = info.offset + ((last + 1) * ITEMSIZE[info.dtype] if info.numel else 0)
        if info.offset < 0 or min(info.shape, default=0) < 0 or end > size:
            raise BrokenPromise(f"a tensor outside its file of {size} bytes: {info}")


def tensors(answer: Any) -> Iterator[TensorInfo]:
    """Every tensor in what a reader answered."""
    seen: set[int] = set()
    waiting = [answer]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, TensorInfo):
            yield node
        elif isinstance(node, dict):
            waiting += dict.values(node)
        elif isinstance(node, (list, tuple, set, frozenset)):
            waiting += node
        elif isinstance(node, Stub):
            waiting += (node.args, node.kwargs, node.state, node.entries, node.elements)


# --- the watch: what Python itself reports (audit events) while a reader is at work ---

_LOOKING = {"os.listdir", "os.scandir", "glob.glob", "glob.glob/2", "pathlib.Path.glob", "builtins.id"}
_TOOLS = {"sys.settrace", "sys.setprofile", "object.__getattr__"}  # Hypothesis traces, and looks at frames
_OWN = str(Path(parse.__file__).with_name("schema.py"))  # part of the name under which a mapping is remembered
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class _Watch:
    thread: int = 0
    path: Path = Path()
    compiles: bool = False
    broken: str = ""


_watch = _Watch()


def _hook(
    event: str, arguments: tuple[Any, ...], watch: _Watch = _watch, thread: Callable[[], int] = threading.get_ident
) -> None:
    # The names are defaults because Python calls hooks to its very end, when a module's globals are gone.
    if watch.thread == thread() and not _permitted(event, arguments):
        watch.broken = f"{event} {arguments!r}"[:500]
        raise _Stopped  # before the event happens: nothing that an input asks for is carried out


def _permitted(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        name, _, flags = arguments
        known = Path(os.fsdecode(name)).parent == _watch.path.parent or os.fsdecode(name) == _OWN
        return known and not flags & _WRITING
    if event == "compile":
        return _watch.compiles and arguments[1] == "<unknown>"  # ast.parse; a module would have its file's name
    if event == "mmap.__new__":
        return arguments[2] == mmap.ACCESS_READ  # of a file whose opening was permitted
    return event in _LOOKING or event in _TOOLS or event.startswith("sys.monitoring.")


@contextmanager
def _watched(path: Path, target: Target) -> Iterator[None]:
    _watch.path, _watch.compiles, _watch.broken = path, target.compiles, ""
    try:
        _watch.thread = threading.get_ident()
        yield
    except _Stopped:
        pass
    finally:
        _watch.thread = 0
    if _watch.broken:  # said even where the reader swallowed what stopped it
        raise BrokenPromise(f"while reading: {_watch.broken}")


@contextmanager
def little_memory(extra: int = MEMORY) -> Iterator[None]:
    """Let this process grow by ``extra`` bytes of address space at most, so that a bomb is refused and not felt."""
    size = Path("/proc/self/statm")
    if not size.exists():  # not Linux: the other promises can still be tested
        yield
        return
    pages = int(size.read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _prepare() -> None:
    """Do once what Python does at first use (imports, codecs), so that the watch sees the inputs' doing alone."""
    for codec in (
        "utf-8",
        "ascii",
        "latin-1",
        "cp437",
        "utf-32-le",
        "utf-32-be",
        "unicode_escape",
        "raw_unicode_escape",
    ):
        codecs.lookup(codec)
    # A mapping that passed is remembered as an empty file in the user's cache: not here, where each is read once.
    parse._remember = lambda _stamp: None
    for text in (
        "format: 1\ntitle: t\nkeep: [a]\n",
        "format: 2\nkeep: 3\ntransform: [{from: a, ops: [x]}]\n",
        "[",
        "a: *b",
    ):
        try:
            parse.parse_mapping(text)
        except MdlError:
            continue
    gc.collect()
    sys.addaudithook(_hook)


_prepare()
