"""Turns what lies beside the weights into plain values: stand-ins become dicts, tensors become words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..mappings.tensors import TensorInfo
from .inert import NumpyArray, Stub, StubType, Unreadable

MAX_VALUES = 10_000
"""A value with more parts than this is no hyperparameter and is left out."""
_SCALARS = (str, int, float, bool, complex, type(None))


class TooLargeError(Exception):
    """The value has more than MAX_VALUES parts."""


def plain(value: Any) -> Any:
    """``value`` in dicts, lists, tuples, numbers and strings. Raises TooLargeError.

    A stub becomes the dict of its attributes, an enum member its value. Whatever occurs twice is converted once, and
    a cycle ends in the text "(itself)", so no pickle can blow up here.
    """
    return _Converter().convert(value)


class _Converter:
    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._count = 0

    def convert(self, value: Any) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise TooLargeError
        if isinstance(value, _SCALARS):
            return value
        known = self._done.get(id(value))
        if known is None:
            self._done[id(value)] = "(itself)"
            known = self._done[id(value)] = self._fresh(value)
        return known

    def _fresh(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._key(key): self.convert(item) for key, item in dict.items(value)}
        if isinstance(value, (list, set, frozenset)):
            return [self.convert(item) for item in value]
        if type(value) is tuple:
            return tuple(self.convert(item) for item in value)
        return self._stub(value) if isinstance(value, Stub) else describe(value)

    def _key(self, key: Any) -> Any:
        return key if isinstance(key, _SCALARS) else str(self.convert(key))

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


def tensors_in(value: Any) -> int:
    """How many tensors lie anywhere in ``value``; each container is visited once."""
    return sum(1 for leaf in _leaves(value) if is_tensor(leaf))


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
