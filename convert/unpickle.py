"""A reader of checkpoint pickles that runs nothing: a closed table of globals, inert stand-ins for all others."""

from __future__ import annotations

import contextlib
import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ..errors import COPY_AGAIN, input_error
from ..mappings.tensors import ITEMSIZE, MAX_DIMS, Shape, TensorInfo
from .inert import Call, Ordered, RefusedError, StubType, Unreadable
from .pending import pending_keys
from .pickle_globals import StorageClass, lookup
from .vet import end_of_pickle
from .whole_tensors import Alike, Form, Shorter

Locate = Callable[[str, int, int], int]
"""``locate(key, nbytes, itemsize)``: the byte position of a storage in the file; raises RefusedError."""

MAX_PICKLE = 1 << 30
"""Bytes of one pickle. Tensors are not in it, so a larger one holds arrays pickled as numpy objects."""
MAX_NAME = 1000
"""Characters of a global's name."""
MAX_GLOBALS = 4096
"""Different globals in one pickle. Each becomes a class of about 2 KB."""
SPARE = 32 << 20
FACTOR = 16
_EXPLAINED = 16 << 20
_NO_SIZE = "a tensor's size, stride or offset is not a whole number ≥ 0 that fits 63 bits"
_WORD = 1 << 63


class Storage(Struct, frozen=True):
    """A run of bytes in a file."""

    name: str
    file: str
    start: int
    nbytes: int
    dtype: str

    def __setstate__(self, state: object) -> None:
        raise RefusedError("a storage in this file carries a state of its own")


class _Tensor(TensorInfo, frozen=True):
    """A TensorInfo that a later instruction of the pickle can't rewrite."""

    def __setstate__(self, state: object) -> None:
        raise RefusedError("a tensor in this file carries a state of its own")


def unpickle(data: bytes, file: str, locate: Locate, *, walked: bool = False) -> Any:
    """The object of one pickle, tensors as TensorInfo with an empty name, unknown classes as Stub instances.

    ``data`` ends with the pickle or behind it; ``walked`` says that :func:`~.vet.end_of_pickle` has seen it already.
    ``file`` is the absolute path that the TensorInfo will name. No tensor data is read. Raises MdlError (INPUT) if the
    pickle is damaged, if it would take memory or time out of proportion to its length, if a tensor lies outside its
    storage, or if loading it would call anything but constructors.
    """
    try:
        return _Reader(data, file, locate).load() if walked else _walked(data, file, locate)
    except RefusedError as problem:
        raise input_error(problem.what + _place(data, file, locate, problem), file, problem.do) from None
    except Exception as error:  # a damaged pickle can end in any exception that its instructions can raise
        what = f"the pickled part of this file is damaged ({type(error).__name__}: {error})"
        raise input_error(what, file, COPY_AGAIN) from error


def _walked(data: bytes, file: str, locate: Locate) -> Any:
    """The object of a pickle that nobody has looked at, by a shorter one where there is one."""
    shorter = Shorter(data)
    made = shorter.made(end_of_pickle(data, len(data), shorter=shorter))
    if made is not None:
        # Whatever is amiss, the reader of the pickle itself says it; or it may find nothing amiss.
        with contextlib.suppress(Exception):
            return _Short(made, file, locate, shorter).load()
    return _Reader(data, file, locate).load()


def _place(data: bytes, file: str, locate: Locate, problem: RefusedError) -> str:
    """Under which keys a refused thing lies, in words; empty where that can't be told."""
    if len(data) > _EXPLAINED or not problem.located:
        return ""
    again = _Slow(data, file, locate)
    try:
        again.load()
    except Exception:  # the same refusal as before: what counts is how far it came
        keys = pending_keys(again.metastack, again.stack)
        return f" (under the key {'/'.join(keys)})" if keys else ""
    return ""


