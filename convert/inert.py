"""Stand-ins for what a pickle names: they remember how they were built and run nothing.

Every object in this module has its own ``__setstate__``, because without one the unpickler would write straight into
``__dict__`` (or set attributes on a function) and a hostile file could alter the reader itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn

from ..mappings.tensors import MAX_DIMS

_FORMATS = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "b1": "?",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
}
MAX_ARRAY = 4096
"""Arrays with more elements than this are described, not decoded: no hyperparameter is that long."""
MAX_ARGS = 256
"""Arguments that a function of the closed table may get; the parts of a path are the longest list."""
_MAX_SCALAR = 4096


class RefusedError(Exception):
    """What a pickle asks for and can't have. The file's path is added by whoever knows it."""

    def __init__(self, what: str, do: str = "", *, located: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.do = do
        self.located = located
        """Whether it helps to know under which key of the file it lies."""


def refuse(qualname: str) -> NoReturn:
    """Raise the refusal of a call to ``qualname``."""
    raise RefusedError(
        f"this file would run code when loaded with torch.load: it calls {qualname}",
        "if you made it yourself: load it where you made it, and save it again as torch.save({'model': "
        "model.state_dict(), 'config': <a plain dict>}, path); otherwise ask its author for such a file",
        located=True,
    )


class StubType(type):
    """The type of stub classes. ``may_call`` answers REDUCE, ``may_make`` answers NEWOBJ (see :func:`stub_class`)."""

    qualname: str
    may_call: bool
    may_make: bool
    spend: Callable[..., None]
    """Counts what an instance copies of the values it is given; the reader that made the class sets it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.may_call:
            refuse(cls.qualname)
        return super().__call__(*args, **kwargs)


