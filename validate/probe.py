"""The part of :mod:`.locate` that lives inside vLLM's workers: feeds modules given inputs and keeps their answers.

Mixed into the worker class beside :class:`~.capture.Capture`; the engine calls the methods by name. Each module of
one level gets the reference's own input in place of what reached it, so that what it answers is its own doing, not
that of the modules before it. Nested modules belong to different levels: an input set inside one would hide what
happens around it. Knows torch, and nothing of vLLM's classes but a few attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

HEAD = "lm_head"


class Place(Struct, frozen=True):
    """Where a unit is served: the module, and per stored tensor the columns of its output that are that tensor's."""

    module: str
    slices: Mapping[str, tuple[int, int] | None]


def find_place(model: torch.nn.Module, unit: Mapping[str, Any]) -> Place | None:
    """The served module of a unit, by where its stored tensors landed during loading.

    A module of the reference that holds others is served by the innermost module that holds all of theirs. None if
    vLLM has no such module.
    """
    if unit["head"]:
        return Place(HEAD, {})
    modules = dict(model.named_modules())
    homes = [_home(model, modules, tensor) for tensor in unit["targets"]]
    if not homes or not all(homes):
        return None
    if not unit["leaf"]:
        common = _common([home for home, _ in filter(None, homes)])
        return Place(common, {}) if common in modules else None
    found = [home for home in homes if home is not None]
    if len({module for module, _ in found}) != 1:
        return None
    slices = {t: _columns(modules[module], index) for t, (module, index) in zip(unit["targets"], found, strict=True)}
    return Place(found[0][0], slices)


def _home(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], tensor: str
) -> tuple[str, tuple[int, int] | None] | None:
    """The module that holds a stored tensor, and which part of how many it is there (None: all of it)."""
    own = tensor.rpartition(".")[0]
    landed = (getattr(model, "mdl_audit", None) or {}).get("landed", {}).get(tensor) or [tensor]
    module = landed[0].rpartition(".")[0]
    parent, _, last = own.rpartition(".")
    for fused, parts in _packed(model).items():
        candidate = f"{parent}.{fused}" if parent else fused
        if last in parts and candidate in modules and module in (candidate, own):
            return candidate, (parts.index(last), len(parts))
    return (module, None) if module in modules else None


def _packed(model: torch.nn.Module) -> dict[str, list[str]]:
    """Which modules are fused of which: the model's own table, which vLLM keeps for quantisation and adapters."""
    return dict(getattr(model, "packed_modules_mapping", None) or {})


def _columns(module: torch.nn.Module, part: tuple[int, int] | None) -> tuple[int, int] | None:
    sizes: list[int] | None = getattr(module, "output_sizes", None)
    if part is None or not sizes or len(sizes) != part[1]:
        return None
    start = sum(sizes[: part[0]])
    return start, start + sizes[part[0]]