class _Doors:
    """What both readers do where the pickle reaches for something outside itself."""

    def __init__(self, data: bytes, file: str, locate: Locate) -> None:
        # latin-1 reads what Python 2 wrote as bytes without loss; text of later writers is not affected.
        super().__init__(io.BytesIO(data), encoding="latin-1")  # type: ignore[call-arg]  # the mixed-in unpickler's
        self._file = file
        self._locate = locate
        self._left = SPARE + FACTOR * len(data)
        self._storages: dict[str, Storage] = {}
        self._globals: dict[str, Any] = {}
        self._own = {
            "torch._utils._rebuild_tensor": self._rebuild_tensor,
            "torch._utils._rebuild_tensor_v2": self._rebuild_v2,
            "torch._utils._rebuild_tensor_v3": self._rebuild_v3,
        }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The table's entry for a global, or an inert stand-in; nothing is imported."""
        if len(module_name) + len(global_name) > MAX_NAME or len(self._globals) > MAX_GLOBALS:
            raise RefusedError(f"this file names more than {MAX_GLOBALS:,} classes, or one by a very long name")
        # Protocol 2 writes the names of Python 2, such as commands.Popen; these are the tables pickle itself goes by.
        module, name = NAME_MAPPING.get((module_name, global_name), (module_name, global_name))
        qualname = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if qualname not in self._globals:
            own = self._own.get(qualname)
            self._globals[qualname] = Call(qualname, own) if own else self._measured(lookup(qualname))
        return self._globals[qualname]

    def _measured(self, found: Any) -> Any:
        """The same global, whose copies of what the pickle gives it are counted against the file's size."""
        if isinstance(found, StubType):
            found.spend = self._spend
        elif isinstance(found, Call):
            return found.counted(self._spend)
        return found

    def _spend(self, *values: object) -> None:
        """Count one more copy of each value. A few bytes of a pickle can ask for a copy of all that came before."""
        self._left -= sum(_COPY[type(value)] * len(value) for value in values if type(value) in _COPY)  # type: ignore[arg-type]  # all types of the table have a length
        if self._left < 0:
            raise RefusedError("reading this file would take memory out of proportion to its size")

    def persistent_load(self, pid: Any, /) -> Any:
        """The storage that ``('storage', class, key, location, numel[, view])`` names."""
        if type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and type(pid[2]) is type(pid[3]) is str:
            return self._storage(pid[1], pid[2], pid[4], None)  # as every torch since 0.4 writes it
        # Only a view is a tuple in one. Those of whole tensors go unweighed by the walk: none may hold another.
        if type(pid) is not tuple or not 0 < len(pid) <= 6 or any(type(part) is tuple for part in pid[:5]):
            raise RefusedError("a persistent id of this file is not one of torch.save's")
        parts: list[Any] = list(pid)
        kind = parts[0]
        if kind in ("module", b"module") and len(parts) > 1:
            # pre-1.0 files wrap a module's class together with its source code
            return parts[1] if isinstance(parts[1], StubType) else None
        if kind not in ("storage", b"storage") or len(parts) not in (5, 6):
            raise RefusedError("a persistent id of this file is not one of torch.save's")
        _, storage_class, key, _location, numel, view = (*parts, None)[:6]
        if type(key) not in (str, int):
            raise RefusedError("a storage of this file is named by neither a text nor a number")
        return self._storage(storage_class, str(key), numel, view)

    def _storage(self, storage_class: object, key: str, numel: object, view: object) -> Storage:
        if not isinstance(storage_class, StorageClass) or type(numel) is not int or not 0 <= numel < 1 << 60:
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
            whole = replace(whole, dtype=storage_class.dtype)
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
        if type(storage) is not Storage or flipped:
            return flipped or self._rebuild_tensor(storage, offset, size, stride)
        return self._make(storage, offset, size, stride, storage.dtype)

    def _rebuild_v3(
        self, storage: object, offset: object, size: object, stride: object, *rest: object
    ) -> TensorInfo | Unreadable:
        # rest: requires_grad, backward hooks, dtype, metadata
        if type(storage) is not Storage or len(rest) < 3 or not isinstance(rest[2], str):
            raise RefusedError("a tensor of this file has no storage or no dtype")
        flipped = _flipped(rest[3]) if len(rest) > 3 else None
        return flipped or self._make(storage, offset, size, stride, rest[2])

    def _make(self, storage: Storage, offset: Any, size: Any, stride: Any, dtype: str) -> TensorInfo | Unreadable:
        if dtype not in ITEMSIZE:
            return _unknown(dtype)
        if not isinstance(size, (tuple, list)) or not isinstance(stride, (tuple, list)):
            raise RefusedError(_NO_SIZE)
        if len(size) > MAX_DIMS or len(stride) > MAX_DIMS:
            raise RefusedError(
                f"a tensor of this file has {len(size):,} dimensions; no tensor has more than {MAX_DIMS}"
            )
        shape, steps = tuple(size), tuple(stride)
        return _placed(storage, offset, shape, steps, dtype)


class _Reader(_Doors, pickle.Unpickler):
    """The C unpickler with every door to real code replaced."""