class Stub(metaclass=StubType):
    """An instance of a class that this program does not know: only what the pickle says about it.

    ``args`` holds the arguments of its making, ``state`` its attributes, ``entries`` and ``elements`` what it held as
    a subclass of dict and of list.
    """

    __slots__ = ("args", "elements", "entries", "kwargs", "state")
    qualname: ClassVar[str] = ""
    may_call: ClassVar[bool] = False
    may_make: ClassVar[bool] = False

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[Any, Any]
    entries: dict[Any, Any]
    elements: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        if not cls.may_make:
            refuse(cls.qualname)
        cls.spend(args, kwargs)
        self = object.__new__(cls)
        self.args, self.kwargs = args, kwargs
        self.state, self.entries, self.elements = {}, {}, []
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing: ``__new__`` alone serves both REDUCE (which calls this too) and NEWOBJ (which does not)."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        refuse(self.qualname)

    def __setstate__(self, state: object) -> None:
        """Take what BUILD brings: a dict, or a pair (dict or None, dict of slots); anything else under ``state``."""
        pair: tuple[Any, ...] = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if type(state) is dict and not self.state:
            self.state = state  # the usual case; not copied, for a file may bring one large dict to many objects
        elif all(part is None or isinstance(part, dict) for part in pair):
            type(self).spend(self.state, *pair)
            self.state = {key: value for part in (self.state, *pair) for key, value in (part or {}).items()}
        else:
            type(self).spend(self.state)
            self.state = {**self.state, "state": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Take an element: the unpickler fills list subclasses this way."""
        self.elements.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Take several elements."""
        self.elements.extend(values)

    add = append


def _free(*_: object) -> None:
    """Counts nothing."""


def stub_class(qualname: str, *, call: bool, make: bool) -> StubType:
    """A new stub class. ``call``: REDUCE may apply it; ``make``: NEWOBJ may instantiate it; else both are refused.

    Only a class can be instantiated, whatever its name looks like; a call may be of a function.
    """
    name = qualname.rpartition(".")[2]
    members = {"__slots__": (), "qualname": qualname, "may_call": call and make, "may_make": make, "spend": _free}
    return StubType(name, (Stub,), members)


class Call:
    """A function of the closed table. Immutable for the pickle."""

    __slots__ = ("_function", "qualname")

    def __init__(self, qualname: str, function: Callable[..., Any]) -> None:
        self.qualname = qualname
        self._function = function

    def __call__(self, *args: Any) -> Any:
        if len(args) > MAX_ARGS:
            raise RefusedError(f"this file gives {self.qualname} {len(args):,} arguments", located=True)
        return self._function(*args)

    def counted(self, spend: Callable[..., None]) -> Call:
        """The same function, whose arguments ``spend`` sees first."""
        function = self._function

        def count(*args: Any) -> Any:
            if args:
                spend(*args)
            return function(*args)

        return Call(self.qualname, count)

    def __setstate__(self, state: object) -> NoReturn:
        refuse(f"__setstate__ of {self.qualname}")


class Ordered(dict[Any, Any]):
    """An OrderedDict (or defaultdict) read from a pickle; its attributes, such as ``_metadata``, are let go."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore attributes."""


class Unreadable:
    """A tensor that the file holds in a form this program does not read; ``reason`` says which."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __setstate__(self, state: object) -> None:
        """Ignore what a tensor subclass wants restored: it is not read anyway."""


class NumpyType:
    """A numpy dtype: kind and size, such as ``f8``, and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if type(code) is not str or len(code) > 20:
            raise RefusedError("a numpy type in this file has an unknown form")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            self.order = ">" if state[1] == ">" else "<"

    def decode(self, data: bytes) -> list[Any] | None:
        """The values in ``data``, or None if this type has no plain Python counterpart."""
        kind, size = self.code[:1], self.code[1:]
        if kind in ("U", "S") and size.isdecimal() and int(size):
            width = int(size) * (4 if kind == "U" else 1)
            codec = ("utf-32-le" if self.order == "<" else "utf-32-be") if kind == "U" else "latin-1"
            return [data[i : i + width].decode(codec, "replace").rstrip("\0") for i in range(0, len(data), width)]
        letter = _FORMATS.get(self.code)
        if letter is None or len(data) % struct.calcsize("<" + letter):
            return None
        return list(struct.unpack(f"{self.order}{len(data) // struct.calcsize('<' + letter)}{letter}", data))


class NumpyArray:
    """A numpy array: its description, and its values if they are few."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = NumpyType("")
        self.data = b""
        self.fortran = False

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise RefusedError("a numpy array in this file has an unknown form")
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, data, fortran=bool(fortran))

    def fill(self, shape: object, dtype: object, data: object, *, fortran: bool) -> None:
        """Set all parts, after checking their kinds."""
        if not isinstance(shape, tuple) or not isinstance(dtype, NumpyType):
            raise RefusedError("a numpy array in this file has an unknown form")
        if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            raise RefusedError("a numpy array in this file has an unknown form")
        self.shape = shape
        self.dtype, self.fortran = dtype, fortran
        self.data = bytes(data) if isinstance(data, (bytes, bytearray)) else b""

    def value(self) -> Any:
        """Nested lists, or a description in words if the array is long or of no plain type."""
        flat = self.dtype.decode(self.data) if len(self.data) <= 16 * MAX_ARRAY and not self.fortran else None
        count = 1
        for n in self.shape:
            count *= n
        if flat is None or len(flat) != count or count > MAX_ARRAY:
            return f"array {self.dtype.code} {list(self.shape)}"
        for n in reversed(self.shape[1:]):
            flat = [flat[i : i + n] for i in range(0, len(flat), n)] if n else []
        return flat if self.shape else flat[0]


def numpy_scalar(dtype: object, data: object = b"", *_: object) -> Any:
    """The Python number or string that a pickled numpy scalar stands for."""
    if not isinstance(dtype, NumpyType) or not isinstance(data, bytes) or len(data) > _MAX_SCALAR:
        return "a numpy scalar"
    values = dtype.decode(data)
    return values[0] if values else "a numpy scalar"
