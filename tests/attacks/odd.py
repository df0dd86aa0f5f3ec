"""Files that look odd and are right: each must be read."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from . import ops
from .case import PARAMS, Case, file, folder, llama, nanogpt, nanogpt_args, state, zipped


def _views() -> bytes:
    """Views of one storage of 24 elements: dense, transposed, from the middle, every second, one value repeated."""
    shapes = {"dense": ((4, 6), (6, 1), 0), "turned": ((6, 4), (1, 6), 0), "middle": ((3, 3), (6, 1), 8)}
    shapes |= {
        "step": ((4, 3), (6, 2), 0),
        "repeated": ((5,), (0,), 3),
        "scalar": ((), (), 23),
        "none": ((0, 7), (7, 1), 99),
    }
    views = {
        name: ops.tensor("0", shape, stride=stride, offset=offset, numel=24)
        for name, (shape, stride, offset) in shapes.items()
    }
    return ops.pickled(ops.table(views))


def _parameter(body: bytes) -> bytes:
    return ops.call("torch._utils", "_rebuild_parameter", body, b"\x88", named_ordered())


def named_ordered() -> bytes:
    """An empty OrderedDict."""
    return ops.named("collections", "OrderedDict") + b")R"


def settings() -> bytes:
    """Settings of every kind that people pickle."""
    attributes = ops.table({"n_layer": ops.number(2), "lr": b"G" + struct.pack(">d", 0.1)})
    omega = ops.table(
        {
            "_content": ops.table(
                {"dim": ops.named("omegaconf.nodes", "AnyNode") + b")\x81" + ops.table({"_val": ops.number(8)}) + b"b"}
            )
        }
    )
    return ops.pickled(
        ops.table(
            {
                "model": ops.table({"w": _parameter(ops.tensor())}),
                "args": ops.named("argparse", "Namespace") + b")\x81" + attributes + b"b",
                "config": ops.named("model", "GPTConfig") + b")\x81" + attributes + b"b",
                "cfg": ops.named("omegaconf.dictconfig", "DictConfig") + b")\x81" + omega + b"b",
                "kind": ops.call("project.kinds", "Activation", ops.number(3)),
                "partial": ops.named("functools", "partial") + b"(" + ops.named("os", "system") + b"t\x81",
                "when": ops.call("datetime", "datetime", ops.text("x")),
            }
        )
    )  # fmt: skip


def _zip64() -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, data in {"x/data.pkl": ops.pickled(ops.table({"w": ops.tensor()})), "x/data/0": bytes(8)}.items():
            with made.open(name, "w", force_zip64=True) as member:
                member.write(data)
    return stream.getvalue()


def _linked(at: Path) -> Path:
    (at / "a link.pt").symlink_to(file(GOOD, "blobs/0123456789abcdef")(at))
    return at / "a link.pt"


def _hub_cache(at: Path) -> Path:
    """A folder as huggingface_hub keeps it: links to files named by their hashes, the index among them."""
    names = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    index = json.dumps({"weight_map": {tensor: name for name, tensor in names.items()}})
    files = {name: ops.safetensors({t: ops.entry(0, 4, [1])}, bytes(4)) for name, t in names.items()}
    for n, (name, data) in enumerate([*files.items(), ("model.safetensors.index.json", index)]):
        ops.write(at / f"blobs/{n:064x}", data)
        link = at / "snapshots/main" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../blobs/{n:064x}")
    return at / "snapshots/main"


def _hard_linked(at: Path) -> Path:
    home = _hub_cache(at / "cache")
    for link in home.iterdir():
        (at / link.name).hardlink_to(link.resolve())
    return at


def _read_only(at: Path) -> Path:
    path = file(GOOD)(at / "closed")
    path.parent.chmod(0o555)
    return path


GOOD = ops.zipped(ops.pickled(ops.table({"w": ops.tensor()})))


def cases() -> Iterator[Case]:
    """All of them; a whole nanoGPT, whose plan must hold, comes last."""
    views = ("dense", "turned", "middle", "step", "repeated", "scalar", "none")
    yield Case("views of one storage", file(ops.zipped(_views(), {"0": bytes(96)})), tensors=views)
    yield Case("views, legacy", file(ops.legacy(_views(), {"0": bytes(96)})), tensors=views)
    tied = ops.pickled(ops.table({"a": ops.tensor(), "b": ops.tensor()}))
    yield Case("tied tensors", file(ops.zipped(tied)), tensors=("a", "b"))
    part = ops.table(
        {"w": ops.tensor(shape=(1,), numel=2, view=b"(" + ops.text("v") + ops.number(1) + ops.number(1) + b"t")}
    )
    yield Case("a view of a storage, legacy", file(ops.legacy(ops.pickled(part))), tensors=("w",))
    yield Case("settings of every kind", file(ops.zipped(settings())), tensors=("w",))
    for protocol in (0, 1, 2, 3, 4, 5):
        body = ops.pickled(ops.table({"w": ops.tensor()}), protocol)
        yield Case(f"good, protocol {protocol}", file(ops.zipped(body)), tensors=("w",))
    names = {"größe.слой.0": (2,), "a.b.c-d_e:f/g": (1,), "層": (3,), "with space": (1,)}
    yield Case("names in Unicode", file(zipped(names)), tensors=tuple(names))
    yield Case("zip64", file(_zip64()), tensors=("w",))
    for path in ("a b/c=d#e.pt", "100% [x]/größe.pt", "-o.pt", "x.pt.bak/y.ckpt"):
        yield Case(f"path {path}", file(GOOD, path), tensors=("w",))
    yield Case("a single file by its link", _linked, tensors=("w",))
    yield Case("a hub's cache", _hub_cache, tensors=("a", "b"))
    yield Case("hard-linked shards", _hard_linked, tensors=("a", "b"))
    yield Case("a read-only folder", _read_only, tensors=("w",))
    table = {n: ops.entry(4 * k, 4 * k + 4, [1]) for k, n in enumerate("ab")} | {"none": ops.entry(8, 8, [0])}
    yield Case(
        "safetensors, an empty tensor", file(ops.safetensors(table, bytes(8)), "x.safetensors"), tensors=("a", "b")
    )
    padded = ops.safetensors(b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}   ', bytes(2))
    yield Case("safetensors, padded, fp8", file(padded, "x.safetensors"), tensors=("a",))
    infinite = {"x.safetensors": ops.safetensors({"w": ops.entry(0, 8, [2])}, bytes(8))}
    infinite["config.json"] = b'{"time_step_limit": [0.0, Infinity]}'
    yield Case("config.json of transformers with Infinity", folder(infinite), tensors=("w",))
    gpt = nanogpt()
    norms = {name: "F64" for name in gpt if "ln_" in name}
    yield Case("norms in float64", file(zipped(gpt, nanogpt_args(), norms)), tensors=tuple(gpt), plan=True)
    halves = dict.fromkeys(gpt, "BF16")
    yield Case("all in bfloat16", file(zipped(gpt, nanogpt_args(), halves)), tensors=tuple(gpt), plan=True)
    meta = llama()
    made, records = state(meta)
    freqs = ops.call(
        "torch._utils", "_rebuild_tensor_v2",
        b"(" + ops.text("storage") + ops.named("torch", "ComplexFloatStorage") + ops.text("c") + ops.text("cpu")
        + ops.number(4) + b"tQ", ops.number(0), ops.ints((4,)), ops.ints((1,)), b"\x89", named_ordered(),
    )  # fmt: skip
    args = ops.table(
        {
            k: ops.number(n)
            for k, n in {
                "dim": 8,
                "n_layers": 2,
                "n_heads": 2,
                "n_kv_heads": 2,
                "vocab_size": 12,
                "max_seq_len": 16,
                "multiple_of": 8,
            }.items()
        }
    )
    with_freqs = made[:-1] + ops.text("freqs_cis") + freqs + b"u"
    old = ops.zipped(ops.pickled(ops.table({"model": with_freqs, "model_args": args})), {**records, "c": bytes(32)})
    yield Case("complex buffers that are dropped", file(old), tensors=("freqs_cis", *meta), plan=True)
    release = {"consolidated.00.pth": zipped(meta), "params.json": PARAMS}
    yield Case("a release of Meta", folder(release), tensors=tuple(meta), plan=True)
    yield Case("a whole nanoGPT", file(zipped(gpt, nanogpt_args())), tensors=tuple(gpt), plan=True)
