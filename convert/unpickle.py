"""A reader of checkpoint pickles that runs nothing: a closed table of globals, inert stand-ins for all others."""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from ..errors import input_error
from ..mappings.tensors import ITEMSIZE, Shape, TensorInfo
from .inert import Call, RefusedError, Unreadable
from .pickle_globals import StorageClass, lookup

Locate = Callable[[str, int, int], int]
"""``locate(key, nbytes, itemsize)``: the byte position of a storage in the file; raises RefusedError."""

_NO_SIZE = "a tensor's size, stride or offset is not a whole number ≥ 0"


class Storage(NamedTuple):
    """A run of bytes in a file. A tuple, because the pickle can't alter one."""

    name: str
    file: str
    start: int
    nbytes: int
    dtype: str


class _Tensor(TensorInfo):
    """A TensorInfo that a later instruction of the pickle can't rewrite."""

    def __setstate__(self, state: object) -> None:
        raise RefusedError("a tensor in this file carries a state of its own")


def unpickle(stream: BinaryIO, file: str, locate: Locate) -> Any:
    """The next object of ``stream``, tensors as TensorInfo with an empty name, unknown classes as Stub instances.

    ``file`` is the absolute path that the TensorInfo will name. No tensor data is read. Raises MdlError (INPUT) if the
    pickle is damaged, if a tensor lies outside its storage, or if loading it would call anything but constructors.
    """
    try:
        return _Reader(stream, file, locate).load()
    except RefusedError as problem:
        raise input_error(problem.what, file, problem.do) from None
    except Exception as error:  # a damaged pickle can end in any exception that its instructions can raise
        raise input_error(
            f"the pickled part of this file is damaged ({type(error).__name__}: {error})",
            file,
            "copy or download the file again, and compare its size with the original",
        ) from error


