"""Files and folders that are damaged, or that contradict themselves or one another."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ops
from .case import PARAMS, Case, file, folder, llama, nanogpt, nanogpt_args, zipped

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
PAGE = "<!DOCTYPE html><html><body>Sign in</body></html>"
CUT = "cut short"
PICKLE = ops.pickled(ops.table({"w": ops.tensor()}))
GOOD = ops.zipped(PICKLE)
SAFE = ops.safetensors({"w": ops.entry(0, 8, [2])}, bytes(8))


def _zips() -> Iterator[Case]:
    two = ops.pickled(ops.table({"a": ops.tensor("0"), "b": ops.tensor("1")}))
    pair = ops.zipped(two, {"0": bytes(8), "1": bytes(8)})
    for part in (1, 3, 6, 9):
        yield Case(f"zip cut at {part}0 %", file(GOOD[: len(GOOD) * part // 10]), (CUT,))
    yield Case("zip without its last byte", file(GOOD[:-1]), (CUT,))
    yield Case("zip without a directory", file(GOOD[: GOOD.index(b"PK\x01\x02")]), (CUT,))
    far = bytearray(GOOD)
    struct.pack_into("<I", far, GOOD.index(b"PK\x01\x02") + 42, 0x7FFFFFFF)
    yield Case("record outside the archive", file(bytes(far)), ("x/data.pkl lies outside the archive",))
    shifted = bytearray(GOOD)
    struct.pack_into("<I", shifted, GOOD.index(b"PK\x01\x02") + 42, 7)
    yield Case("record without a header", file(bytes(shifted)), ("no header",))
    yield Case("missing record", file(ops.zipped(two)), ("storage 1 is named but not in the archive",))
    yield Case("short record", file(ops.zipped(PICKLE, {"0": bytes(4)})), ("4 bytes", "8 by its description"))
    yield Case("long record", file(ops.zipped(PICKLE, {"0": bytes(12)})), ("12 bytes",))
    yield Case("overlapping records", file(_overlapping()), ("claim the same bytes",))
    yield Case("renamed record", file(_redirected(pair)), ("otherwise by its own header",))
    doubled = ops.zipped(two, {"0": bytes(8), "1": bytes(8)}).replace(b"x/data/1", b"x/data/0")
    yield Case("two records of one name", file(doubled), ("same name: x/data/0",))
    twice = ops.zipped(PICKLE, **{"data.pkk": PICKLE}).replace(b"x/data.pkk", b"x/data.pkl")
    yield Case("data.pkl twice", file(twice), ("same name: x/data.pkl",))
    roots = ops.archive({"x/data.pkl": PICKLE, "y/data.pkl": PICKLE}, root="")
    yield Case("two roots", file(roots), ("several objects", "x/data.pkl, y/data.pkl"))
    yield Case("zip of other things", file(ops.archive({"readme": b"hello"})), ("no data.pkl",))
    yield Case("TorchScript", file(ops.zipped(PICKLE, **{"constants.pkl": b""})), ("TorchScript",))
    yield Case("big-endian zip", file(ops.zipped(PICKLE, byteorder=b"big")), ("'big'", "little-endian machine"))
    yield Case("empty data.pkl", file(ops.zipped(b"")), ("damaged",))
    yield Case("data.pkl cut", file(ops.zipped(PICKLE[:-9])), ("damaged",))
    yield Case("an unknown protocol", file(ops.zipped(b"\x80\x09N.")), ("protocol 9 is not known",))
    encrypted = bytearray(GOOD)
    encrypted[GOOD.index(b"PK\x01\x02") + 8] |= 1
    yield Case("encrypted record", file(bytes(encrypted)), ("encrypted",))


def _overlapping() -> bytes:
    """Record 1 lies inside record 0, header and all."""
    inner = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 8, 8, 8, 0) + b"x/data/1" + bytes(8)
    tree = ops.table({"a": ops.tensor("0", [len(inner) // 2], kind="BF16"), "b": ops.tensor("1")})
    data = bytearray(ops.zipped(ops.pickled(tree), {"0": inner, "1": bytes(8)}))
    struct.pack_into("<I", data, data.rindex(b"x/data/1") - 4, data.index(inner))
    return bytes(data)


def _redirected(pair: bytes) -> bytes:
    data = bytearray(pair)
    entries = [data.rindex(b"x/data/" + n) - 46 for n in (b"0", b"1")]
    data[entries[1] + 42 : entries[1] + 46] = data[entries[0] + 42 : entries[0] + 46]
    return bytes(data)


def _legacy() -> Iterator[Case]:
    good = ops.legacy(PICKLE)
    for cut in (1, 9, 20, 40):
        yield Case(f"legacy without {cut} bytes", file(good[:-cut]), (CUT,) if cut < 17 else ("damaged",))
    yield Case("legacy cut in its object", file(good[: good.index(b"_rebuild")]), ("damaged",))
    yield Case("legacy and more", file(good + b"more"), ("4 bytes follow",))
    yield Case("two legacy objects", file(good + good), ("more than one object",))
    count = good[:-16] + struct.pack("<q", 3) + good[-8:]
    yield Case("legacy with another count", file(count), ("3 elements",))
    negative = good[:-16] + struct.pack("<q", -2) + good[-8:]
    yield Case("legacy with a negative count", file(negative), ("-2 elements",))
    yield Case("legacy with other storages", file(ops.legacy(PICKLE, {"7": bytes(8)})), ("does not match",))
    yield Case("big-endian legacy", file(ops.legacy(PICKLE, little=False)), ("big-endian", "little-endian one"))
    yield Case("magic alone", file(ops.MAGIC), ("damaged",))
    sizes = ops.pickled(ops.table({"a": ops.tensor(), "b": ops.tensor(shape=(3,))}))
    yield Case("one storage of two sizes", file(ops.legacy(sizes)), ("two different sizes",))


def _safetensors() -> Iterator[Case]:
    a, b = ops.entry(0, 8, [2]), ops.entry(8, 16, [2])
    for name, header, size, phrase in (
        ("overlapping offsets", {"a": a, "b": ops.entry(4, 12, [2])}, 12, "in the bytes of b"),
        ("a gap", {"a": a, "b": ops.entry(12, 20, [2])}, 20, "a gap before b"),
        ("a gap at the start", {"a": ops.entry(4, 12, [2])}, 12, "a gap before a"),
        ("unknown dtype", {"a": ops.entry(0, 8, [2], "F33")}, 8, "unknown dtype 'F33'"),
        ("wrong byte count", {"a": ops.entry(0, 8, [3])}, 8, "needs 12 bytes"),
        ("swapped offsets", {"a": ops.entry(8, 0, [2])}, 8, "needs 8 bytes"),
        ("trailing bytes", {"a": a}, 9, "ends at byte"),
        ("missing bytes", {"a": a}, 7, "ends at byte"),
        ("duplicate names", json.dumps({"a": a, "b": b}).encode().replace(b'"b"', b'"a"'), 16, "a occurs twice"),
        ("a header of a list", [1], 0, "x.safetensors"),
        ("metadata of numbers", {"__metadata__": {"a": 1}, "a": a}, 8, "not a table of strings"),
        ("invalid UTF-8", b'{"\xff": 1}', 0, "not JSON"),
    ):  # fmt: skip
        yield Case(f"safetensors: {name}", file(ops.safetensors(header, bytes(size)), "x.safetensors"), (phrase,))
    all_at_once = {"a": ops.entry(0, 8, [3]), "b": ops.entry(8, 16, [2], "F33"), "c": {"dtype": "F32"}}
    phrases = ("a float32 [3] needs 12", "b has the unknown dtype", "entry of c")
    yield Case("safetensors: three lies", file(ops.safetensors(all_at_once, bytes(16)), "x.safetensors"), phrases)


def _settings() -> Iterator[Case]:
    for name, text, phrase in (
        ("params.json", '{"norm_eps": NaN}', "norm_eps is nan"),
        ("params.json", '{"rope_theta": Infinity}', "rope_theta is inf"),
        ("params.json", '{"rope_theta": -Infinity}', "rope_theta is -inf"),
        ("params.json", '{"rope_theta": 1e400}', "rope_theta is inf"),
        ("params.json", "[1, 2]", "no table of settings"),
        ("params.json", '"dim"', "no table of settings"),
        ("params.json", '{"dim": 8, "dim": 16}', "the key dim occurs twice"),
        ("params.json", '{"dim": 8', "can't be parsed"),
        ("params.json", "", "can't be parsed"),
        ("params.json", POINTER, "can't be parsed"),
        ("config.json", PAGE, "can't be parsed"),
        ("config.json", '{"a": [{"b": NaN}]}', "a.0.b is nan"),
        ("config.json", '{"a": {"b": 1, "b": 2}}', "the key b occurs twice"),
        ("model_args.json", b'{"a": "\xff"}', "can't be parsed"),
        ("config.yaml", "a: [1", "can't be parsed"),
        ("hparams.yaml", "- a\n- b\n", "no table of settings"),
        ("hparams.yaml", "a: !!python/object/apply:os.system ['touch owned']\n", "can't be parsed"),
    ):  # fmt: skip
        label = f"{name} of {text[:24]!r}"
        yield Case(label, folder({"x.safetensors": SAFE, name: text}), (name, phrase))
    both = {"x.safetensors": SAFE, "params.json": "[]", "config.json": "{"}
    yield Case("two bad settings", folder(both), ("params.json", "config.json"))


def _index(weight_map: dict[str, Any], **files: bytes | str) -> dict[str, bytes | str]:
    one, two = (ops.safetensors({name: ops.entry(0, 4, [1])}, bytes(4)) for name in "ab")
    index = json.dumps({"weight_map": weight_map})
    return {ONE: one, TWO: two, "model.safetensors.index.json": index, **files}


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _linked_out(at: Path) -> Path:
    ops.write(at / "elsewhere" / TWO, ops.safetensors({"b": ops.entry(0, 4, [1])}, bytes(4)))
    home = folder(_index({"a": ONE, "b": TWO}))(at / "home")
    (home / TWO).unlink()
    (home / TWO).symlink_to("../elsewhere/" + TWO)
    return home


def _shards() -> Iterator[Case]:
    outside = "outside its folder"
    yield Case("index that is absolute", folder(_index({"a": ONE, "b": "/etc/passwd"})), (outside, "/etc/passwd"))
    yield Case("index that goes up", folder(_index({"a": ONE, "b": "../b.safetensors"})), (outside,))
    yield Case("index that goes down", folder(_index({"a": ONE, "b": "sub/b.safetensors"})), (outside,))
    yield Case("index of Windows paths", folder(_index({"a": ONE, "b": "..\\b.safetensors"})), (outside,))
    yield Case("index of its own folder", folder(_index({"a": ONE, "b": "."})), (outside,))
    yield Case("shard that links out", _linked_out, ("is a link to", "outside the folder of its index"))
    gone = {"a": ONE, "b": "gone.safetensors", "c": "lost.safetensors"}
    yield Case("missing shards", folder(_index(gone)), ("gone.safetensors is missing", "lost.safetensors is missing"))
    for name, opened in (("", ""), (" by a shard", ONE)):
        yield Case(f"shard not in the index{name}", folder(_index({"a": ONE}), opened), ("does not list", TWO))
    extra = ops.safetensors({"b": ops.entry(0, 4, [1]), "c": ops.entry(4, 8, [1])}, bytes(8))
    more = _index({"a": ONE, "b": TWO}, **{TWO: extra})
    yield Case("tensor not in the index", folder(more), (f"c is in {TWO} but not in the index",))
    yield Case("tensor in no shard", folder(_index({"a": ONE, "b": TWO, "c": ONE})), ("c is in", "no shard holds it"))
    yield Case("tensors in other shards", folder(_index({"a": TWO, "b": ONE})), ("a is in", "b is in"))
    yield Case("index of numbers", folder(_index({"a": 1})), ("no weight_map",))
    listed = {"model.safetensors.index.json": "[]", ONE: SAFE}
    yield Case("index of a list", folder(listed), ("no weight_map",))
    twice = {"model.safetensors.index.json": '{"weight_map": {"a": "x", "a": "y"}}', ONE: SAFE}
    yield Case("index with a name twice", folder(twice), ("the key a occurs twice",))
    same = folder({ONE: SAFE, TWO: SAFE})
    yield Case("one tensor in two shards", same, ("w is in several shards",))
    yield Case("shards without the first", folder({TWO: SAFE}), (ONE,))
    yield Case("pointers among shards", folder(_index({"a": ONE, "b": TWO}, **{TWO: POINTER})), (TWO, "git lfs pull"))
    bad = _index({"a": ONE, "b": TWO}, **{ONE: PAGE, TWO: POINTER})
    yield Case("two bad shards", folder(bad), ("web page", "git lfs pull", ONE, TWO))
    mixed = _index({"a": ONE, "b": TWO}, **{TWO: ops.zipped(ops.pickled(ops.table({"b": ops.tensor()})))})
    yield Case("shards of two formats", folder(mixed), ("different formats",))


def _no_files() -> Iterator[Case]:
    for name, data, phrase in (
        ("pointer", POINTER, "git lfs pull"),
        ("page", PAGE, "web page"),
        ("page in capitals", "\n  <HTML>", "web page"),
        ("empty", "", "empty"),
        ("one byte", "\x80", "x.pt"),
        ("zeros", bytes(4096), "no bytes of a known checkpoint format"),
        ("half a magic", ops.MAGIC[:6], "plain pickle"),
        ("an end of a zip alone", GOOD[GOOD.rindex(b"PK\x05\x06") :], "no bytes of a known"),
    ):
        yield Case(f"no checkpoint: {name}", file(data), (phrase,))
    yield Case("a folder named x.pt", folder({"x.pt/readme": "hello"}, "x.pt"), ("holds no checkpoint",))
    yield Case("a folder in a folder", folder({"x.pt/readme": "hello"}), ("holds no checkpoint", "the folders x.pt"))
    yield Case("a FIFO", _fifo, ("not a regular file",))
    yield Case("a FIFO in a folder", lambda at: _fifo(at).parent, ("holds no checkpoint",))
    yield Case("a link to nothing", lambda at: _link(at, "gone.pt"), ("no such file",))
    yield Case("a link to itself", lambda at: _link(at, "x.pt"), ("x.pt",))
    yield Case("a name too long", lambda at: at / ("a" * 300 + ".pt"), ("can't be read", "name"))
    yield Case("several checkpoints", folder({"a.pt": GOOD, "b.safetensors": SAFE}), ("a.pt, b.safetensors",))
    names = ops.zipped(ops.pickled(ops.table({"w": ops.tensor(), "a\x1b[2Jb": ops.tensor()})))
    yield Case("names that command a terminal", file(names), ("\\x1b[2Jb", "can't be printed"))
    surrogate = ops.safetensors(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4))
    yield Case("names that are no Unicode", file(surrogate, "x.safetensors"), ("can't be printed",))


def _fifo(at: Path) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    os.mkfifo(at / "x.pt")
    return at / "x.pt"


def _link(at: Path, target: str) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    (at / "x.pt").symlink_to(target)
    return at / "x.pt"


def _ranks() -> Iterator[Case]:
    good = llama(rows=2)

    def ranks(first: bytes, second: bytes, params: str = PARAMS) -> Any:
        return folder({"consolidated.00.pth": first, "consolidated.01.pth": second, "params.json": params})

    one = zipped(good)
    wq = "layers.0.attention.wq.weight"
    yield Case("rank of another shape", ranks(one, zipped({**good, wq: (4, 6)})), (wq, "rank files"), plan=True)
    norm = "layers.1.ffn_norm.weight"
    yield Case("norm of another shape", ranks(one, zipped({**good, norm: (6,)})), (norm, "different shapes"), plan=True)
    fewer = {name: shape for name, shape in good.items() if name != wq}
    yield Case("rank without a tensor", ranks(one, zipped(fewer)), (wq, "1 of 2 rank files"), plan=True)
    kinds = zipped(good, kinds={wq: "BF16"})
    yield Case("rank of another type", ranks(one, kinds), (wq, "different types"), plan=True)
    yield Case("rank with more", ranks(one, zipped({**good, "layers.0.extra": (2,)})), ("layers.0.extra",), plan=True)
    yield Case("rank that is a pointer", ranks(one, POINTER.encode()), ("consolidated.01.pth", "git lfs pull"))
    yield Case("one rank of three", folder({"consolidated.02.pth": one}), ("{00,01}",))
    yield Case("one rank twice", folder({"consolidated.00.pth": one, "consolidated.0.pth": one}), ("the same rank",))
    yield Case(
        "a rank of a billion",
        folder({"consolidated.00.pth": one, "consolidated.999999999.pth": one}),
        ("more than 1,000 rank files",),
    )
    shard = "model-00001-of-99999.safetensors"
    yield Case("a shard of 99,999", folder({shard: SAFE}), ("1 of 99,999 shards",))
    empty = ops.zipped(ops.pickled(b"}"), {})
    yield Case("rank without weights", ranks(one, empty), ("rank 1 has no weights",))


def _models() -> Iterator[Case]:
    gpt, meta = nanogpt(), llama()

    def made(changes: dict[str, Any], **args: int) -> Any:
        shapes = {name: shape for name, shape in {**gpt, **changes}.items() if shape is not None}
        return file(zipped(shapes, nanogpt_args(**args)))

    for name, value in {
        "n_layer": 3,
        "n_embd": 16,
        "vocab_size": 99,
        "block_size": 7,
        "n_head": 3,
        "n_head ": 0,
    }.items():
        key = name.strip()
        phrase = "heads do not divide" if key == "n_head" else f"by model_args.{key}"
        yield Case(f"{key} is {value}", made({}, **{key: value}), (phrase,), plan=True)
    block = {name: shape for name, shape in gpt.items() if ".h.1." in name}
    gap = {**dict.fromkeys(block), **{name.replace(".1.", ".2."): shape for name, shape in block.items()}}
    yield Case("a gap between layers", made(gap), ("by model_args.n_layer",), plan=True)
    free = {name: shape for name, shape in {**gpt, **gap}.items() if shape is not None}
    for prefix in ("", "_orig_mod."):
        shapes = {prefix + name: shape for name, shape in free.items()}
        phrase = "transformer.h.2.ln_1.weight"
        args = nanogpt_args(n_layer=1)
        yield Case(f"a gap and fitting settings {prefix}", file(zipped(shapes, args)), (phrase, "no rule"), plan=True)
        padded = {**gpt, **{name.replace(".1.", ".01."): shape for name, shape in block.items()}}
        shapes = {prefix + name: shape for name, shape in padded.items()}
        phrase = "transformer.h.01.ln_1.weight"
        yield Case(f"layer 01 beside layer 1 {prefix}", file(zipped(shapes, nanogpt_args())), (phrase,), plan=True)
    twice = {**gpt, **{f"_orig_mod.{name}": shape for name, shape in gpt.items() if ".h.1." in name}}
    yield Case(
        "layers with and without a prefix", file(zipped(twice, nanogpt_args())), ("would both be named",), plan=True
    )
    unknown, would_be = ("no known architecture",), ("would be", "the target class has")
    for name, shape, phrase in (
        ("transformer.wte.weight", (12,), unknown), ("transformer.wpe.weight", (8,), ("by model_args.block_size",)),
        ("transformer.h.0.attn.c_attn.weight", (24,), unknown),
        ("transformer.h.0.mlp.c_fc.weight", (32,), ("transpose takes a matrix",)),
        ("transformer.ln_f.weight", (8, 1), would_be), ("lm_head.weight", (12,), would_be),
    ):  # fmt: skip
        yield Case(f"{name} of {len(shape)} dimensions", made({name: shape}), phrase, plan=True)
    sizes = "can't take its sizes from these tensors"
    for name, shape, phrase in (
        ("tok_embeddings.weight", (12,), sizes), ("norm.weight", (), "norm.weight"),
        ("layers.0.attention.wq.weight", (), "layers.0.attention.wq.weight"),
        ("layers.0.attention.wk.weight", (8,), "k_proj.weight would be [8]"),
        ("layers.0.feed_forward.w1.weight", (), "ffn"), ("output.weight", (2, 2, 2), "lm_head.weight would be"),
    ):  # fmt: skip
        files = {"consolidated.00.pth": zipped({**meta, name: shape}), "params.json": PARAMS}
        yield Case(f"{name} of shape {shape}", folder(files), (phrase,), plan=True)
    empty = {name: (0, *shape[1:]) for name, shape in gpt.items()}
    yield Case("an empty model", file(zipped(empty, nanogpt_args())), ("are empty",), plan=True)
    both = file(zipped({**gpt, **meta}, nanogpt_args()))
    yield Case("two families in one file", both, ("x.pt",), plan=True)
    apart = {"gpt.pt": zipped(gpt, nanogpt_args()), "consolidated.00.pth": zipped(meta), "params.json": PARAMS}
    yield Case("two families in one folder", folder(apart), ("gpt.pt", "consolidated"), plan=True)
    for key, value, phrase in (
        ("dim", 16, "by params.dim"), ("n_layers", 3, "by params.n_layers"), ("n_heads", 3, "heads do not fit"),
        ("n_heads", -2, "heads"), ("n_kv_heads", 1, "by params.n_kv_heads"), ("vocab_size", 99, "by params.vocab_size"),
        ("n_heads", "2", "an integer"), ("norm_eps", "x", "a number"), ("n_layers", 2.0, "an integer"),
        ("n_heads", True, "an integer"), ("n_heads", 10**30, "heads do not fit"),
    ):  # fmt: skip
        params = json.dumps({**json.loads(PARAMS), key: value})
        files = {"consolidated.00.pth": zipped(meta), "params.json": params}
        yield Case(f"params.json with {key} {value!r}", folder(files), (phrase,), plan=True)


def cases() -> Iterator[Case]:
    """All of them."""
    for part in (_zips, _legacy, _safetensors, _settings, _shards, _no_files, _ranks, _models):
        yield from part()
