"""Weights that torch saved in parts stand in the inventory as wholes: those of weight_norm, spectral_norm and pruning.

What they are made by is told by the names that torch gives the parts and by their shapes. Parts that do not fit stay as
they are, and are refused by their names (refused.yaml).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from ..archs.base import Inventory
from ..mappings.tensors import FLOATING, Made, Shape, TensorInfo
from .composed import MASKED, SPECTRAL_NORM, WEIGHT_NORM, norm_axis, whole_of

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.(.+)")
"""The module, the parameter, and what is held of it."""


class Form(Struct, frozen=True):
    """A way in which torch takes a weight apart: the ends of its parts' names, in the order of its recipe, of which the
    first has the whole's shape and type; whether shapes are such parts'; and how to say what they are."""

    how: str
    ends: tuple[str, ...]
    fits: Callable[[list[Shape]], bool]
    words: str


def _one_length(shapes: list[Shape]) -> bool:
    try:
        norm_axis(shapes[1], shapes[0])
    except ValueError:
        return False
    return True


def _one_vector_each(shapes: list[Shape]) -> bool:
    weight, u, v = shapes
    return len(weight) == 2 and (*u, *v) in (weight, weight[::-1]) and len(u) == len(v) == 1


def _alike(shapes: list[Shape]) -> bool:
    return shapes[0] == shapes[1]


_V_G, _SIGMA = "v · g / ‖v‖", "W / (u · W v)"
_OLD = (
    Form(WEIGHT_NORM, ("weight_v", "weight_g"), _one_length, f"{_V_G} of torch.nn.utils.weight_norm"),
    Form(
        SPECTRAL_NORM,
        ("weight_orig", "weight_u", "weight_v"),
        _one_vector_each,
        f"{_SIGMA} of torch.nn.utils.spectral_norm",
    ),
    Form(MASKED, ("weight_orig", "weight_mask"), _alike, "values · mask of torch.nn.utils.prune"),
    Form(MASKED, ("bias_orig", "bias_mask"), _alike, "values · mask of torch.nn.utils.prune"),
)
_FIRST = tuple(form.ends[0] for form in _OLD)
_NEW = (
    Form(WEIGHT_NORM, ("original1", "original0"), _one_length, f"{_V_G} of torch.nn.utils.parametrizations"),
    Form(SPECTRAL_NORM, ("original", "0._u", "0._v"), _one_vector_each, f"{_SIGMA} of torch.nn.utils.parametrizations"),
)
"""Of parametrizations, exactly these parts: one more, and another function was at work after this one."""


def folded(inventory: Inventory) -> Inventory:
    """The inventory with a whole in the place of the first of each weight's parts."""
    text = "\n".join((*inventory.tensors, ""))
    if "parametrizations." not in text and not any(f"{end}\n" in text for end in _FIRST):
        return inventory
    found = _found(inventory.tensors)
    if not found:
        return inventory
    whole_by_part = {name: (whole, form) for whole, (form, names) in found.items() for name in names}
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for name, infos in inventory.tensors.items():
        if name not in whole_by_part:
            tensors[name] = infos
            continue
        whole, form = whole_by_part[name]
        if whole not in tensors:
            tensors[whole] = (_whole(whole, form, [inventory.tensors[part][0] for part in found[whole][1]]),)
    return replace(inventory, tensors=tensors, remarks=(*inventory.remarks, *_remarks(found)))


def _found(tensors: Mapping[str, tuple[TensorInfo, ...]]) -> dict[str, tuple[Form, tuple[str, ...]]]:
    """By the name of the whole, how it lies in parts, and the parts' names."""
    found: dict[str, tuple[Form, tuple[str, ...]]] = {}
    for whole, form, names in [*_old(tensors), *_new(tensors)]:
        infos = [tensors[name] for name in names]
        alone = all(len(ranks) == 1 for ranks in infos)
        if whole not in tensors and whole not in found and alone:
            parts = [ranks[0] for ranks in infos]
            real = not any(part.dtype.startswith("complex") for part in parts)
            if form.fits([part.shape for part in parts]) and parts[0].dtype in FLOATING and real:
                found[whole] = form, names
    return found


def _old(tensors: Iterable[str]) -> Iterable[tuple[str, Form, tuple[str, ...]]]:
    """Parts that lie beside each other: ``X.weight_g``."""
    first = [name for name in tensors if name.endswith(_FIRST)]
    if not first:
        return
    there = set(tensors)
    for name in first:
        module, dot, leaf = name.rpartition(".")
        for form in _OLD:
            names = tuple(module + dot + end for end in form.ends)
            if leaf == form.ends[0] and there.issuperset(names):
                yield module + dot + leaf.rpartition("_")[0], form, names


def _new(tensors: Iterable[str]) -> Iterable[tuple[str, Form, tuple[str, ...]]]:
    """Parts under ``X.parametrizations.weight``."""
    held: dict[tuple[str, str], dict[str, str]] = {}
    for name in (name for name in tensors if "parametrizations." in name):
        if match := _PARAMETRIZED.fullmatch(name):
            held.setdefault((match[1] or "", match[2]), {})[match[3]] = name
    for (module, parameter), parts in held.items():
        for form in _NEW:
            if set(parts) == set(form.ends):
                whole = f"{module}.{parameter}" if module else parameter
                yield whole, form, tuple(parts[end] for end in form.ends)


def _whole(name: str, form: Form, parts: list[TensorInfo]) -> TensorInfo:
    """The entry of a whole; its path in the file is that of the part with its values, but for the end."""
    leaf = name.rpartition(".")[2]
    above = parts[0].raw.removesuffix(form.ends[0]).removesuffix(f"parametrizations.{leaf}.")
    return whole_of(Made(form.how, tuple(parts)), parts[0], name, above + leaf)


def _remarks(found: Mapping[str, tuple[Form, tuple[str, ...]]]) -> list[str]:
    wholes: dict[str, list[str]] = {}
    for whole, (form, _) in found.items():
        wholes.setdefault(form.words, []).append(whole)
    return [
        f"put together {_count(names)}: {words}, in float64, rounded once" for words, names in sorted(wholes.items())
    ]


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,} weights, {names[0]} the first"
