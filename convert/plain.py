"""Turns what lies beside the weights into plain values: stand-ins become dicts, tensors become words."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..mappings.tensors import TensorInfo
from .inert import NumpyArray, Stub, StubType, Unreadable

MAX_VALUES = 10_000
"""A value with more parts than this is no hyperparameter and is left out."""
MAX_DEPTH = 50
"""A value nested more deeply than this is no hyperparameter and is left out."""
MAX_TEXT = 100_000
"""A text of more characters than this is no hyperparameter and is told by its length alone."""
_SCALARS = (str, int, float, bool, complex, type(None))


class TooLargeError(Exception):
    """The value has more than MAX_VALUES parts or is nested more than MAX_DEPTH deep."""


def plain(value: Any) -> Any:
    """``value`` in dicts, lists, tuples, numbers and strings. Raises TooLargeError.

    A stub becomes the dict of its attributes, an enum member its value. A cycle ends in the text "(itself)". What
    occurs twice is converted once but counted twice, for whoever prints it meets it twice: no pickle can blow up here.
    """
    return _Converter().convert(value)


class _Converter:
    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int]] = {}
        self._count = 0
        self._depth = 0

    def convert(self, value: Any) -> Any:
        self._count += 1
        if isinstance(value, _SCALARS):
            return self._scalar(value)
        known = self._done.get(id(value))
        if known is None:
            before = self._count
            self._done[id(value)] = "(itself)", 1
            self._depth += 1
            self._check()
            known = self._done[id(value)] = self._fresh(value), self._count - before
            self._depth -= 1
        else:
            self._count += known[1]
        self._check()
        return known[0]

    def _check(self) -> None:
        if self._count > MAX_VALUES:
            raise TooLargeError("it has too many values")
        if self._depth > MAX_DEPTH:
            raise TooLargeError("it is nested too deeply")

    def _scalar(self, value: Any) -> Any:
        self._check()
        return f"(a text of {len(value):,} characters)" if type(value) is str and len(value) > MAX_TEXT else value

    def _fresh(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._key(key): self.convert(item) for key, item in dict.items(value)}
        if isinstance(value, (list, set, frozenset)):
            return [self.convert(item) for item in value]
        if type(value) is tuple:
            return tuple(self.convert(item) for item in value)
        return self._stub(value) if isinstance(value, Stub) else describe(value)

    def _key(self, key: Any) -> Any:
        return self._scalar(key) if isinstance(key, _SCALARS) else str(self.convert(key))

    def _stub(self, stub: Stub) -> Any:
        state = stub.state
        if stub.qualname.startswith("omegaconf."):  # its nodes keep the value under one of these names
            for name in ("_content", "_val"):
                if name in state:
                    return self.convert(state[name])
        if stub.entries:  # a subclass of dict: its attributes repeat its entries or are its own machinery
            return self.convert(stub.entries)
        if stub.elements:
            return self.convert(stub.elements)
        if set(state) == {"state"}:
            return self.convert(state["state"])
        if state or not stub.args:
            return self.convert(state)
        return self.convert(stub.args[0] if len(stub.args) == 1 else list(stub.args))


def describe(value: Any) -> Any:
    """A leaf in words: ``tensor float32 [4, 8]``."""
    if isinstance(value, TensorInfo):
        return f"tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, Unreadable):
        return f"tensor, unreadable: {value.reason}"
    if isinstance(value, NumpyArray):
        return value.value()
    if isinstance(value, StubType):
        return value.qualname
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"({type(value).__name__})"


def is_tensor(value: Any) -> bool:
    """Whether a leaf stands for a tensor, readable or not; a numpy array counts unless it is 0-d."""
    return isinstance(value, (TensorInfo, Unreadable)) or (isinstance(value, NumpyArray) and bool(value.shape))


_TRAINING = re.compile(
    r"(optim|opt_state|lr_sched|sched|scaler|grad_scaler|rng|random_state|callbacks|loops|dataloader)"
)


def is_training(key: object) -> bool:
    """Whether a key names training state. A dotted key is a tensor's name, whatever its first part is called."""
    text = key_text(key)
    return "." not in text and _TRAINING.match(text) is not None


_COUNTS: ContextVar[dict[int, int] | None] = ContextVar("_COUNTS", default=None)


@contextmanager
def counts_kept() -> Generator[None]:
    """Keep what :func:`tensors_in` finds; usable as a decorator. The tree that is looked at must not change meanwhile.

    A file can put one large table under many keys, which would be searched once for each of them.
    """
    token = _COUNTS.set({})
    try:
        yield
    finally:
        _COUNTS.reset(token)


def tensors_in(value: Any) -> int:
    """How many tensors lie anywhere in ``value``; each container is visited once."""
    if isinstance(value, _SCALARS) or type(value) is TensorInfo:
        return 0 if isinstance(value, _SCALARS) else 1
    kept = _COUNTS.get()
    if kept is None:
        return sum(1 for leaf in _leaves(value) if is_tensor(leaf))
    if id(value) not in kept:
        kept[id(value)] = sum(1 for leaf in _leaves(value) if is_tensor(leaf))
    return kept[id(value)]


def key_text(key: Any) -> str:
    """The key of a table as text. Only simple ones are spelled out: the text of nested values can be of any length."""
    if type(key) is str:
        return key
    if isinstance(key, tuple) and all(isinstance(part, _SCALARS) for part in key):
        return str(key)
    return str(key) if isinstance(key, _SCALARS) else str(describe(key))


def _leaves(value: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _SCALARS) or id(node) in seen:
            continue
        if isinstance(node, dict):
            waiting.extend(dict.values(node))
        elif isinstance(node, (list, tuple, set, frozenset)):
            waiting.extend(node)
        elif isinstance(node, Stub):
            waiting.extend((node.args, node.kwargs, node.state, node.entries, node.elements))
        else:
            yield node
            continue
        seen.add(id(node))
