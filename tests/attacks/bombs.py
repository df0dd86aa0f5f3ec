"""Small files that ask for much memory, time or stack."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator

from . import ops
from .case import Case, file, folder

DEEP = 100_000
HANG = "it would hang the program"
WORD = "63 bits"
GOOD = ops.table({"w": ops.tensor()})


def _put(n: int) -> bytes:
    return b"r" + struct.pack("<I", n)


def _get(n: int) -> bytes:
    return b"j" + struct.pack("<I", n)


def _laughs(make: bytes, levels: int = 40, start: bytes = b")") -> bytes:
    """A value that holds the one before it twice, and so on: 2 to the power of ``levels`` parts."""
    steps = [start + _put(0)]
    steps += [b"0(" + _get(n) * 2 + make + _put(n + 1) for n in range(levels)]
    return b"".join(steps)


def _beside(body: bytes) -> bytes:
    """A good state dict beside an entry ``x``."""
    return ops.zipped(ops.pickled(ops.table({"model": GOOD, "x": body}), 4))


def _fine() -> dict[str, bytes]:
    """Bodies that are strange, but that hurt nobody who is careful."""
    return {
        "nested tuples": b")" + b"\x85" * DEEP,
        "nested lists": b"](" * DEEP + b"e" * DEEP,
        "nested dicts": (b"}(" + ops.text("k")) * DEEP + b"N" + b"u" * DEEP,
        "nested stubs": ops.named("a", "B") + _put(0) + b"0" + (_get(0) + b"(") * DEEP + b"tR" * DEEP,
        "laughing tuples": _laughs(b"t"),
        "laughing lists": _laughs(b"l"),
        "laughing dicts": b"}" + _put(0)
        + b"".join(b"0" + ops.table({"a": _get(n), "b": _get(n)}) + _put(n + 1) for n in range(40)),
        "a list in itself": b"]" + _put(0) + _get(0) + b"a",
        "a dict in itself": b"}" + _put(0) + ops.text("me") + _get(0) + b"s",
        "200,000 empty sets": b"](" + b"\x8f" * 200_000 + b"e",
        "900,000 empty lists": b"](" + b"]" * 900_000 + b"e",
        "200,000 objects": b"](" + ops.named("a", "B") + _put(0) + b"0" + b"j\0\0\0\0)\x81" * 120_000 + b"e",
        "a long text": ops.text("a" * 900_000),
        "slices of laughs": _laughs(b"t") + b"0" + ops.call("builtins", "slice", _get(40), b"N"),
        "layout of laughs": _laughs(b"l") + b"0" + ops.call("torch.serialization", "_get_layout", _get(40)),
        "device of laughs": _laughs(b"t") + b"0" + ops.call("torch", "device", _get(40)),
        "path of laughs": _laughs(b"t") + b"0" + ops.call("pathlib", "Path", _get(40)),
        "one table under many keys": b"](" + b"N" * 50_000 + b"e" + _put(0) + b"0"
        + ops.table([(ops.text(f"k{n}"), _get(0)) for n in range(20_000)]),
    }  # fmt: skip


def _refused() -> dict[str, tuple[bytes, str]]:
    """Bodies of data.pkl that are refused."""
    laughs = _laughs(b"t") + b"0"
    words = b"](" + b"N" * 100_000 + b"e" + _put(0) + b"0"
    long = ops.text("a" * 500_000) + _put(0) + b"0" + ops.text("latin1") + _put(1) + b"0"
    encode = ops.named("_codecs", "encode") + _put(2) + b"0" + b"(" + _get(0) + _get(1) + b"t" + _put(3) + b"0"
    entries = ops.table([(ops.number(n), b"N") for n in range(50_000)]) + _put(0) + b"0" + ops.named("a", "B") + _put(1)
    many = b"".join(ops.named(f"m{n}", "F") + b"0" for n in range(5_000)) + b"N"
    scalar = ops.call("numpy", "dtype", ops.text("f8"))
    dims = b"(" + ops.number(1 << 30) * 100_000 + b"t"
    array = ops.call("numpy._core.multiarray", "_reconstruct", b"N") + b"(K\x01" + dims + scalar + b"\x89C\x00tb"
    proportion = "out of proportion"
    return {
        "key of nested tuples": (b"}" + b")" + b"\x85" * DEEP + b"Ns", HANG),
        "key of laughing tuples": (laughs + b"}" + _get(40) + b"Ns", HANG),
        "key in a full table": (laughs + b"}(" + ops.text("a") + b"N" + _get(40) + b"Nu", HANG),
        "key in DICT": (laughs + b"(" + _get(40) + b"Nd", HANG),
        "key by DUP": (laughs + _get(40) + b"2\x860}" + _get(40) + b"Ns", HANG),
        "set of laughing tuples": (laughs + b"\x8f(" + _get(40) + b"\x90", HANG),
        "frozenset of laughing tuples": (laughs + b"(" + _get(40) + b"\x91", HANG),
        "set() of laughing tuples": (laughs + ops.call("builtins", "set", b"](" + _get(40) + b"e"), "nested tuples"),
        "OrderedDict of laughing tuples": (
            laughs + ops.call("collections", "OrderedDict", b"](](" + _get(40) + b"Nee"), "nested tuples",
        ),
        "parameter of laughing tuples": (
            laughs + b"}" + ops.call("torch._utils", "_rebuild_parameter", _get(40)) + b"Ns", "",
        ),
        "memo index 2**31": (b"Nr\xff\xff\xff\x7f", "numbers a value"),
        "memo index in text": (b"Np99999999999999\n", "numbers a value"),
        "BINUNICODE of 4 GB": (b"X\xff\xff\xff\xffab", "claims 4,294,967,295 bytes"),
        "BINUNICODE8": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab", "claims 9,223,372,036,854,775,807 bytes"),
        "BINBYTES8": (b"\x8e" + b"\xff" * 8 + b"ab", "claims"),
        "BYTEARRAY8": (b"\x96\0\0\0\0\x04\0\0\0ab", "claims 17,179,869,184 bytes"),
        "BINBYTES": (b"B\xff\xff\xff\xffab", "claims"),
        "BINSTRING": (b"T\xff\xff\xff\x7fab", "claims"),
        "FRAME": (b"\x95" + b"\xff" * 7 + b"\x7f" + b"N", "a frame claims"),
        "LONG4": (b"\x8b\xff\xff\xff\x7f", "claims"),
        "a number of 100 KB": (b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000, "an integer of 100,000 bytes"),
        "a number in 500,000 digits": (b"L" + b"9" * 500_000 + b"L\n", "a line of it"),
        "bytes of a number": (ops.call("builtins", "bytes", ops.number(1 << 40)), "builtins.bytes of a int"),
        "bytearray of a number": (ops.call("builtins", "bytearray", ops.number(1 << 30)), "builtins.bytes of a int"),
        "set of a range": (
            ops.call("builtins", "set", ops.call("builtins", "range", ops.number(1 << 60))), "set of a str",
        ),
        "300,000 empty sets": (b"](" + b"\x8f" * 300_000 + b"e", "sets"),
        "copies of a text": (long + encode + b"](" + (_get(2) + _get(3) + b"R") * 5_000 + b"e", proportion),
        "copies of a list": (
            words + ops.named("builtins", "set") + _put(1) + b"0(" + _get(0) + b"t" + _put(2) + b"0](" +
            (_get(1) + _get(2) + b"R") * 5_000 + b"e", proportion,
        ),
        "copies of a state": (
            entries + b"0](" + (_get(1) + b")\x81" + _get(0) + b"b" + _get(0) + b"b") * 5_000 + b"e", proportion,
        ),
        "copies of arguments": (
            b"(" + b"N" * 100_000 + b"t" + _put(0) + b"0" + ops.named("a", "B") + _put(1) + b"0](" +
            (_get(1) + _get(0) + b"\x81") * 5_000 + b"e", proportion,
        ),
        "5,000 classes": (many, "more than 4,096 classes"),
        "a class with a long name": (ops.text("a" * 5_000) + ops.text("B") + b"\x93", "very long name"),
        "nested classes": (
            ops.named("builtins", "getattr") + _put(0) + b"0" + ops.text("A" * 100) + _put(1) + b"0"
            + (_get(0) + b"(") + ops.named("a", "B") + _get(1) + b"tR" + _put(2) + b"0"
            + (_get(0) + b"(" + _get(2) + _get(1) + b"tR" + _put(2) + b"0") * 1_000 + b"N", "very long name",
        ),
        "arguments of a tensor": (
            ops.named("torch._utils", "_rebuild_tensor_v2") + b"(" + b"N" * 1_000 + b"tR", "1,000 arguments",
        ),
        "numpy array of 100,000 dimensions": (array, "unknown form"),
        "numpy type of a list": (ops.call("numpy", "dtype", laughs + _get(40)), "unknown form"),
        "storage named by a list": (
            b"(" + ops.text("storage") + ops.named("torch", "FloatStorage") + b"]" + ops.text("cpu") + ops.number(2)
            + b"tQ", "neither a text nor a number",
        ),
        "a storage of 2**80": (ops.storage("0", 1 << 80), "unknown class or size"),
        "a persistent id of 100,000 parts": (b"(" + b"N" * 100_000 + b"tQ", "persistent id"),
    }  # fmt: skip


def _tensors() -> dict[str, tuple[bytes, str]]:
    """Tensors whose sizes lie. Storage 0 has two elements."""
    return {
        "dimension of 10**18": (ops.tensor(shape=(10**18,), numel=2), "needs"),
        "product beyond 64 bits": (ops.tensor(shape=(1 << 40, 1 << 40), numel=2), "needs"),
        "product that wraps to 2": (ops.tensor(shape=((1 << 63) + 1, 2), stride=(0, 0), numel=2), WORD),
        "stride of 2**62": (ops.tensor(shape=(2,), stride=(1 << 62,), numel=2), "needs"),
        "negative size": (ops.tensor(shape=(-2,), stride=(1,), numel=2), WORD),
        "negative stride": (ops.tensor(shape=(2,), stride=(-1,), offset=1, numel=2), WORD),
        "negative offset": (ops.tensor(shape=(2,), offset=-1, numel=2), WORD),
        "negative storage": (ops.storage("0", -2), "unknown class or size"),
        "offset behind the end": (ops.tensor(shape=(2,), offset=1, numel=2), "needs"),
        "more than the storage": (ops.tensor(shape=(3,), numel=2), "needs 12 bytes"),
        "fewer strides": (ops.tensor(shape=(1, 2), stride=(1,), numel=2), WORD),
        "100,000 dimensions": (ops.tensor(shape=(1,) * 100_000, stride=(1,) * 100_000, numel=2), "dimensions"),
        "sizes of text": (
            ops.call("torch._utils", "_rebuild_tensor_v2", ops.storage("0", 2), ops.number(0), ops.text("ab"),
                     ops.text("ab"), b"\x89", b"}"), WORD,
        ),
        "a number as boolean": (
            ops.call("torch._utils", "_rebuild_tensor_v2", ops.storage("0", 2), b"\x88", b"K\x01\x85", b"K\x01\x85",
                     b"\x89", b"}"), WORD,
        ),
        "no storage": (
            ops.call("torch._utils", "_rebuild_tensor_v2", b"N", ops.number(0), b"K\x01\x85", b"K\x01\x85", b"\x89",
                     b"}"), "no storage",
        ),
        "a view behind its storage": (
            ops.tensor(shape=(2,), numel=2, view=b"(" + ops.text("v") + ops.number(1) + ops.number(2) + b"t"), "view",
        ),
    }  # fmt: skip


def _json() -> Iterator[Case]:
    huge = [1 << 62] * 60
    headers = {
        "nested header": (b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", "not JSON"),
        "dimension 1e400": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', "not a dtype, a shape"),
        "dimension NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "not a dtype, a shape"),
        "dimension 2.0": (b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "not a dtype, a shape"),
        "dimension true": (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,8]}}', "not a dtype, a shape"),
        "dimension of 4,000 digits": (
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,8]}}', "not a dtype, a shape",
        ),
        "dimension of 500,000 digits": (
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 500_000 + b'],"data_offsets":[0,8]}}', "not JSON",
        ),
        "60 huge dimensions": (json.dumps({"a": ops.entry(0, 8, huge)}).encode(), "needs"),
        "100,000 dimensions in a header": (
            json.dumps({"a": ops.entry(0, 8, [1 << 60] * 40_000)}).encode(), "not a dtype, a shape",
        ),
        "offsets beyond 64 bits": (json.dumps({"a": ops.entry(1 << 70, (1 << 70) + 8, [2])}).encode(), "two offsets"),
    }  # fmt: skip
    for name, (header, phrase) in headers.items():
        yield Case(name, file(ops.safetensors(header, bytes(8)), "x.safetensors"), (phrase,))
    for name, length in {
        "header of 2**63": 1 << 63,
        "header of 2**64-1": (1 << 64) - 1,
        "header of 1 GB": 1 << 30,
    }.items():
        yield Case(name, file(struct.pack("<Q", length) + b'{"a":1}', "x.safetensors"), ("x.safetensors",))
    good = ops.safetensors({"w": ops.entry(0, 8, [2])}, bytes(8))
    yaml = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    for name, text in {
        "config.yaml": yaml, "hparams.yaml": "[" * 5_000 + "]" * 5_000,
        "params.json": '{"a":' * 5_000 + "1" + "}" * 5_000,
    }.items():  # fmt: skip
        phrase = ("can't be parsed", name)
        yield Case(f"{name} that explodes", folder({"x.safetensors": good, name: text}), phrase)


def cases() -> Iterator[Case]:
    """All of them."""
    for name, body in _fine().items():
        yield Case(name, file(_beside(body)), tensors=("w",))
    for name, (body, phrase) in _refused().items():
        yield Case(name, file(_beside(body)), (phrase,) if phrase else (), ("w",) if not phrase else ())
    for name, (body, phrase) in _tensors().items():
        yield Case(name, file(ops.zipped(ops.pickled(ops.table({"w": body})))), (phrase,))
        data = ops.legacy(ops.pickled(ops.table({"w": body})))
        yield Case(f"{name}, legacy", file(data), (phrase,))
    length = b"B\xff\xff\xff\xffab."
    yield Case("BINBYTES of 4 GB, legacy", file(ops.legacy(b"\x80\x02" + length)), ("claims 4,294,967,295 bytes",))
    yield Case("memo index, legacy", file(ops.legacy(b"\x80\x02Nr\xff\xff\xff\x7f.")), ("numbers a value",))
    members = {"data.pkl": ops.pickled(ops.table({"x": ops.text("a" * 50_000_000)})), "version": b"3"}
    yield Case(
        "deflated data.pkl", file(ops.archive(members, method=zipfile.ZIP_DEFLATED)), ("x/data.pkl is compressed",)
    )
    shared = ops.tensor() + _put(0) + b"0"
    tables = b"".join(ops.table({"a": _get(n), "b": _get(n)}) + _put(n + 1) + b"0" for n in range(30))
    tree = ops.table({"model": shared + tables + ops.table({"h.w": _get(0), "w": _get(30)})})
    yield Case("laughing state dicts", file(ops.zipped(ops.pickled(tree))), ("tables inside tables",))
    yield from _json()
