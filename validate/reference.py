"""The other side of the proof: the original forward pass, run eagerly on the raw checkpoint."""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct, field

from ..archs.base import Arch, Dims
from ..archs.guard import build_eager, load_weights
from ..convert.plan import Plan, Source, Step
from ..convert.sources import lazy_source
from ..convert.stored import Files
from ..errors import MdlError, input_error, machine_error, usage_error
from .compare import Distance, distance
from .inputs import Inputs
from .record import Forward, Unusable, load_model
from .wholes import rounded, whole_weight

if TYPE_CHECKING:
    import torch


PRECISIONS = ("float32", "float64", "bfloat16", "float16")


class Reference(Struct, frozen=True):
    """A forward pass to believe in.

    ``logits(ids, dtype)`` maps token ids [T] to logits [T, V] computed in ``dtype``, one of ``dtypes``, always from the
    original weights, never from already rounded ones. ``exact`` tells whether a float64 run is possible; without one
    only the absolute ceiling can be applied.

    A recorded reference is not ``free``: it answers for the sequences of ``inputs`` alone, and only in its exact
    precision. How far its own runs were from that is in ``floors``: precision → one distance per sequence.
    ``module`` is the module behind a reference that runs here, if there is one, for those who want to hook it;
    ``closed`` says why there can be none. ``other`` says that it was made from another checkpoint than the one at hand.
    """

    name: str
    logits: Callable[[list[int], str], torch.Tensor]
    exact: bool = True
    notes: tuple[str, ...] = ()
    inputs: Inputs | None = None
    free: bool = True
    dtypes: tuple[str, ...] = PRECISIONS
    floors: Mapping[str, tuple[Distance, ...]] = field(default_factory=dict[str, tuple[Distance, ...]])
    module: torch.nn.Module | None = None
    closed: str = ""
    other: str = ""

    def floor(self, ids: list[int], dtype: str, exact: torch.Tensor) -> Distance:
        """How far this reference's own run in ``dtype`` is from its ``exact`` logits [T, V]: run, or recorded."""
        if self.inputs is None or dtype not in self.floors:
            return distance(self.logits(ids, dtype), exact)
        return self.floors[dtype][[list(one.ids) for one in self.inputs.sequences].index(ids)]


def builtin_reference(arch: Arch, dims: Dims, plan: Plan) -> Reference:
    """The family's own eager module on the raw tensors, rank files joined.

    Weights go through the element type that the plan writes first: where ``--dtype`` rounded them, the reference
    computes with the same rounded weights. Raises MdlError (INPUT) for a user's own module that does not fit.
    """
    module = build_eager(arch, dims)
    wanted = set(module.state_dict()) or {s.name for step in plan.writes for s in step.sources}
    load_weights(arch, module, _raw_weights(plan, wanted))
    rounded = rounded_to(plan)
    notes = (f"the reference uses weights rounded to {rounded}, as --dtype asked",) if rounded else ()
    own = f"{arch.eager} of {Path(arch.file).name}" if arch.file else f"mdl's eager {arch.name}"
    name = str(getattr(module, "title", own))
    forward = Forward(module, name)
    forward.vocab = dims.integer("vocab")
    return Reference(name, logits_of(forward), notes=notes, module=module)


def rounded_to(plan: Plan) -> str:
    """The type that a conversion with ``--dtype`` rounded weights to, or nothing."""
    return ", ".join(sorted({s.dtype for s in plan.writes if s.sources and s.dtype != _planned(s)}))


def _planned(step: Step) -> str:
    """The type that a step writes where nobody asks for another."""
    dtype = step.source_dtype
    for op in step.ops:
        dtype = op.dtype(dtype)
    return dtype


