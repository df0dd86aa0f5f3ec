"""The closed table of globals that a checkpoint's pickle may name, and the rule for all the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ..mappings.tensors import ITEMSIZE, MAX_DIMS, TensorInfo
from .inert import Call, NumpyArray, NumpyType, Ordered, Stub, StubType, Unreadable, numpy_scalar, refuse, stub_class

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "",
    # Quantized elements: their storage has a size, but no tensor of this program can be made of it.
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
_QUANTIZED_SIZE = {"qint32": 4}
_MORE_DTYPES = frozenset(
    {"float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "complex32"}
    | {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}
)
_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}
# Classes of the standard library that hold plain data; a stand-in of them is as harmless as they are.
_HARMLESS = frozenset(
    {"argparse.Namespace", "types.SimpleNamespace", "functools.partial", "collections.Counter", "collections.deque"}
    | {"decimal.Decimal", "fractions.Fraction", "uuid.UUID", "random.Random", "_io.BytesIO"}
    | {"datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone"}
)
_HARMLESS_MODULES = frozenset({"typing"})
MAX_QUALNAME = 1000
_A_CLASS = bytes(2048)  # about what one more class takes


class StorageClass(NamedTuple):
    """A torch storage class: element type ("" if untyped) and bytes per element."""

    dtype: str
    itemsize: int


def lookup(qualname: str) -> Any:
    """What stands for a global that is not one of the reader's own."""
    if qualname in _TABLE:
        return _TABLE[qualname]
    module, _, name = qualname.rpartition(".")
    top = module.partition(".")[0]
    if top == "torch":
        found = _torch_global(module, name)
        if found is not None:
            return found
    if top in sys.stdlib_module_names:
        known = qualname in _HARMLESS or module in _HARMLESS_MODULES
        return stub_class(qualname, call=known, make=known)
    # Classes are CapWords; a lower-case name that is called is a function, and would be run by torch.load.
    return stub_class(qualname, call=name.lstrip("_")[:1].isupper(), make=True)


def _torch_global(module: str, name: str) -> Any:
    """Storage classes, dtypes and the rebuild functions of tensor kinds that are not read; None for all others."""
    if name in _STORAGES and module in ("torch", "torch.cuda", "torch.storage"):
        dtype = _STORAGES[name]
        return StorageClass(dtype, ITEMSIZE.get(dtype) or _QUANTIZED_SIZE.get(dtype, 1))
    if module == "torch":
        name = _ALIASES.get(name, name)
        return name if name in ITEMSIZE or name in _MORE_DTYPES else None
    if name.startswith("_rebuild"):
        return Call(f"{module}.{name}", lambda *_: Unreadable(f"a tensor that {module}.{name} rebuilds"))
    return None


def _rebuild_from_type(function: object, kind: object, args: object, *_: object) -> Any:
    """A tensor with attributes, or of a subclass. Plain tensors and parameters are themselves; others are not read."""
    qualname = getattr(kind, "qualname", "an unknown class")
    plain = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
    nested = isinstance(function, Call) and function.qualname == "torch._tensor._rebuild_from_type_v2"
    if isinstance(function, Call) and not nested and qualname in plain and isinstance(args, tuple):
        return function(*args)
    return Unreadable(f"a tensor of class {qualname}")


def _get_attribute(owner: object, name: object) -> Any:
    """A class nested in an unknown class, which old protocols pickle as ``getattr(Outer, 'Inner')``; or a member of an
    unknown enum, which Python 3.11.0 to 3.11.3 pickles as ``getattr(Kind, 'member')``: an instance that holds its name,
    and that nothing can call."""
    if not (isinstance(owner, StubType) and owner.may_call and isinstance(name, str) and name.isidentifier()):
        refuse("builtins.getattr")
    if not name[:1].isupper():
        if name.startswith("_") or owner.qualname.partition(".")[0] in sys.stdlib_module_names:
            refuse("builtins.getattr")
        return owner(name)
    if len(owner.qualname) + len(name) > MAX_QUALNAME:
        refuse("builtins.getattr with a very long name")
    made = stub_class(f"{owner.qualname}.{name}", call=True, make=True)
    made.spend = owner.spend
    owner.spend(_A_CLASS)
    return made


