"""Which stored tensors reach which parameters while a loader fills a model. Knows torch, and nothing of vLLM.

Two instruments, because each is blind where the other sees. NaN: every parameter is filled with it before the
loader runs, so what still holds NaN afterwards was never written. Origin: every operation that runs during loading
is watched, and the name of a stored tensor follows its values through views, casts, transposes and stacks until
they are written into a parameter; a name that never arrives was read and thrown away.

What was watched is then used backwards, to pull the weights out of the model again: every copy into a parameter is
remembered as a pair of regions, so a fused parameter comes apart into the stored tensors it was made of, and each is
compared with its file, bit for bit, before vLLM repacks anything. What a loader makes of a parameter's own values in
its place (A = -exp(A_log) in Mamba) can't be compared so, and only the logits speak for it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, Self

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Names = frozenset[str]
Region = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, size and stride of a view in its storage, in elements."""
_NOBODY: Names = frozenset()


class Audit(TorchDispatchMode):
    """A context in which a loader runs; :meth:`report` says afterwards what it did.

    Memory is told apart by its address. An address that is freed and handed out again loses its old origin as
    soon as an operation is seen to write there, so a stale name can't stick to new values.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = model
        self._owners: dict[int, str] = {}
        self._origin: dict[int, Names] = {}
        self._landed: dict[str, set[str]] = {}
        self._written: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._stored_nan: list[str] = []
        self._clones: dict[int, str] = {}
        self._copies: dict[str, list[tuple[torch.Tensor, Region]]] = {}
        self._made_of: dict[int, int] = {}
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            self._owners[_address(tensor)] = name
        self._owners.pop(0, None)  # tensors without elements have no address
        self._watch: Any = None

    def __enter__(self) -> Self:
        """Watch operations, and parameters that a loader gives the model when it meets their tensor."""
        self._watch = register_module_parameter_registration_hook(self._adopt)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._watch.remove()
        super().__exit__(*raised)

    def _adopt(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        """A parameter in memory of its own is one more to be filled; one in a stored tensor's memory is filled."""
        where = next((prefix for prefix, known in self._model.named_modules() if known is module), None)
        if parameter is None or where is None or self._origin.get(_address(parameter)):
            return
        self._owners.setdefault(_address(parameter), f"{where}.{name}" if where else name)

    def poison(self) -> None:
        """Fill every parameter that can hold NaN with it."""
        with torch.no_grad():
            for _, parameter in self._model.named_parameters():
                if _holds_nan(parameter):
                    parameter.fill_(float("nan"))

    def follow(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Generator[tuple[str, torch.Tensor]]:
        """Hand the stored tensors on, each in memory of its own, remembering which is which."""
        for name, stored in tensors:
            tensor = stored.clone()
            self._origin[_address(tensor)] = frozenset({name})
            self._clones[_address(tensor)] = name
            self._sizes[name] = tensor.numel()
            self._landed.setdefault(name, set())
            if _holds_nan(tensor) and _count_nan(tensor):
                self._stored_nan.append(name)
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then note where the values of its inputs went."""
        out = func(*args, **(kwargs or {}))
        inputs = {_address(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        origin = _NOBODY.union(*(self._origin.get(address, _NOBODY) for address in inputs))
        if func is torch.ops.aten.copy_.default:
            self._forget_remade(args[0], args[1])
            self._remember_copy(args[0], args[1])
        changed = args[0] if func._schema.is_mutable and args and out is None else out
        owners = {address if address in self._owners else self._made_of.get(address, 0) for address in inputs}
        maker = owners.pop() if len(owners) == 1 else 0
        for tensor in tree_iter(changed):
            if isinstance(tensor, torch.Tensor):
                self._made_of[_address(tensor)] = maker
                self._arrive(tensor, origin, shared=_address(tensor) in inputs)
        return out

    def _forget_remade(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """What was computed of a parameter's values, and of nothing else, takes their place there."""
        if _address(target) not in self._owners or self._made_of.get(_address(source)) != _address(target):
            return
        for copies in self._copies.values():
            copies[:] = [(held, region) for held, region in copies if not _same_place(held, target)]

    def _remember_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A copy straight from a stored tensor, or a view of one, into a parameter: the two regions."""
        name = self._clones.get(_address(source))
        if name is not None and _address(target) in self._owners and target.shape == source.shape:
            region = int(source.storage_offset()), tuple(source.shape), tuple(source.stride())
            self._copies.setdefault(name, []).append((target.detach(), region))

    def compare(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, list[int]]:
        """Stored tensor → [elements found in parameters that differ, elements found there at all].

        ``tensors`` are the stored ones, read again. Values are compared in the parameter's dtype, where casting the
        stored ones to it is what the loader was asked to do.
        """
        found: dict[str, list[int]] = {}
        for name, stored in tensors:
            wrong = seen = 0
            for target, (offset, size, stride) in self._copies.get(name, ()):
                source = stored.contiguous().as_strided(size, stride, offset).to(target.device, target.dtype)
                wrong += _differing(target, source)
                seen += target.numel()
            found[name] = [wrong, seen]
        return found

    def _arrive(self, tensor: torch.Tensor, origin: Names, *, shared: bool) -> None:
        address = _address(tensor)
        if address == 0:
            return
        if address in self._owners:
            for name in origin:
                self._landed[name].add(self._owners[address])
                own = tensor.numel() if len(origin) == 1 else self._sizes[name]
                self._written[name] = self._written.get(name, 0) + own
        elif shared:
            self._origin[address] = self._origin.get(address, _NOBODY) | origin
        else:
            self._origin[address] = origin
            self._clones.pop(address, None)  # the clone that lived there is gone

    def report(self) -> dict[str, Any]:
        """What happened, as plain values.

        ``unloaded``: parameter → [elements that still hold NaN, elements]. ``landed``: stored tensor → the parameters
        and buffers it reached. ``written``: stored tensor → [elements written, elements]. ``stored_nan``: tensors
        that hold NaN in the files. ``unchecked``: parameters whose dtype has no NaN.
        """
        parameters = dict(self._model.named_parameters())
        for name, parameter in parameters.items():
            if _address(parameter) not in self._owners:  # its memory was swapped for the stored tensor's
                for stored in self._origin.get(_address(parameter), _NOBODY):
                    self._landed[stored].add(name)
                    self._written[stored] = self._written.get(stored, 0) + parameter.numel()
        holed = {name: _count_nan(p) for name, p in parameters.items() if _holds_nan(p)}
        return {
            "unloaded": {name: [count, parameters[name].numel()] for name, count in holed.items() if count},
            "landed": {name: sorted(places) for name, places in self._landed.items()},
            "written": {name: [self._written.get(name, 0), size] for name, size in self._sizes.items()},
            "stored_nan": self._stored_nan,
            "unchecked": [name for name, p in parameters.items() if not _holds_nan(p)],
        }


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements differ in their bits."""
    if torch.equal(a, b):
        return 0
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.contiguous().view(width) != b.contiguous().view(width)).sum())


def _holds_nan(tensor: torch.Tensor) -> bool:
    """Whether the dtype has NaN and torch can sum it (the 8-bit floats it can't)."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _count_nan(tensor: torch.Tensor) -> int:
    """How many elements are NaN. The sum is asked first: it needs no mask, and NaN always shows in it."""
    with torch.no_grad():
        if not tensor.sum().isnan():
            return 0
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        return sum(int(part.isnan().sum()) for part in rows.split(max(1, (1 << 24) // max(1, rows[0].numel()))))