class _Short(_Reader):
    """The same for a pickle that was made shorter: see :class:`~.whole_tensors.Shorter`."""

    def __init__(self, data: bytes, file: str, locate: Locate, shorter: Shorter) -> None:
        super().__init__(data, file, locate)
        self._mark = shorter.mark
        self._alike = shorter.alike
        self._made: dict[bytes, TensorInfo] = {}

    def persistent_load(self, pid: Any, /) -> Any:
        """A storage, or a whole tensor."""
        if type(pid) is bytes and (made := self._made.get(pid)) is not None:
            return made
        if type(pid) is tuple and len(pid) == 7 and pid[0] == self._mark:
            return self._first(*pid[1:])
        return super().persistent_load(pid)

    def _first(
        self, function: object, word: object, kind: object, location: object, hooks: object, text: bytes
    ) -> TensorInfo:
        """The first of tensors that are alike; all of them are made."""
        known = self._globals
        if (
            function is not known["torch._utils._rebuild_tensor_v2"]
            or hooks is not known["collections.OrderedDict"]
            or word != "storage"
            or type(location) is not str
            or not isinstance(kind, StorageClass)
            or kind.dtype not in ITEMSIZE
        ):
            raise RefusedError("another function makes this tensor than a state dict's")
        self._make_all(self._alike[text], kind)
        return self._made[text]

    def _make_all(self, alike: Alike, kind: StorageClass) -> None:
        dtype, file, storages, made = kind.dtype, self._file, self._storages, self._made
        places: dict[Form, tuple[int, int]] = {}
        for text, digits, form in alike:
            place = places.get(form)
            if place is None:
                place = places[form] = _place_of(form, kind)
            nbytes, shift = place
            key = digits.decode()
            storage = storages.get(key)
            if storage is None:
                start = self._locate(key, nbytes, kind.itemsize)
                storage = storages[key] = Storage(f"{file}:{key}", file, start, nbytes, dtype)
            elif storage.nbytes != nbytes:
                raise RefusedError("storages are named with two different sizes")
            made[text] = _Tensor("", form.size, dtype, file, storage.start + shift, form.stride, storage.name)


def _place_of(form: Form, kind: StorageClass) -> tuple[int, int]:
    """Bytes of the storage that a tensor of this form lies in, and of those before its first element."""
    nbytes = form.elements * kind.itemsize
    if nbytes < 0:
        raise RefusedError(_NO_SIZE)
    return nbytes, _placed(Storage("", "", 0, nbytes, ""), form.offset, form.size, form.stride, kind.dtype).offset


class _Slow(_Doors, pickle._Unpickler):  # type: ignore[name-defined, misc]  # pyright: ignore  # undocumented, but as old as pickle
    """The same in Python: ten times slower, but its stack can be looked at when it stops."""

    stack: list[Any]
    metastack: list[list[Any]]


# Bytes of memory that a copy takes per element of the original.
_COPY: dict[type, int] = {str: 4, bytes: 1, bytearray: 1, list: 8, tuple: 8, set: 64, frozenset: 64,
                          dict: 100, Ordered: 100}  # fmt: skip


def _narrow(whole: Storage, view: object, itemsize: int) -> Storage:
    """The part of a storage that a pre-1.6 file calls ``(view key, offset, numel)``, counted in elements."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise RefusedError(f"a view of {whole.name} has an unknown form")
    _, offset, numel = view
    if type(offset) is not int or type(numel) is not int or offset < 0 or numel < 0:
        raise RefusedError(_NO_SIZE)
    if (offset + numel) * itemsize > whole.nbytes:
        raise RefusedError(f"a view of {whole.name} ends behind the storage")
    return replace(whole, start=whole.start + offset * itemsize, nbytes=numel * itemsize)


def _extent(shape: Shape, stride: Shape) -> int:
    """Elements from the tensor's first one to its last one; 0 if it is empty."""
    if len(shape) != len(stride):
        raise RefusedError(_NO_SIZE)
    last = 0
    empty = False
    for n, step in zip(shape, stride, strict=True):
        if type(n) is not int or type(step) is not int or not (0 <= n < _WORD and 0 <= step < _WORD):
            raise RefusedError(_NO_SIZE)
        empty |= n == 0
        last += (n - 1) * step
    return 0 if empty else last + 1


def _placed(storage: Storage, offset: Any, shape: Shape, steps: Shape, dtype: str) -> TensorInfo:
    """A tensor that starts at that element of its storage."""
    extent = _extent(shape, steps)
    if type(offset) is not int or not 0 <= offset < _WORD:
        raise RefusedError(_NO_SIZE)
    itemsize = ITEMSIZE[dtype]
    needed = (offset + extent) * itemsize if extent else 0
    if needed > storage.nbytes:
        raise RefusedError(
            f"a tensor {list(shape)} needs {needed:,} bytes of {storage.name}, which has {storage.nbytes:,}"
        )
    # An empty tensor may point behind the end of its storage; its position is of no use, so it gets a safe one.
    start = storage.start + offset * itemsize if needed else storage.start
    return _Tensor("", shape, dtype, storage.file, start, steps, storage.name)


def _unknown(dtype: str) -> Unreadable:
    return Unreadable(f"dtype {dtype or 'unknown'}")


def _flipped(metadata: object) -> Unreadable | None:
    """An Unreadable if torch would conjugate or negate the stored values on loading."""
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        return Unreadable("a lazily conjugated or negated view")
    return None
