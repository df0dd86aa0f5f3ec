"""Finds the state dict in what a file holds: under which keys it lies, and what else could be meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import input_error, usage_error
from .inert import Stub
from .open import Checkpoint
from .plain import is_tensor, is_training, key_text, tensors_in

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "weights", "params")
WRAPPERS_EMA = ("ema", "ema_model", "model_ema", "ema_state_dict")
"""Keys under which training scripts store a state dict."""
TABLES = ("language_model",)
"""Keys of tables of tables that are a state dict nevertheless: Megatron-LM before megatron-core."""

STATE_DICT = "save model.state_dict(), a table of names to tensors"

Path = tuple[str, ...]


def choose(ckpt: Checkpoint, weights: str | None) -> Path:
    """The path of the state dict in the first rank's tree; the other ranks must have it too."""
    tree = ckpt.trees[0]
    if weights is not None:
        path = tuple(part for part in weights.split("/") if part)
        if _has_weights(at(tree, path)):
            return path
        known = ", ".join("/".join(p) or "(the top level)" for p in _everywhere(tree)) or "none"
        raise usage_error(f"--weights {weights}: there are no tensors under that key", ckpt.path, f"found: {known}")
    _refuse_module(tree, ckpt.path)
    found = list(_candidates(tree, (), set()))
    if len(found) == 1:
        return found[0]
    everywhere = [path for path in (found or _everywhere(tree)) if path]
    counted = [(p, n) for p in everywhere if (n := tensors_in(at(tree, p)))]
    flags = "; ".join(f"--weights {'/'.join(p)} ({n:,} tensors)" for p, n in counted)
    if found:
        raise input_error("this checkpoint holds several sets of weights", ckpt.path, f"choose one: {flags}")
    if not counted and (optimizer := _optimizer(tree)):
        what = f"this holds the state of an optimizer ({optimizer}), and no weights"
        raise input_error(what, ckpt.path, "give the file that the model's weights were saved to in the same step")
    raise input_error(
        "no weights were found in this checkpoint under a known key",
        ckpt.path,
        f"choose one: {flags}" if flags else STATE_DICT,
    )


def _optimizer(tree: Any) -> str:
    """Where a tree keeps what torch.optim's state_dict() gives, by its two keys, if it has no weights."""
    for key, node in {"": tree, **table_of(tree)}.items():
        if {"state", "param_groups"} <= table_of(node).keys():
            return f"state and param_groups{f' under {key_text(key)}' if key else ''}"
    return ""


def _refuse_module(tree: Any, path: str) -> None:
    for value in (tree, *(table_of(tree).get(key) for key in WRAPPERS + WRAPPERS_EMA)):
        if isinstance(value, Stub) and "_modules" in value.state:
            raise input_error(
                f"this file holds a whole module ({value.qualname}), whose meaning is in its source code",
                path,
                "load it where that code is, and save model.state_dict() instead of the model",
            )


def table_of(node: Any) -> dict[Any, Any]:
    """The entries of a dict or of an unknown subclass of dict; empty for anything else."""
    if isinstance(node, Stub):
        return node.entries
    return node if isinstance(node, dict) else {}


def at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = table_of(tree).get(key)
    return tree


def _has_weights(node: Any) -> bool:
    """Whether a table holds tensors of at least one dimension under names that are not training state."""
    return any(
        is_tensor(value) and getattr(value, "shape", (1,)) != () and not is_training(key)
        for key, value in table_of(node).items()
    )


def _candidates(node: Any, path: Path, seen: set[int]) -> Iterator[Path]:
    """Paths of state dicts. A wrapper key beats tensors beside it (a loss history, an RNG state)."""
    table = table_of(node)
    if not table or id(node) in seen or len(path) > 4:
        return
    seen.add(id(node))
    below = [found for key in WRAPPERS + WRAPPERS_EMA for found in _candidates(table.get(key), (*path, key), seen)]
    if below:
        yield from below
    elif _has_weights(node) or (path and any(tensors_in(table.get(key)) for key in TABLES)):
        yield path


def _everywhere(tree: Any) -> list[Path]:
    """State dicts under any key of the first two levels, training state aside: for advice."""
    found: list[Path] = [()] if _has_weights(tree) else []
    for key, value in table_of(tree).items():
        if isinstance(key, str) and not is_training(key):
            found += [(key,)] if _has_weights(value) else []
            found += [(key, key_text(k)) for k, v in table_of(value).items() if not is_training(k) and _has_weights(v)]
    return found