def _encode(text: object, codec: object = "utf-8") -> bytes:
    """Bytes, which protocol 2 writes as text. Other codecs are refused: looking one up would import a module."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1", "utf-8", "ascii"):
        shown = repr(codec[:40]) if isinstance(codec, str) else f"of type {type(codec).__name__}"
        refuse(f"_codecs.encode with the codec {shown}")
    return text.encode(codec)


def _bytes(data: object = b"", codec: object = "latin-1") -> bytes:
    """``bytes()`` and ``bytearray(x)``, but not of a number, which would take that much memory."""
    if isinstance(data, str):
        return _encode(data, codec)
    if not isinstance(data, (bytes, list)):
        refuse(f"builtins.bytes of a {type(data).__name__}")
    if isinstance(data, list) and not all(type(n) is int and 0 <= n < 256 for n in data):
        refuse("builtins.bytes of a list of other things than bytes")
    return bytes(data)


MAX_KEY = 100
"""Parts of a tuple that is a key or in a set. One tuple may be meant many times, and is hashed each time."""


def _quick_to_hash(values: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """The values, if none of them is a long tuple or one of tuples: hashing it, or all of them, could take for ever."""
    if any(type(v) is tuple and (len(v) > MAX_KEY or any(type(part) is tuple for part in v)) for v in values):
        refuse("a set or table whose keys are long or nested tuples")
    return values


def _size(values: object = ()) -> tuple[int, ...]:
    """``torch.Size``."""
    if not isinstance(values, (list, tuple)) or len(values) > MAX_DIMS or not all(type(n) is int for n in values):
        refuse("torch.Size of something else than a few whole numbers")
    return tuple(values)


def _items(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """A constructor that takes a list or tuple or nothing."""

    def make(values: object = ()) -> Any:
        if not isinstance(values, (list, tuple)):
            refuse(f"builtins.{kind.__name__} of a {type(values).__name__}")
        return kind(_quick_to_hash(values))

    return make


def _ordered(pairs: object = ()) -> Ordered:
    if type(pairs) is tuple and not pairs:  # the hooks of every tensor
        return Ordered()
    if not isinstance(pairs, (list, tuple, dict)):
        refuse(f"collections.OrderedDict of a {type(pairs).__name__}")
    if not isinstance(pairs, dict):
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            refuse("collections.OrderedDict of something else than pairs")
        _quick_to_hash([pair[0] for pair in pairs])
    return Ordered(pairs)


def _from_buffer(data: object, dtype: object, shape: object, order: object = "C", *_: object) -> NumpyArray:
    array = NumpyArray()
    array.fill(shape, dtype, data, fortran=order == "F")
    return array


def _reconstruct(cls: object, *_: object) -> Any:
    """``copyreg._reconstructor``: an instance of an unknown class, made without arguments."""
    if not (isinstance(cls, type) and issubclass(cls, Stub)):
        refuse("copyreg._reconstructor")
    return cls.__new__(cls)


def _first(data: object, *_: object) -> object:
    """What wraps a tensor (a parameter, a device) adds nothing that is read."""
    return data if isinstance(data, (TensorInfo, Unreadable)) else Unreadable("a parameter without a tensor")


def _said(value: object) -> str:
    """A text or number as text. Nothing else: the text of nested containers can be of any length."""
    if isinstance(value, (str, int, float, type(None))):
        return str(value)
    return f"({type(value).__name__})"


def _call_text(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(map(_said, args))})"


def _device(kind: object = "cpu", index: object = None) -> str:
    return _said(kind) if index is None else f"{_said(kind)}:{_said(index)}"


def _table() -> dict[str, Any]:
    calls: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
        "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: Unreadable("a meta tensor: it has no values"),
        "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
        "torch.Size": _size,
        "torch.device": _device,
        "torch.serialization._get_layout": _said,
        "collections.OrderedDict": _ordered,
        "collections.defaultdict": lambda *_: Ordered(),
        "builtins.set": _items(set),
        "builtins.frozenset": _items(frozenset),
        "builtins.bytes": _bytes,
        "builtins.bytearray": _bytes,
        "builtins.complex": complex,
        "builtins.slice": _call_text("slice"),
        "builtins.range": _call_text("range"),
        "builtins.getattr": _get_attribute,
        "copyreg._reconstructor": _reconstruct,
        "_codecs.encode": _encode,
        "numpy.dtype": NumpyType,
    }
    for core in ("numpy.core", "numpy._core"):
        calls[f"{core}.multiarray.scalar"] = numpy_scalar
        calls[f"{core}.multiarray._reconstruct"] = NumpyArray
        calls[f"{core}.numeric._frombuffer"] = _from_buffer
    for flavour in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"):
        for module in ("pathlib", "pathlib._local"):
            calls[f"{module}.{flavour}"] = partial(_path, "\\" if "Windows" in flavour else "/")
    return {name: Call(name, function) for name, function in calls.items()}


def _path(separator: str, *parts: object) -> str:
    texts = [_said(part) for part in parts]
    if texts and texts[0].endswith(separator):  # the root comes as a part of its own
        return texts[0] + separator.join(texts[1:])
    return separator.join(texts) or "."


_TABLE = _table()