def _common(names: Sequence[str]) -> str:
    """The longest path that begins all of these; a module's own path only if it is the only one."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) != 1:
            break
        shared.append(column[0])
    return ".".join(shared)


class Probe:
    """What a vLLM worker can do to find a fault. The prefix keeps its names apart from the worker's own."""

    model_runner: Any

    def mdl_probe_resolve(self, units: list[dict[str, Any]]) -> dict[str, Any]:
        """Where each unit is served: its key → ``{"module": name, "slices": {tensor: [start, stop] or None}}``."""
        model: torch.nn.Module = self.model_runner.get_model()
        places = {unit["key"]: find_place(model, unit) for unit in units}
        self._mdl_places = {key: place for key, place in places.items() if place is not None}
        self._mdl_answers: dict[str, torch.Tensor] = {}
        return {
            key: {"module": place.module, "slices": {t: list(s) if s else None for t, s in place.slices.items()}}
            for key, place in self._mdl_places.items()
        }

    def mdl_probe_start(self, keys: list[str], path: str) -> None:
        """Hook the modules of one level. ``path`` holds an input [T, C] per key; a key without one keeps its own."""
        modules = dict(self.model_runner.get_model().named_modules())
        inputs = _read(path)
        self._mdl_handles: list[Any] = []
        taken: set[str] = set()
        for key in keys:
            place = self._mdl_places.get(key)
            if place is None or place.module == HEAD:
                continue
            module = modules[place.module]
            if place.module not in taken and key in inputs:
                hook = partial(_feed, inputs[key])
                self._mdl_handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            taken.add(place.module)
            rows = len(next(iter(inputs.values())))
            keep = partial(self._mdl_keep, key, rows)
            self._mdl_handles.append(module.register_forward_hook(keep))

    def mdl_probe_stop(self) -> None:
        """Take the hooks off."""
        for handle in self._mdl_handles:
            handle.remove()

    @torch.inference_mode()
    def mdl_probe_take(self, inputs: str, path: str, rows: int) -> None:
        """Compute the heads' logits, ``rows`` at a time, and write every answer [T, N] under its key to ``path``."""
        from safetensors.torch import save_file

        given = _read(inputs)
        compute: Callable[[torch.Tensor], torch.Tensor] = self.model_runner.get_model().compute_logits
        device = self.model_runner.device
        for key, place in self._mdl_places.items():
            if place.module == HEAD and key in given:
                x = given[key].to(device)
                self._mdl_answers[key] = torch.cat([compute(part).float().cpu() for part in x.split(rows)])
        save_file({key: answer.contiguous() for key, answer in self._mdl_answers.items()}, path)
        self._mdl_answers = {}

    def _mdl_keep(self, key: str, rows: int, module: torch.nn.Module, args: Any, out: Any) -> None:
        """Some blocks answer with a residual beside the hidden states, some projections with their bias: the
        reference's output is the sum of both."""
        outs = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
        if not outs or len(outs[0]) < rows:
            return
        place = self._mdl_places[key]
        answer = outs[0][:rows].float()
        if not place.slices and len(outs) == 2 and outs[1].shape == outs[0].shape and not alone(module):
            answer = answer + outs[1][:rows].float()
        if place.slices and len(outs) == 2 and outs[1].shape == outs[0].shape[-1:]:
            answer = answer + outs[1].float()
        if any(place.slices.values()):
            answer = torch.cat([answer[:, slice(*s)] for s in filter(None, place.slices.values())], -1)
        self._mdl_answers[key] = answer.cpu().clone()


def alone(module: torch.nn.Module) -> bool:
    """Whether what a module takes and gives beside hidden states is no residual: mdl's own classes say so."""
    return bool(getattr(module, "mdl_alone", False))


def _read(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(path))


def _feed(
    given: torch.Tensor, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the reference's input in the place of the first stream of hidden states; a second one, the residual that
    some blocks carry beside it, becomes zero, since the reference's input is the sum of both."""
    first: torch.Tensor | None = None

    def swap(value: Any) -> Any:
        nonlocal first
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            return value
        if first is None and value.shape[-1] == given.shape[-1] and len(value) >= len(given):
            first = value
            fed = value.clone()
            fed[: len(given)] = given.to(value.device, value.dtype)
            return fed
        residual = first is not None and value.shape == first.shape and not alone(module)
        return torch.zeros_like(value) if residual else value

    swapped = tuple(swap(value) for value in args)
    return swapped, {name: swap(value) for name, value in kwargs.items()}


def interrogate(llm: Any, request: Mapping[str, Any], sampling: Any, rows: int) -> dict[str, Any]:
    """From outside the workers: one prefill of the request's ids per level, innermost first. Returns the places."""
    places = llm.collective_rpc("mdl_probe_resolve", args=(request["units"],))
    for level in range(1 + max(unit["level"] for unit in request["units"])):
        keys = [unit["key"] for unit in request["units"] if unit["level"] == level]
        llm.collective_rpc("mdl_probe_start", args=(keys, request["inputs"]))
        llm.generate([{"prompt_token_ids": request["ids"]}], sampling, use_tqdm=False)
        llm.collective_rpc("mdl_probe_stop")
    llm.collective_rpc("mdl_probe_take", args=(request["inputs"], request["answers"], rows))
    return places[0]
