"""What the reference's modules answer, fed the same rounded inputs as vLLM's, in float64 and in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..errors import MdlError
from .client import Engine, EngineFailure
from .pairing import Seen, Unit, level, stream
from .reference import Reference

if TYPE_CHECKING:
    import torch

MINIMUM = 1e-15
"""The least a float32 floor can be: half a unit in the last place of every value is an NMSE of 1e-15."""


class Answer(Struct, frozen=True):
    """One unit on both sides: vLLM's answer and the exact one [T, N], and the errors (NMSE) of vLLM and of float32."""

    unit: Unit
    served: str
    got: torch.Tensor
    exact: torch.Tensor
    error: float
    floor: float


def ask(
    reference: Reference,
    seen: Seen,
    units: Sequence[Unit],
    engine: Engine,
    layout: Path,
    scratch: Path,
    ids: list[int],
) -> list[Answer] | EngineFailure:
    """Ask every unit on both sides; without those that vLLM has no module for, or that answer in another shape."""
    from safetensors.torch import load_file, save_file

    exact = {unit.key: answer(unit, seen, "float64") for unit in units}
    reference.logits(ids[:1], "float32")  # converts the modules, and the reference knows that it did
    single = {unit.key: answer(unit, seen, "float32") for unit in units}
    reference.logits(ids[:1], "float64")
    inputs, answers = scratch / "probe-inputs.safetensors", scratch / "probe-answers.safetensors"
    fed = {unit.key: x for unit in units if (x := served_input(unit, seen)) is not None}
    save_file(fed, inputs)
    places = engine.probe(layout, ids, [_described(unit, units) for unit in units], inputs, answers)
    if isinstance(places, EngineFailure):
        return places
    got = load_file(answers)
    found: list[Answer] = []
    for unit in units:
        right, theirs = exact[unit.key], got.get(unit.key)
        if right is None or theirs is None or theirs.shape != right.shape:
            continue
        floor = max(nmse(single[unit.key], right), MINIMUM)
        found.append(Answer(unit, places[unit.key]["module"], theirs, right, nmse(theirs, right), floor))
    return found


def answer(unit: Unit, seen: Seen, dtype: str) -> torch.Tensor | None:
    """What the reference's module computes in ``dtype`` from the rounded input, in vLLM's order of columns."""
    import torch

    outs: list[torch.Tensor] = []
    for name in unit.modules:
        call = seen.calls[name]
        args, kwargs = cast_all(call.args, dtype), cast_all(dict(call.kwargs), dtype)
        with torch.inference_mode(), exactly(seen) if dtype == "float64" else nullcontext():
            out = call.module(*args, **kwargs)
        out = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(out, torch.Tensor):
            return None
        outs.append(out.reshape(-1, out.shape[-1]).double())
    return moved(unit, outs)


def exactly(seen: Seen) -> AbstractContextManager[object]:
    """What a reference that names float32 inside wants around its float64 run: its attribute ``exactly``."""
    return getattr(seen.root, "exactly", nullcontext)()


def moved(unit: Unit, outs: list[torch.Tensor]) -> torch.Tensor:
    """The outputs of a unit's modules as the served module returns them."""
    import torch

    whole = torch.cat(outs, -1)
    if unit.moves is None:
        return whole
    parts = [whole[:, torch.tensor(m.rows)] * torch.tensor(m.factors) for m in unit.moves]
    return torch.cat(parts, -1)


def served_input(unit: Unit, seen: Seen) -> torch.Tensor | None:
    """The unit's input, rounded to float32, as the served module wants it; None for ids."""
    import torch

    x = stream(seen.calls[unit.modules[0]])
    if x is None:
        return None
    if unit.moves is not None:
        x = x[:, torch.from_numpy(unit.moves[0].columns)]
    return x.float().contiguous().clone()


def cast_all(value: Any, dtype: str) -> Any:
    """Arguments of a float64 call, rounded to float32 and then in ``dtype``. What was not float64 stays."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.float().to(getattr(torch, dtype)) if value.dtype == torch.float64 else value
    if isinstance(value, tuple | list):
        return tuple(cast_all(v, dtype) for v in value)
    if isinstance(value, dict):
        return {name: cast_all(v, dtype) for name, v in value.items()}
    return value


def nmse(some: torch.Tensor | None, right: torch.Tensor) -> float:
    """Sum of squared differences over sum of squares; infinite where a value is not finite."""
    if some is None:
        return 0.0
    error = float((some.double() - right).square().sum())
    scale = float(right.square().sum())
    if error != error or error == float("inf"):
        return float("inf")
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def _described(unit: Unit, units: Sequence[Unit]) -> dict[str, Any]:
    facts = {"key": unit.key, "targets": list(unit.targets), "leaf": unit.leaf, "head": unit.head}
    return {**facts, "level": level(unit, units)}


class _Stop(Exception):  # noqa: N818 - not an error: the answer is there, the rest of the forward is not needed
    pass


def replay(root: torch.nn.Module, unit: Unit, seen: Seen, ids: list[int]) -> torch.Tensor | None:
    """What the unit of another build of the reference answers to the same input: its forward runs on ``ids`` so
    that everything beside the hidden states (the rotary table, say) is its own. None if it can't run."""
    import torch

    modules = dict(root.named_modules())
    if any(name not in modules for name in unit.modules):
        return None
    outs: dict[str, torch.Tensor] = {}
    handles: list[Any] = []
    for name in unit.modules:
        x = stream(seen.calls[name])
        if x is not None:
            handles.append(modules[name].register_forward_pre_hook(_swap(x), with_kwargs=True))
        handles.append(modules[name].register_forward_hook(_catch(name, outs, len(unit.modules))))
    try:
        with torch.inference_mode():
            root(torch.tensor([ids]))
    except _Stop:
        pass
    except (MdlError, RuntimeError, ValueError):  # sizes that do not fit these weights: not the explanation
        return None
    finally:
        for handle in handles:
            handle.remove()
    return moved(unit, [outs[name] for name in unit.modules]) if len(outs) == len(unit.modules) else None


def _swap(x: torch.Tensor) -> Callable[..., Any]:
    import torch

    def hook(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        done = False

        def one(value: Any) -> Any:
            nonlocal done
            if done or not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            done = True
            return x.float().to(value.dtype).reshape(value.shape)

        return tuple(one(v) for v in args), {k: one(v) for k, v in kwargs.items()}

    return hook


def _catch(name: str, outs: dict[str, torch.Tensor], wanted: int) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        outs[name] = out.reshape(-1, out.shape[-1]).double()
        if len(outs) == wanted:
            raise _Stop

    return hook
