"""Writes pickles, torch files and safetensors files byte by byte, so that each can lie in one place."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""torch's magic number as a pickle of its own, then its format's version."""
VERSION = b"\x80\x02M\xe9\x03."
FLOATS = {"F32": ("FloatStorage", 4), "F64": ("DoubleStorage", 8), "BF16": ("BFloat16Storage", 2)}


def text(value: str | bytes) -> bytes:
    """BINUNICODE."""
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """BININT, or LONG1 where it does not fit."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def call(module: str, name: str, *args: bytes) -> bytes:
    """GLOBAL, its arguments, REDUCE."""
    return named(module, name) + b"(" + b"".join(args) + b"tR"


def table(entries: Mapping[str, bytes] | Iterable[tuple[bytes, bytes]]) -> bytes:
    """A dict of texts, or of any keys, to values."""
    pairs = [(text(k), v) for k, v in entries.items()] if isinstance(entries, Mapping) else list(entries)
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def ints(values: Iterable[int]) -> bytes:
    """A tuple of whole numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, numel: int, kind: str = "F32", view: bytes = b"") -> bytes:
    """A persistent id of torch.save."""
    return (
        b"("
        + text("storage")
        + named("torch", FLOATS[kind][0])
        + text(key)
        + text("cpu")
        + number(numel)
        + view
        + b"tQ"
    )


def tensor(
    key: str = "0",
    shape: Iterable[int] = (2,),
    *,
    stride: Iterable[int] | None = None,
    offset: int = 0,
    numel: int | None = None,
    kind: str = "F32",
    view: bytes = b"",
) -> bytes:
    """A tensor over storage ``key``, which holds ``numel`` elements (as many as the shape by default)."""
    shape = list(shape)
    steps: list[int] = []
    total = 1
    for n in reversed(shape):
        steps.insert(0, total)
        total *= n
    count = total if numel is None else numel
    return call(
        "torch._utils", "_rebuild_tensor_v2", storage(key, count, kind, view), number(offset), ints(shape),
        ints(steps if stride is None else stride), b"\x89", named("collections", "OrderedDict") + b")R",
    )  # fmt: skip


def pickled(body: bytes, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return (b"" if protocol < 2 else b"\x80" + bytes((protocol,))) + body + b"."


def zipped(pickle: bytes, records: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip as torch.save writes it: data.pkl, byteorder, the storages, version."""
    held = {"0": bytes(8)} if records is None else records
    members = {"data.pkl": pickle, "byteorder": b"little", **{f"data/{k}": v for k, v in held.items()}}
    return archive({**members, "version": b"3\n", **more})


def archive(members: Mapping[str, bytes], root: str = "x/", method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of members in this order."""
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w", method) as made:
        for name, data in members.items():
            made.writestr(root + name, data)
    return stream.getvalue()


def legacy(
    pickle: bytes, records: Mapping[str, bytes] | None = None, *, itemsize: int = 4, little: bool = True
) -> bytes:
    """The stream of torch before 1.6."""
    held = {"0": bytes(8)} if records is None else records
    sizes = table({"short": number(2), "int": number(4), "long": number(4)})
    system = {"protocol_version": number(1001), "little_endian": b"\x88" if little else b"\x89", "type_sizes": sizes}
    keys = b"](" + b"".join(map(text, held)) + b"e"
    bodies = b"".join(struct.pack("<q", len(data) // itemsize) + data for data in held.values())
    return MAGIC + VERSION + pickled(table(system)) + pickle + pickled(keys) + bodies


def safetensors(header: object, body: bytes = b"") -> bytes:
    """A safetensors file; a header given as bytes is taken as it is."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + body


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    """One tensor's entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, data: bytes | str) -> Path:
    """Write a file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path
