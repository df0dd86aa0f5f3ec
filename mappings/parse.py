"""Reads a mapping file: strict YAML in, a checked :class:`Mapping` out, or every error at once with its position."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from msgspec import Struct
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import Kind, MdlError, Problem
from . import rules

Loc = tuple[int | str, ...]


class Mapping(Struct, frozen=True):
    """A parsed mapping with the positions of its rules and the hash of its text."""

    path: str
    sha256: str
    file: rules.MappingFile
    positions: dict[Loc, tuple[int, int]]

    def where(self, loc: Loc) -> str:
        """``file:line:column`` of the nearest known node at or above ``loc``."""
        while loc and loc not in self.positions:
            loc = loc[:-1]
        line, column = self.positions.get(loc, (1, 1))
        return f"{place(self.path)}:{line}:{column}"


def place(path: str) -> str:
    """A mapping file as a person finds it: our own by its name; a user's, of which there may be several of one name, by
    its path, from the working directory where it lies below."""
    file, here = Path(path), Path.cwd()
    if file.parent == Path(__file__).parent:
        return file.name
    return str(file.relative_to(here)) if file.is_absolute() and file.is_relative_to(here) else path


def load_mapping(path: Path) -> Mapping:
    """Read and check one mapping file. Raises MdlError (INPUT) that lists all errors as ``file:line:col``."""
    if not path.exists():
        do = f"write {path.name} beside {path.stem}.py: what becomes of every tensor (docs/mappings.md)"
        raise MdlError(Kind.INPUT, [Problem("there is no such mapping", str(path), do)])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MdlError(Kind.INPUT, [Problem(f"cannot read the mapping: {error}", str(path))]) from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, path: str = "<mapping>") -> Mapping:
    """Check the text of a mapping; ``path`` is only named in errors."""
    reader = _Reader(path)
    try:
        data = reader.value(_compose(text, path), ())
    except RecursionError:
        raise MdlError(Kind.INPUT, [Problem("the mapping is nested too deeply", f"{Path(path).name}:1:1")]) from None
    if reader.problems:
        raise MdlError(Kind.INPUT, reader.problems)
    stamp = _stamp(text)
    if not stamp.exists():
        _validate(data, reader)
        _remember(stamp)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Mapping(path, digest, rules.build(data), reader.positions)


def _validate(data: Any, reader: _Reader) -> None:
    """Hold the plain values against the schema. Raises MdlError (INPUT) with every error."""
    from pydantic import ValidationError

    from .schema import MappingFile

    try:
        MappingFile.model_validate(data)
    except ValidationError as error:
        problems = [_problem(reader, cast("dict[str, Any]", e)) for e in error.errors(include_url=False)]
        raise MdlError(Kind.INPUT, sorted(problems, key=lambda p: _line(p.where))) from None


def _stamp(text: str) -> Path:
    """An empty file in the cache that says: this very text passed this very schema. It saves importing pydantic, a
    quarter of a second; where there is no cache, the text is checked each time."""
    schema = Path(__file__).with_name("schema.py").read_bytes()
    name = hashlib.sha256(schema + text.encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mdl" / "checked-mappings" / name


def _remember(stamp: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only home is no reason to fail
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def _compose(text: str, path: str) -> Node:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{place(path)}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise MdlError(Kind.INPUT, [Problem(f"not YAML: {error.problem or error}", where, _hint(text, mark))]) from None
    except yaml.YAMLError as error:
        raise MdlError(Kind.INPUT, [Problem(f"not YAML: {error}", path)]) from None
    if root is None:
        raise MdlError(Kind.INPUT, [Problem("the mapping is empty", f"{place(path)}:1:1")])
    return root


def _hint(text: str, mark: yaml.Mark | None) -> str:
    """The mistake that everybody makes once: braces mean something to YAML inside brackets."""
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    return 'inside [ ], put names with braces in quotes: ["layers.{i}.x"]' if "[" in line and "{" in line else ""


class _Reader:
    """Turns YAML nodes into plain values, remembering where each stood; refuses what YAML lets pass."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.positions: dict[Loc, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self._seen: set[int] = set()

    def value(self, node: Node, loc: Loc) -> Any:
        if id(node) in self._seen:  # it stands where its anchor does, and a loop or a tower of aliases never ends
            self._refuse(node, "aliases (&name, *name) are not understood: write it out")
            return None
        self._seen.add(id(node))
        self.positions[loc] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if isinstance(node, MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode):
            items = (self.value(child, (*loc, k)) for k, child in enumerate(node.value))
            values = tuple(items)
            return tuple(_named_op(v) for v in values) if _holds_operations(loc) else values
        return self._scalar(cast("ScalarNode", node))

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, child in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                self._refuse(key_node, "a key must be plain text")
                continue
            if key in result:
                self._refuse(key_node, f"duplicate key {key!r}")
                continue
            result[key] = self.value(child, (*loc, key))
            self.positions[(*loc, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        return result

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        if node.style is not None:
            return text
        for tag, convert in (("int", int), ("float", float)):
            if node.tag == f"tag:yaml.org,2002:{tag}":
                try:
                    return convert(text)
                except ValueError:
                    return text
        return None if node.tag.endswith(":null") and not text else text

    def _refuse(self, node: Node, what: str) -> None:
        mark = node.start_mark
        self.problems.append(Problem(what, f"{place(self.path)}:{mark.line + 1}:{mark.column + 1}"))


def _holds_operations(loc: Loc) -> bool:
    """Whether a list at this place is one of operations: ``ops``, or one of the lists of ``parts``."""
    return loc[-1:] == ("ops",) or (loc[-2:-1] == ("parts",) and "ops" in loc)


def _named_op(value: Any) -> Any:
    """``transpose``, ``{permute_rope: {heads: 4}}`` and ``{parts: [[…]]}`` become ``{op: name, **arguments}``."""
    if isinstance(value, str):
        return {"op": value}
    if isinstance(value, dict) and len(cast("dict[str, Any]", value)) == 1:
        ((name, arguments),) = cast("dict[str, Any]", value).items()
        if name == "parts":
            return {"op": name, "parts": arguments}
        if isinstance(arguments, dict):
            return {**cast("dict[str, Any]", arguments), "op": name}
        if arguments is None:
            return {"op": name}
    return cast("Any", value)


def _problem(reader: _Reader, error: dict[str, Any]) -> Problem:
    loc, shown = _resolve(reader, error["loc"])
    line, column = reader.positions.get(loc, (1, 1))
    if error["type"] == "missing":
        shown = f"{shown}.{error['loc'][-1]}".lstrip(".")
    return Problem(f"{shown or 'mapping'}: {_message(error)}", f"{place(reader.path)}:{line}:{column}")


def _resolve(reader: _Reader, loc: Sequence[int | str]) -> tuple[Loc, str]:
    """Pydantic's location, which also names union members, to the nearest YAML node and a readable path."""
    at: Loc = ()
    for part in loc:
        for step in _candidates(reader, at, part):
            at = step
            break
    return at, ".".join(str(p) for p in at)


def _candidates(reader: _Reader, at: Loc, part: int | str) -> Iterator[Loc]:
    if (*at, part) in reader.positions:
        yield (*at, part)
    elif at and isinstance(at[-1], int) and (*at, at[-1], part) in reader.positions:
        yield (*at, at[-1], part)


_EXPECTED = {
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table of key: value",
    "model_type": "a table of key: value",
    "int_type": "a whole number",
    "float_type": "a number",
}


def _message(error: dict[str, Any]) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return _unknown_key(error["loc"])
    if error["type"] == "union_tag_invalid":
        context = cast("dict[str, str]", error["ctx"])
        return f"unknown operation {context['tag']!r}; known: {context['expected_tags'].replace(chr(39), '')}"
    if error["type"] in ("union_tag_not_found", "model_attributes_type"):
        return "an operation is a name, or {name: {argument: value}}"
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "string_too_short":
        return "must not be empty" if error["loc"] == ("title",) else "a reason is needed"
    if error["type"] == "too_short":
        return "must not be empty"
    if error["type"] in _EXPECTED:
        return f"must be {_EXPECTED[error['type']]}"
    return text[0].lower() + text[1:]


def _unknown_key(loc: Sequence[int | str]) -> str:
    from .schema import keys_of

    known = keys_of(loc[:-1])
    return f"unknown key; known: {', '.join(known)}" if known else "unknown key: there are no arguments here"


def _line(where: str) -> tuple[int, int]:
    _, line, column = where.rsplit(":", 2)
    return int(line), int(column)
