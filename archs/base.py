"""The records through which a source family describes itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import Struct, field

from ..errors import Kind, MdlError, Problem, input_error
from ..mappings.tensors import Shape, TensorInfo
from .given import Given

Value = int | float | str | bool | list[Any] | dict[str, Any] | None
"""What a dimension or a semantic constant may be: what JSON can say."""


class Inventory(Struct, frozen=True):
    """What a checkpoint holds, after wrappers and prefixes are taken off.

    ``tensors`` maps the family's own name of a tensor to one entry per rank file that holds it, in rank order.
    ``extras`` holds what lay beside the weights (``model_args``, ``params.json`` as ``params``, ``config`` …) as
    plain values; ``wrapper`` is the path to the state dict inside the file (``("model",)`` for nanoGPT);
    ``notes`` says in sentences what was unwrapped, stripped or ignored, ``remarks`` what plans and reports say too;
    ``parts`` is how many files along the layers (pipeline stages) each rank has, ``experts`` over how many more the
    experts are spread; what is no expert's lies in all of these, with one entry for each.
    """

    path: str
    tensors: Mapping[str, tuple[TensorInfo, ...]]
    extras: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ranks: int = 1
    wrapper: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    format: str = ""
    files: tuple[str, ...] = ()
    parts: int = 1
    experts: int = 1
    remarks: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor in its first rank file, or None if there is no such tensor."""
        found = self.tensors.get(name)
        return found[0].shape if found else None

    def count(self, pattern: str) -> int:
        """How many consecutive indices from 0 give an existing name: ``inv.count("layers.{}.wq.weight")``."""
        i = 0
        while pattern.format(i) in self.tensors:
            i += 1
        return i


class Dim(Struct, frozen=True):
    """One value with its provenance: where it came from, in words a person can check."""

    value: Value
    source: str
    """``file``, ``shapes``, ``default`` or ``user``."""
    because: str


