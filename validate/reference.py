"""The other side of the proof: the original forward pass, run eagerly on the raw checkpoint."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..archs.base import Arch, Dims
from ..convert.plan import Plan
from ..convert.sources import Files, lazy_source
from ..errors import input_error, machine_error

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reference:
    """A forward pass to believe in.

    ``logits(ids, dtype)`` maps token ids [T] to logits [T, V] computed in ``dtype`` ("float32" or "float64").
    ``exact`` tells whether a float64 run is possible; without one only the absolute ceiling can be applied.
    """

    name: str
    logits: Callable[[list[int], str], torch.Tensor]
    exact: bool = True
    notes: tuple[str, ...] = ()


def builtin_reference(arch: Arch, dims: Dims, plan: Plan) -> Reference:
    """The family's own eager module on the raw tensors, rank files joined, in float32 and float64.

    Weights go through the element type that the plan writes first: where ``--dtype`` rounded them, the reference
    computes with the same rounded weights.
    """
    import torch

    module_name, _, function = arch.eager.partition(":")
    build = cast("Callable[[Dims], torch.nn.Module]", getattr(importlib.import_module(module_name), function))
    with torch.device("meta"):
        module = build(dims)
    module.load_state_dict(_raw_weights(plan, set(module.state_dict())), strict=True, assign=True)
    rounded = sorted({s.dtype for s in plan.writes if s.sources and s.dtype != s.source_dtype})
    notes = (f"the reference uses weights rounded to {', '.join(rounded)}, as --dtype asked",) if rounded else ()
    return Reference(f"mdl's eager {arch.name}", _runner(module), notes=notes)


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
                value = lazy_source(files, source)
                if step.kind not in ("drop", "tie"):
                    value = value.cast(step.dtype)
                value = value if value.dtype == "float64" else value.cast("float32")
                weights[source.name] = torch.from_numpy(np.array(value.read()))
    return weights


def user_reference(spec: str, checkpoint: Path) -> Reference:
    """The user's own code: ``model.py:build`` with ``build(checkpoint: Path)`` -> a module or a callable.

    The result maps ids [B, T] to logits [B, T, V] at every position; tuples, dicts and outputs with ``.logits``
    are understood, and a ``targets`` or ``labels`` parameter is fed (nanoGPT's forward returns only the last
    position without). The file's code runs, as it was asked to. Raises MdlError (INPUT) for what can't be used.
    """
    import torch

    build = _load_function(spec)
    try:
        model = build(checkpoint)
    except Exception as error:
        raise input_error(f"build({checkpoint}) raised {type(error).__name__}: {error}", spec) from error
    if isinstance(model, torch.nn.Module):
        return Reference(spec, _runner(model))
    if not callable(model):
        raise input_error(f"build returned {type(model).__name__}", spec, "return a torch.nn.Module or a callable")

    def once(ids: list[int], dtype: str) -> torch.Tensor:
        with torch.inference_mode():
            return _logits(model(torch.tensor([ids])), len(ids), spec)

    note = "the reference is a plain callable: no float64 run, so only the absolute ceiling applies"
    return Reference(spec, once, exact=False, notes=(note,))


def _load_function(spec: str) -> Callable[[Path], Any]:
    file, _, function = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise input_error(
            "is not FILE.py:FUNCTION with an existing file", spec, "for example --reference model.py:build"
        )
    module_spec = importlib.util.spec_from_file_location(f"mdl_user_reference_{path.stem}", path)
    assert module_spec is not None  # noqa: S101  (an existing .py file always has a spec)
    assert module_spec.loader is not None  # noqa: S101  (and a loader)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise input_error(f"raised {type(error).__name__}: {error}", str(path)) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise input_error(f"defines no function {function!r}", str(path), "def build(checkpoint: Path): return model")
    return cast("Callable[[Path], Any]", found)


def _runner(module: torch.nn.Module) -> Callable[[list[int], str], torch.Tensor]:
    """Run a module in the wanted precision, one sequence at a time; weights are converted once per change."""
    import torch

    module.eval()
    current = ""
    extra = _target_parameter(module)

    def run(ids: list[int], dtype: str) -> torch.Tensor:
        nonlocal current
        if dtype != current:
            module.to(getattr(torch, dtype))
            current = dtype
        batch = torch.tensor([ids])
        more = {extra: batch} if extra else {}
        try:
            with torch.inference_mode():
                return _logits(module(batch, **more), len(ids), type(module).__name__)
        except torch.OutOfMemoryError as error:
            raise machine_error(f"the reference ran out of memory: {error}") from error

    return run


def _target_parameter(module: torch.nn.Module) -> str:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in ("targets", "labels") if name in parameters), "")


def _logits(output: Any, length: int, name: str) -> torch.Tensor:
    """The [T, V] logits in whatever a forward returned. Raises MdlError (INPUT) with what to write instead."""
    import torch

    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping):
        output = cast("Mapping[str, Any]", output).get("logits")
    elif isinstance(output, tuple | list):
        tensors = (x for x in cast("tuple[Any, ...]", output) if isinstance(x, torch.Tensor) and x.dim() >= 2)
        output = next(tensors, None)
    if not isinstance(output, torch.Tensor):
        raise input_error(f"returns {type(output).__name__}, not logits", name, "return a tensor [B, T, V]")
    if output.dim() == 2 and output.shape[0] == length:
        output = output[None]
    if output.dim() != 3 or output.shape[0] != 1 or output.shape[1] != length:
        do = "wrap the model so that it returns logits at every position, shaped [B, T, V]"
        raise input_error(f"returns {list(output.shape)} for {length} tokens", name, do)
    return output[0]
