"""Folders of torch.distributed.checkpoint whose ``.metadata`` calls, reaches out, or lies about pieces and places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from . import ops
from .calls import RUN, TOUCH
from .case import Case, file, folder

CHECKPOINT = "torch.distributed.checkpoint"
FILE = "__0_0.distcp"
CALL = ops.call("os", "system", TOUCH)
Ints = Sequence[int]


def record(name: str, state: Mapping[str, bytes], module: str = f"{CHECKPOINT}.metadata") -> bytes:
    """An instance of a dataclass, by NEWOBJ and BUILD."""
    return ops.named(module, name) + b")\x81" + ops.table(state) + b"b"


def size(values: Ints) -> bytes:
    """A torch.Size."""
    return ops.call("torch", "Size", ops.ints(values))


def chunk(at: Ints, sizes: Ints) -> bytes:
    """One piece of a tensor."""
    return record("ChunkStorageMetadata", {"offsets": size(at), "sizes": size(sizes)})


KIND = record("TensorProperties", {"dtype": ops.named("torch", "float32")})


def tensor(shape: Ints, chunks: Sequence[bytes]) -> bytes:
    """A tensor of float32 and its pieces."""
    listed = b"](" + b"".join(chunks) + b"e"
    return record("TensorStorageMetadata", {"properties": KIND, "size": size(shape), "chunks": listed})


def index(name: str, at: Ints | None) -> bytes:
    """The key of a place."""
    return record("MetadataIndex", {"fqn": ops.text(name), "offset": b"N" if at is None else size(at)})


def place(begin: int, length: int, relative: str = FILE, **more: bytes) -> bytes:
    """Where a piece lies."""
    state = {"relative_path": ops.text(relative), "offset": ops.number(begin), "length": ops.number(length), **more}
    return record("_StorageInfo", state, f"{CHECKPOINT}.filesystem")


def metadata(listed: Mapping[str, bytes], places: Sequence[tuple[bytes, bytes]], paths: bytes = b"N") -> bytes:
    """A whole ``.metadata``."""
    tables = {"state_dict_metadata": ops.table(listed), "planner_data": paths, "storage_data": ops.table(places)}
    return ops.pickled(record("Metadata", tables))


def blob(shape: Ints, kind: str = "F32") -> bytes:
    """A record of a ``.distcp`` file."""
    return ops.zipped(ops.pickled(ops.tensor("0", shape, kind=kind)), {"0": bytes(ops.FLOATS[kind][1] * prod(shape))})


Boxes = Sequence[tuple[Ints, Ints]]


def saved(
    shape: Ints, boxes: Boxes, blobs: Sequence[bytes] | None = None, *, at: Mapping[int, tuple[int, int]] | None = None,
    **more: Any,
) -> Callable[[Path], Path]:  # fmt: skip
    """A folder of one tensor w in these pieces; ``at`` replaces the place of some of them."""
    blobs = [blob(sizes) for _, sizes in boxes] if blobs is None else blobs
    spans: list[tuple[int, int]] = []
    for data in blobs:
        spans.append((sum(length for _, length in spans), len(data)))
    spans = [(at or {}).get(k, span) for k, span in enumerate(spans)]
    places = [(index("w", start), place(*span, **more)) for (start, _), span in zip(boxes, spans, strict=True)]
    listed = metadata({"w": tensor(shape, [chunk(*box) for box in boxes])}, places)
    return folder({".metadata": listed, FILE: b"".join(blobs)})


def _calls() -> Iterator[Case]:
    one, held = tensor([2], [chunk([0], [2])]), blob([2])
    where = [(index("w", [0]), place(0, len(held)))]
    body = {FILE: held}
    yield Case("DCP: metadata that calls", folder({".metadata": ops.pickled(CALL), **body}), (RUN, "os.system"))
    deep = metadata({"w": one, "x": CALL}, where)
    yield Case("DCP: a call among the tensors", folder({".metadata": deep, **body}), (RUN, "os.system"))
    reader = metadata({"w": one}, where, ops.call(f"{CHECKPOINT}.state_dict_loader", "load", TOUCH))
    yield Case("DCP: a call of its own loader", folder({".metadata": reader, **body}), (RUN, "state_dict_loader.load"))
    call = ops.zipped(ops.pickled(ops.table({"w": CALL})))
    yield Case("DCP: a record that calls", saved([2], [([0], [2])], [call]), ("w: ", RUN, "os.system"))
    listed = {"w": one, "args": record("BytesStorageMetadata", {})}
    places = [*where, (index("args", None), place(len(held), len(call)))]
    both = folder({".metadata": metadata(listed, places), FILE: held + call})
    yield Case("DCP: an object that calls", both, ("args: ", RUN, "os.system"))
    optimizer = {"w": one, "optimizer.state": record("BytesStorageMetadata", {})}
    places = [*where, (index("optimizer.state", None), place(len(held), len(call)))]
    unread = folder({".metadata": metadata(optimizer, places), FILE: held + call})
    yield Case("DCP: an optimizer that calls is not opened", unread, tensors=("w",))
    places = [*where, (index("args", None), place(len(held), 5))]
    raw = folder({".metadata": metadata(listed, places), FILE: held + b"hello"})
    yield Case("DCP: an object that torch.save did not write", raw, tensors=("w",))
    storages = ops.pickled(ops.tensor())
    yield Case("DCP: metadata with a tensor", folder({".metadata": storages, **body}), ("holds tensors itself",))


def _reaches() -> Iterator[Case]:
    for name in ("../x.distcp", "/etc/passwd", "a/b.distcp", "..", "", "a\\b", "x\0.distcp"):
        made = saved([2], [([0], [2])], relative=name)
        yield Case(f"DCP: a file named {name!r}", made, ("outside its folder", "piece of w"))
    yield Case("DCP: a link out of the folder", _linked_out, ("is a link to", "outside its folder"))
    yield Case("DCP: a missing file", saved([2], [([0], [2])], relative="__1_0.distcp"), ("__1_0.distcp' is missing",))
    yield Case("DCP: no metadata", folder({FILE: blob([2])}), ("not .metadata", "copy the folder again"))
    yield Case("DCP: a piece of a folder", folder({FILE: blob([2])}, FILE), ("not .metadata",))


def _linked_out(at: Path) -> Path:
    made = saved([2], [([0], [2])])(at / "x")
    (made / FILE).rename(at / FILE)
    (made / FILE).symlink_to(at / FILE)
    return made


def _pieces() -> Iterator[Case]:
    halves: Boxes = [([0, 0], [2, 3]), ([2, 0], [2, 3])]
    yield Case("DCP: two pieces", saved([4, 3], halves), tensors=("w",))
    uneven: Boxes = [([0, 0], [3, 1]), ([3, 0], [1, 1]), ([0, 1], [1, 2]), ([1, 1], [3, 2])]
    yield Case("DCP: pieces of different heights", saved([4, 3], uneven), tensors=("w",))
    empty: Boxes = [([0], [2]), ([2], [0])]
    yield Case("DCP: an empty piece", saved([2], empty, [blob([2]), b""]), tensors=("w",))
    for name, shape, boxes, phrase in (
        ("overlap", [4, 3], [([0, 0], [3, 3]), ([2, 0], [2, 3])], "some overlap"),
        ("overlap and leave a gap", [5, 3], [([0, 0], [3, 3]), ([2, 0], [2, 3])], "overlap, leave a gap"),
        ("are one and the same", [4], [([0], [2]), ([0], [2])], "two places"),
        ("leave a gap", [6, 3], [([0, 0], [2, 3]), ([4, 0], [2, 3])], "some are missing"),
        ("lack the first", [4, 3], [([2, 0], [2, 3])], "some are missing"),
        ("are none", [4, 3], [], "some are missing"),
        ("lie outside", [3, 3], [([0, 0], [2, 3]), ([2, 0], [2, 3])], "outside of [3, 3]"),
        ("begin outside", [4], [([0], [4]), ([9], [1])], "outside of [4]"),
        ("have other dimensions", [4], [([0, 0], [4, 1])], "2 and 2 dimensions"),
        ("form a pinwheel", [3, 3], [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]),
                                     ([1, 1], [1, 1])], "straight cuts"),
    ):  # fmt: skip
        yield Case(f"DCP: pieces that {name}", saved(shape, boxes), ("w", phrase))
    huge = 1 << 62
    yield Case("DCP: a huge piece", saved([huge], [([0], [huge])], [blob([2])]), ("w: ", f"[{huge}]"))
    yield Case("DCP: a huge tensor", saved([huge, huge], [([0, 0], [2, 2])]), ("some are missing",))
    far = 1 << 63
    for name, shape in (("beyond 63 bits", [far]), ("negative", [-1]), ("of 65 dimensions", [1] * 65)):
        yield Case(f"DCP: a shape {name}", saved(shape, []), ("w", "a few whole numbers"))
    # 300 tensors that all mean one list of as many pieces
    shared = b"](" + b"".join(chunk([k], [1]) for k in range(300)) + b"eq\x05"
    first = record("TensorStorageMetadata", {"properties": KIND, "size": size([300]), "chunks": shared})
    again = record("TensorStorageMetadata", {"properties": KIND, "size": size([300]), "chunks": b"h\x05"})
    tensors = {"a": first, **{f"t{k}": again for k in range(300)}}
    many = metadata(tensors, [(index("a", [k]), place(0, 9)) for k in range(300)])
    yield Case("DCP: one list of pieces for all", folder({".metadata": many, FILE: b""}), ("more pieces than",))
    stairs = [([0, k], [4000 - k, 1]) for k in range(1000)]
    yield Case("DCP: a staircase", saved([4000, 1000], stairs, [b""] * 1000), ("some are missing",))


def _places() -> Iterator[Case]:
    one: Boxes = [([0], [2])]
    two: Boxes = [([0], [2]), ([2], [2])]
    held = len(blob([2]))
    yield Case("DCP: behind the file", saved([2], one, at={0: (0, held + 1)}), ("w ends at byte", "copy the folder"))
    yield Case("DCP: far behind the file", saved([2], one, at={0: (1 << 62, held)}), ("w ends at byte",))
    yield Case("DCP: before the file", saved([2], one, at={0: (-1, held)}), ("offset and a length ≥ 0",))
    yield Case("DCP: of a negative length", saved([2], one, at={0: (0, -1)}), ("offset and a length ≥ 0",))
    yield Case("DCP: cut by its length", saved([2], one, at={0: (0, held - 1)}), ("w: ", "cut short"))
    yield Case("DCP: of no length", saved([2], one, at={0: (0, 0)}), ("w: ", "cut short"))
    yield Case("DCP: two in one place", saved([4], two, at={1: (0, held)}), ("claim the same bytes",))
    yield Case("DCP: into one another", saved([4], two, at={0: (0, held + 1)}), ("claim the same bytes",))
    swapped = saved([3], [([0], [2]), ([2], [1])], [blob([1]), blob([2])])
    yield Case("DCP: swapped pieces", swapped, ("float32 [1] instead of float32 [2]", "float32 [2] instead of"))
    yield Case("DCP: another type", saved([2], one, [blob([2], "F64")]), ("float64 [2] instead of float32 [2]",))
    table = ops.zipped(ops.pickled(ops.table({"a": ops.tensor()})))
    yield Case("DCP: no tensor", saved([2], one, [table]), ("holds no tensor",))
    packed = saved([2], one, transform_descriptors=b"](" + ops.text("zstd") + b"e")
    yield Case("DCP: compressed", packed, ("compressed", "save it again without"))
    outer = blob([2])
    inner = saved([2], one, [outer + b"PK"], at={0: (1, len(outer) - 1)})
    yield Case("DCP: the end of a record", inner, ("w: ",))
    gone = metadata({"w": tensor([2], [chunk([0], [2])])}, [(index("x", [0]), place(0, 9))])
    yield Case("DCP: without a place", folder({".metadata": gone, FILE: b""}), ("nothing says in which file",))


def _forms() -> Iterator[Case]:
    other = ops.pickled(ops.table({"state_dict_metadata": b"N"}))
    for name, data, phrase in (
        ("a table", other, "not the .metadata"),
        ("empty", b"", "damaged"),
        ("text", b"hello", "damaged"),
        ("numbers for places", metadata({}, [(ops.number(1), ops.number(2))]), "unknown form"),
        ("no places", ops.pickled(record("Metadata", {"state_dict_metadata": b"}"})), "not the .metadata"),
        ("nothing", metadata({}, []), "no weights"),
        ("numbers for tensors", metadata({"w": ops.number(1)}, []), "unknown form"),
    ):
        yield Case(f"DCP: metadata of {name}", folder({".metadata": data, FILE: b""}), (phrase,))
    held = blob([2])
    listed = {name: tensor([2], [chunk([0], [2])]) for name in ("w", "x")}
    where = [(index(name, [0]), place(k * len(held), len(held))) for k, name in enumerate(listed)]
    for name, keys, phrase in (
        ("the same", ("a", "a"), "in the place of something else"),
        ("within each other", ("a", "a", "b"), "in the place of something else"),
        ("without end", ("a",) * 99, "tables inside tables"),
    ):
        paths = ops.table(
            {"w": b"(" + ops.text("a") + b"t", "x": b"(" + b"".join(map(ops.text, keys[1:] or keys)) + b"t"}
        )
        data = metadata(listed, where, paths)
        yield Case(f"DCP: paths {name}", folder({".metadata": data, FILE: held * 2}), (phrase,))
    whole = folder({".metadata": metadata(listed, where), FILE: held * 2, "model.pt": ops.zipped(
        ops.pickled(ops.table({"w": ops.tensor()})))})  # fmt: skip
    yield Case("DCP: beside another checkpoint", whole, ("several checkpoints: model.pt, .metadata",))
    yield Case("a file with the name of metadata", file(b"hello", "x.distcp"), ("not .metadata",))


def cases() -> Iterator[Case]:
    """All of them."""
    for part in (_calls, _reaches, _pieces, _places, _forms):
        yield from part()
