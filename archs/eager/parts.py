"""What every eager reference needs: reading dims, and modules that are born without weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import input_error
from ..base import Value

_T = TypeVar("_T", int, float, str, bool)
LEARNED = "learned positions end there: use a shorter prompt"
"""What to do where the context is the length of a table."""


def take(dims: Mapping[str, Value], name: str, kind: type[_T]) -> _T:
    """One dim of the given type; an int is taken for a float. Raises MdlError (INPUT) if it is missing or another."""
    value = dims.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise input_error(
            f"{name} is {value!r}, not of type {kind.__name__}",
            f"dims: {name}",
            f"the eager reference can't be built without it; pass --set {name}=VALUE",
        )
    return value


def taken(dims: Mapping[str, Value], kinds: Mapping[type, Iterable[str]]) -> dict[str, Any]:
    """Dims by name, each of the type under which it is listed. Raises MdlError (INPUT) as :func:`take` does."""
    return {name: take(dims, name, kind) for kind, names in kinds.items() for name in names}


def check_heads(sizes: Mapping[str, Any]) -> None:
    """Raise MdlError (INPUT) where ``heads`` can't share ``kv_heads`` evenly, or channels don't come in pairs."""
    if sizes["heads"] % sizes["kv_heads"] or sizes["head_dim"] % 2:
        what = f"{sizes['heads']} heads of {sizes['head_dim']} channels can't share {sizes['kv_heads']} key heads"
        raise input_error(what, "dims: heads, kv_heads", "check n_heads")


def length_of(ids: Tensor, context: int, do: str = "use a shorter prompt") -> int:
    """T of token ids [B, T]. Raises MdlError (INPUT) where it exceeds the context."""
    length = ids.shape[1]
    check_length(length, context, do)
    return length


def check_length(length: int, context: int, do: str = "use a shorter prompt") -> None:
    """Raise MdlError (INPUT) where so many tokens exceed the context."""
    if length > context:
        raise input_error(f"{length} tokens do not fit a context of {context}", "input ids", do)


class Linear(nn.Linear):
    """A projection that is born empty: drawing numbers, even on the meta device, costs seconds of imports."""

    def reset_parameters(self) -> None:
        """Leave the weights to the checkpoint."""


class Embedding(nn.Embedding):
    """A table that is born empty, for the same reason."""

    def reset_parameters(self) -> None:
        """Leave the weights to the checkpoint."""


class TiedHead(nn.Module):
    """The output projection by the embedding's weight: it exists so that the head is a module in both cases."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the embedding [V, C] to logits [B, T, V]."""
        return functional.linear(x, weight)


def softcap(x: Tensor, limit: float) -> Tensor:
    """``limit · tanh(x / limit)``; 0 for no limit."""
    return torch.tanh(x / limit) * limit if limit else x
