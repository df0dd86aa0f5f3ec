"""What is different in a layout's tensor: it is held against what the plan makes of the checkpoint, and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field

from ..convert.plan import Plan, Step
from ..convert.safetensors_file import read_safetensors
from ..convert.sources import lazy_source
from ..convert.stored import Files
from ..mappings.lazy import Array, Lazy
from ..mappings.moves import PermuteRope
from ..mappings.ops import OpError
from ..mappings.tensors import TensorInfo
from .signature import ranges


class Weights(Struct):
    """A layout's tensors and the plan's, side by side. ``heads`` are the head counts by which rows may be grouped."""

    layout: Path
    plan: Plan
    heads: tuple[int, ...]
    files: Files
    stored: Mapping[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])

    def __post_init__(self) -> None:
        for file in sorted(self.layout.glob("*.safetensors")):
            self.stored = {**self.stored, **read_safetensors(file)[0]}

    def steps(self) -> dict[str, Step]:
        """Which step makes which tensor."""
        return {target: step for step in self.plan.writes for target in step.targets}

    def planned(self, name: str) -> Lazy | None:
        """What the plan makes of the checkpoint under this name."""
        step = self.steps().get(name)
        if step is None:
            return None
        k = step.targets.index(name)
        if not step.sources:
            return Lazy.zeros(step.shapes[k], step.dtype)
        values = [lazy_source(self.files, source) for source in step.sources]
        for op in step.ops:
            values = op.apply(values)
        return values[k].cast(step.dtype)

    def difference(self, name: str) -> str:
        """What is wrong with a stored tensor, in words; empty if it is as planned or if nothing plans it."""
        planned = self.planned(name)
        if planned is None:
            return ""
        if name not in self.stored:
            return f"{name} is not in the layout"
        stored = self.files.tensor(self.stored[name])
        if stored.shape != planned.shape:
            return f"{name} is {list(stored.shape)}, should be {list(planned.shape)}"
        a, b = _numbers(stored), _numbers(planned)
        if np.array_equal(a, b):
            return ""
        words = next(_words(a, b, planned.dtype, self.heads), "") or self._another(name, a) or _where(a, b)
        return f"{name} {words}"

    def _another(self, name: str, a: Array) -> str:
        """Whether it is a tensor that belongs elsewhere."""
        for other, step in self.steps().items():
            shape = step.shapes[step.targets.index(other)]
            if other != name and shape == a.shape and step.sources:
                planned = self.planned(other)
                if planned is not None and np.array_equal(a, _numbers(planned)):
                    return f"holds what belongs into {other}"
        return ""


def _numbers(value: Lazy) -> Array:
    wide = value if value.dtype == "float64" else value.cast("float32")
    return np.array(wide.read())


def _words(a: Array, b: Array, dtype: str, heads: tuple[int, ...]) -> Iterator[str]:
    """Every known way in which ``a`` may have come from ``b``, exact matches only, the plainest first."""
    if not a.any():
        yield "is all zeros"
    if (a == 1).all():
        yield "is all ones"
    for small in ("bfloat16", "float16"):
        if dtype not in ("bfloat16", "float16") and np.array_equal(a, _rounded(b, small)):
            yield f"equals the checkpoint's rounded to {small}"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and np.array_equal(a, b.T):
        yield "is transposed"
    for count in heads:
        yield from _turned(a, b, count)
        yield from _reordered(a, b, count)
    yield from _shifted(a, b)
    yield from _constant(a, b)


def _rounded(b: Array, dtype: str) -> Array:
    kind = "float64" if b.dtype == np.float64 else "float32"
    return np.array(Lazy.of(b, kind).cast(dtype).cast(kind).read())


def _turned(a: Array, b: Array, heads: int) -> Iterator[str]:
    for back, words in ((True, "neighbouring pairs, not in halves"), (False, "halves once more")):
        try:
            turned = PermuteRope(heads, 0, back).apply([Lazy.of(b, str(b.dtype))])[0]
        except OpError:
            return
        if np.array_equal(a, turned.reshape(b.shape).read()):
            yield f"has the rows of each head in rotary {words}: permute_rope was {'forgotten' if back else 'repeated'}"


def _reordered(a: Array, b: Array, heads: int) -> Iterator[str]:
    for axis in range(a.ndim):
        if heads < 2 or a.shape[axis] % heads:
            continue
        theirs, ours = (np.split(x, heads, axis) for x in (a, b))
        order = [next((k for k, part in enumerate(ours) if np.array_equal(one, part)), -1) for one in theirs]
        if sorted(order) == list(range(heads)) and order != sorted(order):
            moved = ", ".join(f"{k} holds {j}" for k, j in enumerate(order) if k != j)
            yield f"has its heads in another order: {moved} (of {heads})"


def _shifted(a: Array, b: Array) -> Iterator[str]:
    for k in (1, -1, 2, -2):
        if len(a) > 4 and np.array_equal(a[k:] if k > 0 else a[:k], b[:-k] if k > 0 else b[-k:]):
            yield f"is shifted by {abs(k)} row{'s' if abs(k) > 1 else ''} {'down' if k > 0 else 'up'}"


def _constant(a: Array, b: Array) -> Iterator[str]:
    some: Any = np.abs(b) > 1e-30
    if some.any():
        ratio = float(np.median(a[some] / b[some]))
        if np.allclose(a, ratio * b, rtol=1e-6, atol=0):
            yield f"is {ratio:.6g} times what it should be"
    offset = float(np.median(a - b))
    if offset and np.allclose(a, b + offset, rtol=1e-6, atol=1e-6 * abs(offset)):
        yield f"is larger by {offset:.6g} throughout"


def _where(a: Array, b: Array) -> str:
    """The rows, or columns, that differ, and how if they all differ alike."""
    if a.ndim == 1:
        differing = np.flatnonzero(a != b)
        return f"differs in {ranges('value', differing.tolist())} of {len(a)}{_how(a[differing], b[differing])}"
    flat = [(a != b).reshape(a.shape[0], -1).any(1), (a != b).any(axis=tuple(i for i in range(a.ndim) if i != 1))]
    axis = int(flat[1].sum() / len(flat[1]) < flat[0].sum() / len(flat[0]))
    differing = np.flatnonzero(flat[axis])
    how = _how(np.take(a, differing, axis), np.take(b, differing, axis))
    return f"differs in {ranges('column' if axis else 'row', differing.tolist())} of {a.shape[axis]}{how}"


def _how(a: Array, b: Array) -> str:
    if not a.any():
        return ", zero there"
    words = next(_constant(a, b), "")
    return f", where it {words}" if words else f", by at most {float(np.abs(a - b).max()):.3g}"