@dataclass(frozen=True)
class Dims(Mapping[str, Value]):  # a Struct can be no Mapping: each has a metaclass of its own
    """Every size and semantic constant of one checkpoint, each with its provenance.

    Reads as a mapping of plain values (``dims["heads"]``); the provenance is in :attr:`entries`. ``deviations`` says in
    sentences where what is served is not what the code that wrote the checkpoint computes.
    """

    entries: Mapping[str, Dim]
    deviations: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Value:
        return self.entries[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def integer(self, name: str) -> int:
        """The value of a size. Raises TypeError if it is not an int, MdlError (INPUT) if the family settled none."""
        if name not in self.entries:
            raise input_error(
                f"the family's dims settle no {name}, which is needed here", do=f"measure.set({name!r}, …)"
            )
        value = self[name]
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, not an integer")
        return value

    def sizes(self) -> dict[str, int]:
        """The integers: what a mapping's patterns and operations may name."""
        return {
            k: d.value for k, d in self.entries.items() if isinstance(d.value, int) and not isinstance(d.value, bool)
        }

    def flags(self) -> dict[str, bool]:
        """The booleans: what a mapping's ``when`` may name."""
        return {k: v for k, v in self.items() if isinstance(v, bool)}

    def words(self) -> dict[str, str]:
        """The words: what a mapping's patterns may hold as a part of a name."""
        return {k: v for k, v in self.items() if isinstance(v, str)}

    def having(self, name: str, dim: Dim) -> Dims:
        """The same dims with one entry added or replaced."""
        return Dims({**self.entries, name: dim}, self.deviations)


class Measure:
    """Collects the dims of one checkpoint: the user's word first, then shapes, then files, then defaults.

    The user's word is ``given`` (``--set``) and, after that, the file ``config`` (``--config``).

    Two sources that contradict each other are a problem, never a silent choice. What no source knows is asked
    for, with the ``--set`` that answers it. All problems are raised together by :meth:`done`.
    """

    def __init__(self, inventory: Inventory, given: Mapping[str, str], config: Given | None = None) -> None:
        self.inventory = inventory
        self._given = dict(given)
        self._config = config
        self._entries: dict[str, Dim] = {}
        self._aliases: dict[str, str] = {}
        self._problems: list[Problem] = []
        self._deviations: list[str] = []

    def __getitem__(self, name: str) -> Value:
        return self._entries[name].value if name in self._entries else None

    def problem(self, what: str, where: str = "", do: str = "") -> None:
        """Report something that makes the checkpoint unfit for this family."""
        self._problems.append(Problem(what, where or self.inventory.path, do))

    def deviation(self, what: str) -> None:
        """Say where what is served is not what the code that wrote the checkpoint computes: `mdl plan` shows it."""
        self._deviations.append(what)

    def set(
        self,
        name: str,
        *,
        kind: Callable[[str], Value] = int,
        shape: tuple[Value, str] | None = None,
        file: tuple[str, ...] = (),
        default: tuple[Value, str] | None = None,
        ask: str = "",
        choices: tuple[Value, ...] = (),
    ) -> Value:
        """Settle one dim.

        ``shape`` and ``default`` are (value, reason); a None value means "not known from here". ``file`` lists
        dotted paths into the inventory's extras (``model_args.n_head``), the first that exists wins. ``kind``
        turns the text of ``--set name=text`` into a value. ``ask`` completes "… is not in the checkpoint: ".
        """
        keys = tuple(path.rpartition(".")[2] for path in file)
        self._aliases |= dict.fromkeys((name, *keys), name)
        told = self._from_config(name, keys, kind, file)
        beside = None if told else self._from_file(name, kind, file)  # the user's file may have become an extra too
        found = [
            dim for dim in (self._from_user(name, keys, kind), told, self._from_shape(shape), beside) if dim is not None
        ]
        self._contradictions(name, found)
        if not found and default is not None:
            found = [Dim(default[0], "default", default[1])]
        if not found:
            self._ask(name, keys, ask, kind, choices)
            return None
        if choices and found[0].value not in choices:
            allowed = ", ".join(str(c) for c in choices)
            self.problem(f"{name} is {found[0].value!r}", do=f"it must be one of: {allowed}")
        self._entries[name] = found[0]
        return found[0].value

    def _accept_from_config(self, name: str, value: Value, found: Mapping[str, Any]) -> None:
        """What --config says of a value that is taken as it stands: of its own type, and once."""
        file = self._config.file.name if self._config else ""
        for key, said in found.items():
            if value is not None and not _same_type(said, value):
                self.problem(f"{key} in {file} is {said!r}, where {name} is {value!r}", do=f"take {key} out of {file}")
            elif said != next(iter(found.values())):
                self.problem(f"{file} has several values of {name}: {', '.join(found)}", do="leave one of them")
            else:
                self._entries[name] = Dim(said, "user", f"{key} in {file} (--config)")

    def accept(
        self, name: str, value: Value, because: str, also: tuple[str, ...] = (), *, config: bool = False
    ) -> None:
        """Take a value of any kind from a file as it stands, unless the user overrules it (in JSON, or as text).

        ``also`` are other names under which ``--set`` may give it. With ``config`` it is a setting, which the file
        given by ``--config`` may hold too; what was worked out from others is none.
        """
        self._aliases |= dict.fromkeys((name, *also), name)
        self._entries[name] = Dim(value, "file", because)
        if config and self._config is not None:
            self._accept_from_config(name, value, self._config.find_whole(name, also))
        for key in (name, *also):
            if key in self._given:
                self._entries[name] = Dim(_json_or_text(self._given[key]), "user", f"--set {key}={self._given[key]}")

    def unsettled(self, *names: str) -> None:
        """Names of one dim that ``--set`` may give, although it can't be settled before something else is."""
        self._aliases |= dict.fromkeys(names, names[0])

    def done(self) -> Dims:
        """The dims. Raises MdlError (INPUT) with every contradiction and everything that is missing."""
        for key in self._given.keys() - self._aliases.keys():
            names = ", ".join(sorted(self._aliases))
            self._problems.append(Problem(f"--set {key}=…: this family has no such value", do=f"it has: {names}"))
        if self._problems:
            raise MdlError(Kind.INPUT, self._problems)
        return Dims(self._entries, tuple(self._deviations))

    def _from_user(self, name: str, keys: tuple[str, ...], kind: Callable[[str], Value]) -> Dim | None:
        said: dict[str, Dim] = {}
        for key in dict.fromkeys((name, *keys)):
            if key in self._given:
                text = self._given[key]
                try:
                    said[key] = Dim(_finite(kind(text)), "user", f"--set {key}={text}")
                except ValueError:
                    self.problem(f"--set {key}={text}: not a value for {name}", do=f"expected {_kind_name(kind)}")
        if len({str(dim.value) for dim in said.values()}) > 1:
            self.problem(" and ".join(d.because for d in said.values()), do=f"both are {name}: give one of them")
        return next(iter(said.values()), None)

    def _from_config(
        self, name: str, keys: tuple[str, ...], kind: Callable[[str], Value], paths: tuple[str, ...]
    ) -> Dim | None:
        """What the user's file says. Texts count too: yaml takes 1e-5 for one, and so do dumps of arguments."""
        if self._config is None:
            return None
        said: list[Dim] = []
        for key, value in self._config.find(name, keys, paths).items():
            if kind is int and value == -1:  # "ask the tokenizer", "as many as heads": no size, in anybody's settings
                continue
            because = f"{key} in {self._config.file.name} (--config)"
            typed = _typed(value, kind)
            if typed is None:
                self.problem(f"{because} is {value!r}: not a value for {name}", do=f"expected {_kind_name(kind)}")
            else:
                said.append(Dim(typed, "user", because))
        if len({str(dim.value) for dim in said}) > 1:
            both = " and ".join(f"{dim.value} by {dim.because}" for dim in said)
            self.problem(f"{name} is {both}", do=f"pass --set {keys[0] if keys else name}=VALUE, or leave one of them")
        return said[0] if said else None

    def _from_shape(self, shape: tuple[Value, str] | None) -> Dim | None:
        return Dim(shape[0], "shapes", shape[1]) if shape is not None and shape[0] is not None else None

    def _from_file(self, name: str, kind: Callable[[str], Value], paths: tuple[str, ...]) -> Dim | None:
        for path in paths:
            value = lookup(self.inventory.extras, path)
            if value is None:
                continue
            if (typed := _of_kind(value, kind)) is not None:
                return Dim(typed, "file", path)
            self.problem(f"{path} is {value!r}: not a value for {name}", do=f"expected {_kind_name(kind)}")
        return None

    def _contradictions(self, name: str, found: list[Dim]) -> None:
        """The user may overrule a file, but nobody overrules what the tensors' shapes say."""
        shape = next((d for d in found if d.source == "shapes"), None)
        for dim in found:
            if shape is not None and dim.source != "shapes" and dim.value != shape.value:
                self.problem(
                    f"{name} is {shape.value!r} by the tensors ({shape.because}) but {dim.value!r} by {dim.because}",
                    do="the checkpoint and its hyperparameters do not belong together, or this is another family",
                )

    def _ask(
        self, name: str, keys: tuple[str, ...], ask: str, kind: Callable[[str], Value], choices: tuple[Value, ...]
    ) -> None:
        key = keys[0] if keys else name
        reason = f": {ask}" if ask else ""
        do = f"pass --set {key}=VALUE"
        if kind is not int:
            tried = ("true", "false") if kind is boolean else choices or ("A", "B")
            values = ",".join(str(value) for value in tried)
            do += f", or let your own code decide: mdl verify CKPT --reference FILE.py:FUNCTION --decide {key}={values}"
        self.problem(f"{name} is neither in the checkpoint nor in its shapes{reason}", do=do)


def _finite(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(value)
    return value


def _typed(value: Any, kind: Callable[[str], Value]) -> Value:
    """A value as ``kind`` has it, read from text where it is one; None where it is none."""
    if not isinstance(value, str) or kind is str:
        return _of_kind(value, kind)
    try:
        return _finite(kind(value))
    except ValueError:
        return None


def _of_kind(value: Any, kind: Callable[[str], Value]) -> Value:
    """A value that is of this kind; an int is taken for a float. None where it is not, or not finite."""
    expected = _TYPES.get(kind, bool)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def _same_type(one: Any, other: Any) -> bool:
    return type(one) is type(other) or (isinstance(one, dict) and isinstance(other, dict))


def _json_or_text(text: str) -> Value:
    try:
        return json.loads(text)
    except ValueError:
        return text


_TYPES: dict[object, type] = {int: int, float: float, str: str}
_NAMES: dict[object, str] = {int: "an integer", float: "a number", str: "a word"}


def _kind_name(kind: Callable[[str], Value]) -> str:
    return _NAMES.get(kind) or kind.__doc__ or "another value"


def boolean(text: str) -> bool:
    """true or false"""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def lookup(extras: Mapping[str, Any], path: str) -> Any:
    """Follow a dotted path through nested mappings; None where it ends early."""
    node: Any = extras
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


class Arch(Struct, frozen=True):
    """One source family: what a newcomer writes to teach mdl an architecture.

    - ``detect(inventory)``: the evidence, in sentences, that this checkpoint is of the family; empty if it is not.
    - ``dims(measure)``: settle every size and constant with ``measure.set``.
    - ``hf_config(dims)``: config.json of the target class, readable by transformers and by vLLM.
    - ``eager``: ``"module:function"`` with ``build(dims) -> torch.nn.Module`` on the raw tensor names.
    - ``served``: ``"module:Class"`` of a vLLM model class, for architectures that vLLM itself lacks.
    - ``tensors``: what a class of the user's own holds: ``tensors(dims) -> {name: shape}``, or the name of a class that
      holds the same by the same fields of config.json. A plan is checked against it.
    - ``reference``: ``"FILE.py:FUNCTION"``, its path from the arch file's folder: the forward to verify against, as
      ``--reference`` takes it, where there is no ``eager``.

    ``file`` is a user's own file that defines it, empty for those of mdl; ``root`` the folder from which its modules
    are imported, where the file was named (``--arch FILE.py``) and not installed. The mapping is
    ``mappings/<name>.yaml``, or ``<file>.yaml`` beside that file.
    """

    name: str
    title: str
    source: str
    target: str
    detect: Callable[[Inventory], list[str]]
    dims: Callable[[Measure], None]
    hf_config: Callable[[Dims], dict[str, Any]]
    eager: str
    served: str | None = None
    mapping: str | None = None
    file: str = ""
    tensors: Callable[[Dims], Mapping[str, Shape]] | str | None = None
    reference: str = ""
    root: str = ""


class Match(Struct, frozen=True):
    """The family that a checkpoint belongs to, and why."""

    arch: Arch
    because: tuple[str, ...]