class _Reader(pickle.Unpickler):
    """The C unpickler with every door to real code replaced."""

    def __init__(self, stream: BinaryIO, file: str, locate: Locate) -> None:
        # latin-1 reads what Python 2 wrote as bytes without loss; text of later writers is not affected.
        super().__init__(stream, encoding="latin-1")
        self._file = file
        self._locate = locate
        self._storages: dict[str, Storage] = {}
        self._globals: dict[str, Any] = {}
        self._own = {
            "torch._utils._rebuild_tensor": self._rebuild_tensor,
            "torch._utils._rebuild_tensor_v2": self._rebuild_v2,
            "torch._utils._rebuild_tensor_v3": self._rebuild_v3,
        }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The table's entry for a global, or an inert stand-in; nothing is imported."""
        # Protocol 2 writes the names of Python 2, such as commands.Popen; these are the tables pickle itself goes by.
        module, name = NAME_MAPPING.get((module_name, global_name), (module_name, global_name))
        qualname = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if qualname not in self._globals:
            own = self._own.get(qualname)
            self._globals[qualname] = Call(qualname, own) if own else lookup(qualname)
        return self._globals[qualname]

    def persistent_load(self, pid: Any, /) -> Any:
        """The storage that ``('storage', class, key, location, numel[, view])`` names."""
        if not isinstance(pid, tuple) or not pid:
            raise RefusedError("a persistent id of this file is not one of torch.save's")
        parts: list[Any] = list(pid)
        kind = parts[0]
        if kind in ("module", b"module") and len(parts) > 1:
            return parts[1]  # pre-1.0 files wrap a module's class together with its source code
        if kind not in ("storage", b"storage") or len(parts) not in (5, 6):
            raise RefusedError("a persistent id of this file is not one of torch.save's")
        _, storage_class, key, _location, numel, view = (*parts, None)[:6]
        return self._storage(storage_class, str(key), numel, view)

    def _storage(self, storage_class: object, key: str, numel: object, view: object) -> Storage:
        if not isinstance(storage_class, StorageClass) or type(numel) is not int or numel < 0:
            raise RefusedError(f"storage {key} of this file has an unknown class or size")
        whole = self._storages.get(key)
        nbytes = numel * storage_class.itemsize
        if whole is None:
            start = self._locate(key, nbytes, storage_class.itemsize)
            whole = Storage(f"{self._file}:{key}", self._file, start, nbytes, storage_class.dtype)
            self._storages[key] = whole
        elif whole.nbytes != nbytes:
            raise RefusedError(f"storage {key} of this file is named with two different sizes")
        elif whole.dtype != storage_class.dtype:
            whole = whole._replace(dtype=storage_class.dtype)
        return whole if view is None else _narrow(whole, view, storage_class.itemsize)

    def _rebuild_tensor(self, storage: object, offset: object, size: object, stride: object) -> TensorInfo | Unreadable:
        if type(storage) is not Storage:
            raise RefusedError("a tensor of this file has no storage")
        return self._make(storage, offset, size, stride, storage.dtype)

    def _rebuild_v2(
        self, storage: object, offset: object, size: object, stride: object, *rest: object
    ) -> TensorInfo | Unreadable:
        # rest: requires_grad, backward hooks, metadata
        flipped = _flipped(rest[2]) if len(rest) > 2 else None
        return flipped or self._rebuild_tensor(storage, offset, size, stride)

    def _rebuild_v3(
        self, storage: object, offset: object, size: object, stride: object, *rest: object
    ) -> TensorInfo | Unreadable:
        # rest: requires_grad, backward hooks, dtype, metadata
        if type(storage) is not Storage or len(rest) < 3 or not isinstance(rest[2], str):
            raise RefusedError("a tensor of this file has no storage or no dtype")
        flipped = _flipped(rest[3]) if len(rest) > 3 else None
        return flipped or self._make(storage, offset, size, stride, rest[2])

    def _make(self, storage: Storage, offset: Any, size: Any, stride: Any, dtype: str) -> TensorInfo | Unreadable:
        itemsize = ITEMSIZE.get(dtype)
        if itemsize is None:
            return Unreadable(f"dtype {dtype or 'unknown'}")
        shape, steps = tuple(size), tuple(stride)
        needed = _extent(shape, steps, offset) * itemsize
        if needed > storage.nbytes:
            raise RefusedError(
                f"a tensor {list(shape)} needs {needed:,} bytes of {storage.name}, which has {storage.nbytes:,}"
            )
        # An empty tensor may point behind the end of its storage; its position is of no use, so it gets a safe one.
        start = storage.start + offset * itemsize if needed else storage.start
        return _Tensor("", shape, dtype, storage.file, start, steps, storage.name)


def _narrow(whole: Storage, view: object, itemsize: int) -> Storage:
    """The part of a storage that a pre-1.6 file calls ``(view key, offset, numel)``, counted in elements."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise RefusedError(f"a view of {whole.name} has an unknown form")
    _, offset, numel = view
    if type(offset) is not int or type(numel) is not int or offset < 0 or numel < 0:
        raise RefusedError(_NO_SIZE)
    if (offset + numel) * itemsize > whole.nbytes:
        raise RefusedError(f"a view of {whole.name} ends behind the storage")
    return whole._replace(start=whole.start + offset * itemsize, nbytes=numel * itemsize)


def _extent(shape: Shape, stride: Shape, offset: object) -> int:
    """Elements from the storage's start to the tensor's last one; 0 if the tensor is empty."""
    if type(offset) is not int or offset < 0 or len(shape) != len(stride):
        raise RefusedError(_NO_SIZE)
    last = offset
    empty = False
    for n, step in zip(shape, stride, strict=True):
        if type(n) is not int or type(step) is not int or n < 0 or step < 0:
            raise RefusedError(_NO_SIZE)
        empty |= n == 0
        last += (n - 1) * step
    return 0 if empty else last + 1


def _flipped(metadata: object) -> Unreadable | None:
    """An Unreadable if torch would conjugate or negate the stored values on loading."""
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        return Unreadable("a lazily conjugated or negated view")
    return None
