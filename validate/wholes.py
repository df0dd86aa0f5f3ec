"""Weights that lie in parts, put together once more for the reference: by torch, and from the files' own names.

A conversion puts them together too (:mod:`mdl.convert.composed`). Nothing of that is used here but which tensors belong
together: what each of them is, by which dimension it is measured, with which scale it is added, all is read again. A
mistake there is then a difference in the logits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.stored import Files
from ..errors import input_error
from ..mappings.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}
"""Bits of the fraction with the leading one, and the exponent of the smallest value."""


def whole_weight(info: TensorInfo, files: Files) -> Tensor:
    """A composed tensor, rounded to its own type, as float64. Raises MdlError (INPUT) for parts of no known kind."""
    if info.made is None:
        return _stored(info, files)
    parts = {_role(part): part for part in info.made.parts}
    lora = partial(_lora, info.made.settings)
    known = {
        frozenset({"weight", "A", "B"}): lora,
        frozenset({"table", "embedding A", "embedding B"}): lora,
        frozenset({"length", "direction"}): _weight_norm,
        frozenset({"matrix", "u", "v"}): _spectral_norm,
        frozenset({"matrix", "mask"}): _masked,
        frozenset({"weight"}): _replaced,
    }
    for beside, role, meant in (("embedding A", "weight", "table"), ("matrix", "direction", "v")):
        if beside in parts and role in parts:  # names that mean one thing here and another there
            parts[meant] = parts.pop(role)
    function = known.get(frozenset(parts))
    if function is None:
        raise input_error(f"{info.name} is made of {', '.join(sorted(parts))}: no reference for that", info.file)
    return rounded(function(parts, files), info.dtype)


def _role(part: TensorInfo) -> str:
    """What a part is, by the end of its name in its file."""
    name = part.raw.rpartition("/")[2]
    for end, role in _ROLES:
        if re.search(end, name):
            return role
    return "weight"


_ROLES = (
    (r"\.lora_embedding_A(\.\w+)?$", "embedding A"),
    (r"\.lora_embedding_B(\.\w+)?$", "embedding B"),
    (r"\.lora_[Aa](\.\w+)*$", "A"),
    (r"\.lora_[Bb](\.\w+)*$", "B"),
    (r"(^|\.)weight_g$|\.original0$", "length"),
    (r"\.original1$", "direction"),
    (r"\.0\._u$|(^|\.)weight_u$", "u"),
    (r"\.0\._v$", "v"),
    (r"(^|\.)(weight|bias)_mask$", "mask"),
    (r"(^|\.)(weight|bias)_orig$|\.original$", "matrix"),
    (r"(^|\.)weight_v$", "direction"),
)


def _stored(info: TensorInfo, files: Files) -> Tensor:
    import numpy as np
    import torch

    if info.made is not None:
        return whole_weight(info, files)
    return torch.from_numpy(np.array(files.tensor(info).cast("float64").read()))


def _weight_norm(parts: Mapping[str, TensorInfo], files: Files) -> Tensor:
    """By torch's own function; the dimension is the only one in which g has as many values as v has there."""
    import torch

    g, v = _stored(parts["length"], files), _stored(parts["direction"], files)
    own = [k for k in range(g.dim()) if g.numel() == g.shape[k] == v.shape[k]]
    return torch._weight_norm(v, g, own[0] if own else -1)  # type: ignore[no-any-return]  # torch's stubs say Any


def _spectral_norm(parts: Mapping[str, TensorInfo], files: Files) -> Tensor:
    import torch

    matrix, u, v = (_stored(parts[role], files) for role in ("matrix", "u", "v"))
    turned = matrix if matrix.shape == (len(u), len(v)) else matrix.T
    return matrix / torch.dot(u, torch.mv(turned, v))


def _masked(parts: Mapping[str, TensorInfo], files: Files) -> Tensor:
    return _stored(parts["matrix"], files) * _stored(parts["mask"], files)


def _lora(said: str, parts: Mapping[str, TensorInfo], files: Files) -> Tensor:
    """W + scale · B A, with the scale that the adapter's settings, a file, say."""
    table = "table" in parts
    names = ("table", "embedding A", "embedding B") if table else ("weight", "A", "B")
    weight, a, b = (_stored(parts[name], files) for name in names)
    info = parts[names[1]]
    settings = json.loads(Path(said).read_text(encoding="utf-8"))
    product = b @ a
    square = product.shape[0] == product.shape[1]
    turned = table or (bool(settings.get("fan_in_fan_out")) if square else product.shape != weight.shape)
    return weight + (product.T if turned else product) * _scale(settings, info, len(a))


def _scale(settings: Mapping[str, Any], info: TensorInfo, rank: int) -> float:
    """alpha / r or alpha / √r; alpha is the first pattern's that the module's name ends with."""
    module = re.sub(r"\.lora_\w+(\.\w+)*$", "", info.raw.rpartition("/")[2]).removeprefix("base_model.model.")
    patterns: dict[str, Any] = settings.get("alpha_pattern") or {}
    fitting = [alpha for end, alpha in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{end})", module)]
    alpha = float(fitting[0] if fitting else settings["lora_alpha"])
    return alpha * rank ** (-0.5 if settings.get("use_rslora") else -1)


def _replaced(parts: Mapping[str, TensorInfo], files: Files) -> Tensor:
    return _stored(parts["weight"], files)


def rounded(values: Tensor, dtype: str) -> Tensor:
    """float64 values at the nearest that ``dtype`` has, ties to even, infinity beyond its largest. torch's own cast to
    two bytes goes through float32 and rounds twice."""
    import torch

    if dtype == "float64":
        return values
    bits, least = _BITS[dtype]
    _, exponent = torch.frexp(values)
    step = (exponent - bits).clamp(min=least).double()
    made = torch.ldexp(torch.round(torch.ldexp(values, -step)), step)
    made = torch.where(values.isfinite() & (values != 0), made, values)
    return torch.where(made.abs() > torch.finfo(getattr(torch, dtype)).max, made.sign() * math.inf, made)