def _raw_weights(plan: Plan, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The checkpoint's own tensors by their own names, in float32 (float64 stays float64)."""
    import numpy as np
    import torch

    weights: dict[str, torch.Tensor] = {}
    with Files() as files:
        for step in plan.steps:
            for source in step.sources:
                if source.name not in wanted:
                    continue
                if any(info.made for info in source.infos):
                    weights[source.name] = _put_together(source, step, files)
                    continue
                value = lazy_source(files, source)
                if step.kind not in ("drop", "tie") and value.dtype == step.source_dtype:  # not the factors of float8
                    value = value.cast(step.dtype)
                value = value if value.dtype == "float64" else value.cast("float32")
                weights[source.name] = torch.from_numpy(np.array(value.read()))
    return weights


def _put_together(source: Source, step: Step, files: Files) -> torch.Tensor:
    """A weight that lies in parts: not as the conversion makes it, which is what is to be proven."""
    import torch

    value = whole_weight(source.infos[0], files)
    if step.kind not in ("drop", "tie") and step.dtype != source.infos[0].dtype:
        value = rounded(value, step.dtype)
    return value if source.infos[0].dtype == step.dtype == "float64" else value.to(torch.float32)


def check_vocabulary(reference: Reference, logits: torch.Tensor, vocab: int) -> None:
    """Raise MdlError (INPUT) for logits [T, V] of another vocabulary than the checkpoint's ``vocab`` rows."""
    if logits.shape[-1] != vocab:
        what = f"gives {logits.shape[-1]} logits per position, the checkpoint has {vocab} rows"
        raise input_error(what, reference.name, "the reference and the checkpoint do not belong together")


def check_spec(spec: str, python: str | None = None) -> None:
    """What can be said of ``FILE.py:FUNCTION`` before anything runs. Raises MdlError: USAGE where it names no file or
    no function, INPUT where the file is not Python (of this version: another ``python`` has to see for itself)."""
    file, colon, function = spec.rpartition(":")
    if not colon or not file or not function.isidentifier():
        do = "write --reference FILE.py:FUNCTION, such as model.py:build"
        raise usage_error(f"--reference {spec}: names no function of a file", "", do)
    if not Path(file).is_file():
        raise usage_error(f"--reference {spec}: there is no such file", file, "check the path")
    if python is None:
        try:
            ast.parse(Path(file).read_bytes(), file)
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            text = (error.text or "").strip() if isinstance(error, SyntaxError) else ""
            told = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
            raise input_error(f"{told}: {text}" if text else told, f"{file}{line}", "mend the file") from None


def user_reference(spec: str, checkpoint: Path, *, rounded: str = "") -> Reference:
    """The user's own code: ``model.py:build`` with ``build(checkpoint: Path)`` -> a module or a callable.

    The result maps ids to logits; docs/reference.md lists the forms that are understood. ``rounded`` sends the
    parameters through that type first, as ``mdl convert --dtype`` did. The file's code runs in this process, as it
    was asked to. Raises MdlError: INPUT for what can't be used, with what to write; MACHINE where memory ends.
    """
    with translating():
        forward = Forward(load_model(spec, checkpoint), spec)
        notes: tuple[str, ...] = ()
        if rounded:
            forward.round_weights(rounded)
            notes = (f"the reference uses weights rounded to {rounded}, as --dtype asked",)
        forward.probe()
    notes += tuple(forward.notes)
    dtypes = PRECISIONS if forward.module is not None else ("float32",)
    dtypes = dtypes if forward.exact else tuple(d for d in dtypes if d != "float64")
    return Reference(spec, logits_of(forward), exact=forward.exact, notes=notes, dtypes=dtypes, module=forward.module)


def logits_of(forward: Forward) -> Callable[[list[int], str], torch.Tensor]:
    """The forward as a reference's ``logits``."""

    def logits(ids: list[int], dtype: str) -> torch.Tensor:
        with translating():
            return forward.logits(ids, dtype)

    return logits


@contextmanager
def translating() -> Generator[None]:
    """What :mod:`mdl.validate.record` raises, as the errors of the house."""
    try:
        yield
    except Unusable as error:
        if isinstance(error.__cause__, MdlError):
            raise error.__cause__ from error
        raise unusable(error.what, error.where, error.do, machine=error.machine) from error


def unusable(what: str, where: str, do: str, *, machine: bool) -> MdlError:
    """A reference that can't be used: the input's fault, or the machine's."""
    return (machine_error if machine else input_error)(what, where, do)
