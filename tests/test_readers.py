"""The readers against torch itself: every position is checked by reading the bytes back."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mdl.convert.inert import Stub, Unreadable
from mdl.convert.legacy import read_legacy
from mdl.convert.open import open_checkpoint
from mdl.convert.plain import plain
from mdl.convert.safetensors_file import read_index, read_safetensors
from mdl.convert.torch_zip import read_torch_zip
from mdl.convert.unpickle import unpickle
from mdl.errors import Kind, MdlError
from mdl.mappings.tensors import ITEMSIZE, TensorInfo


class Colour(enum.Enum):
    RED = 3


@dataclasses.dataclass
class Config:
    n_layer: int = 12
    dtype: str = "bfloat16"

    class Inner:
        depth = 1


class Attacker:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def save(obj: object, path: Path, *, zipped: bool = True) -> Path:
    import torch

    torch.save(obj, path, _use_new_zipfile_serialization=zipped)
    return path


def read(path: Path, *, zipped: bool) -> Any:
    return read_torch_zip(path) if zipped else read_legacy(path)


def elements(info: TensorInfo) -> list[bytes]:
    """The tensor's elements in C order, each as its bytes, fetched one by one from where the reader says they are."""
    import itertools

    size = ITEMSIZE[info.dtype]
    data = Path(info.file).read_bytes()
    starts = (
        info.offset + size * sum(i * s for i, s in zip(index, info.stride, strict=True))
        for index in itertools.product(*map(range, info.shape))
    )
    return [data[at : at + size] for at in starts]


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(MdlError) as caught:
        call(*args)
    assert caught.value.kind is Kind.INPUT
    return str(caught.value)


def awkward_tensors() -> dict[str, Any]:
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    shared = torch.arange(10, dtype=torch.int64)
    return {
        "dense": base,
        "transposed": base.t(),
        "offset_view": base[1:, 2:5],
        "step_view": base[:, ::2],
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "scalar": torch.tensor(2.5),
        "bf16": torch.randn(5).to(torch.bfloat16),
        "half": torch.randn(2, 2, 2).half(),
        "empty": torch.empty(0, 7),
        "expanded": torch.tensor([7.0]).expand(3),
        "tied_a": shared,
        "tied_b": shared[4:],
        "mask": torch.tensor([True, False, True]),
        "double": torch.randn(2, dtype=torch.float64),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_tensor_lies_where_the_reader_says(tmp_path: Path, zipped: bool) -> None:
    tensors = awkward_tensors()
    found = read(save(tensors, tmp_path / "x.pt", zipped=zipped), zipped=zipped)

    for name, tensor in tensors.items():
        import torch

        info = found[name]
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
        flat = bytes(raw.to(torch.uint8).tolist())
        assert (info.shape, f"torch.{info.dtype}") == (tuple(tensor.shape), str(tensor.dtype)), name
        assert info.shape == (0, 7) or info.stride == tensor.stride(), name
        assert b"".join(elements(info)) == flat, name
    assert found["dense"].storage == found["transposed"].storage == found["offset_view"].storage
    assert found["tied_a"].storage == found["tied_b"].storage != found["dense"].storage


def test_dtypes_of_untyped_storages(tmp_path: Path) -> None:
    import torch

    tensors = {"u16": torch.arange(4).to(torch.uint16), "fp8": torch.randn(4).to(torch.float8_e4m3fn)}
    found = read_torch_zip(save(tensors, tmp_path / "x.pt"))

    assert [found["u16"].dtype, found["fp8"].dtype] == ["uint16", "float8_e4m3fn"]
    assert b"".join(elements(found["u16"])) == struct.pack("<4H", 0, 1, 2, 3)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hyperparameters_survive_without_their_classes(tmp_path: Path, zipped: bool) -> None:
    import numpy as np
    import torch

    tree = {
        "args": argparse.Namespace(lr=0.1),
        "config": Config(),
        "colour": Colour.RED,
        "nested": Config.Inner(),
        "np": np.float64(3.5),
        "npi": np.int32(-4),
        "npb": np.bool_(True),
        "path": pathlib.PurePosixPath("/data/x"),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "default": collections.defaultdict(list, a=[1]),
        "bytes": b"ab",
        "set": {1},
    }
    found = read(save(tree, tmp_path / "x.pt", zipped=zipped), zipped=zipped)

    assert isinstance(found["args"], Stub)
    assert (found["args"].qualname, found["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    assert found["config"].state == {"n_layer": 12, "dtype": "bfloat16"}
    assert found["config"].qualname.endswith(".Config")
    colour = found["colour"]  # early releases of Python 3.11 pickle a member by its name, all others by its value
    assert colour.qualname.endswith("Colour.RED") if isinstance(colour, type) else colour.args == (3,)
    assert found["nested"].qualname.endswith(".Config.Inner")
    assert (found["np"], found["npi"], found["npb"]) == (3.5, -4, True)
    assert (found["path"], found["dtype"], found["device"]) == ("/data/x", "bfloat16", "cuda:1")
    assert (found["size"], found["default"], found["bytes"], found["set"]) == ((2, 3), {"a": [1]}, b"ab", {1})


def test_kinds_of_tensors_that_are_not_read(tmp_path: Path) -> None:
    import torch

    tree = {
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "conj": torch.zeros(2, dtype=torch.complex64).conj(),
    }
    found = read_torch_zip(save(tree, tmp_path / "x.pt"))

    assert all(isinstance(value, Unreadable) for value in found.values())
    assert "sparse" in found["sparse"].reason


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch owned",), "system"),
        (eval, ("open('owned', 'w')",), "builtins.eval"),
        (exec, ("open('owned', 'w')",), "builtins.exec"),
        (getattr, ("x", "upper"), "builtins.getattr"),
        (__import__, ("this",), "builtins.__import__"),
        (subprocess.Popen, (["touch", "owned"],), "subprocess.Popen"),
        (pathlib.Path.touch, (pathlib.Path("owned"),), "getattr"),
        (json.loads, ("{}",), "json.loads"),
        (pytest.importorskip, ("os",), "importorskip"),
    ],
)
def test_calls_are_refused_by_name_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, function: Any, args: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save({"model": 1, "x": Attacker(function, *args)}, tmp_path / "x.pt", zipped=zipped)

    message = refusal(lambda: read(path, zipped=zipped))

    assert name in message
    assert "would run code" in message
    assert "torch.save(" in message
    assert not (tmp_path / "owned").exists()


def load(instructions: bytes) -> Any:
    return unpickle(instructions, "/nowhere", lambda *_: 0)


def test_a_pickle_cannot_alter_the_reader() -> None:
    # BUILD with a pair sets attributes: on a function of the table, on a stub class, on a tensor.
    attack = b"ccollections\nOrderedDict\nN}X\x07\x00\x00\x00qualnameX\x01\x00\x00\x00zs\x86b."
    refusal(load, attack)
    refusal(load, b"cfoo\nBar\nN}X\x08\x00\x00\x00may_callX\x01\x00\x00\x00zs\x86b.")
    assert type(load(b"ccollections\nOrderedDict\n)R.")).__name__ == "Ordered"


def test_an_enum_member_by_its_name_is_read_and_can_not_be_called() -> None:
    """So Python 3.11.0 to 3.11.3, Debian 12's among them, pickle enum members: Megatron's arguments hold some."""
    member = b"cbuiltins\ngetattr\n(cmegatron.enums\nAttnBackend\nX\x04\x00\x00\x00autotR"

    assert plain(load(member + b".")) == "auto"
    assert "AttnBackend" in refusal(load, member + b"(X\x01\x00\x00\x00xtR.")
    for owner, name in ((b"os\nPathLike", b"register"), (b"megatron.enums\nAttnBackend", b"__subclasses__")):
        size = len(name).to_bytes(4, "little")
        refusal(load, b"cbuiltins\ngetattr\n(c" + owner + b"\nX" + size + name + b"tR.")


def test_a_codec_is_not_looked_up() -> None:
    assert "_codecs.encode" in refusal(load, pickle.dumps(Attacker(__import__("_codecs").encode, "x", "idna"), 2))


def test_a_pickle_that_ends_early_says_so() -> None:
    assert "damaged" in refusal(load, pickle.dumps({"a": [1, 2]}, 2)[:-4])


def forged(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Path:
    """A file whose only tensor claims ``size``, ``stride`` and ``offset`` over a storage of six floats."""
    import torch
    from torch import _utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch deprecates typed storages, once per process
        storage = torch.zeros(6).storage()
        call = (storage, offset, size, stride, False, collections.OrderedDict())
        return save({"x": Attacker(_utils._rebuild_tensor_v2, *call)}, tmp_path / "x.pt")


def test_tensors_stay_inside_their_storage(tmp_path: Path) -> None:
    assert read_torch_zip(forged(tmp_path, (2, 3), (3, 1), 0))["x"].shape == (2, 3)
    for size, stride, offset in [((2, 3), (3, 1), 1), ((7,), (1,), 0), ((2,), (6,), 0)]:
        assert "needs" in refusal(read_torch_zip, forged(tmp_path, size, stride, offset))
    for size, stride, offset in [((-1,), (1,), 0), ((2,), (-1,), 4), ((2,), (1,), -1), ((2, 3), (1,), 0)]:
        assert "whole number" in refusal(read_torch_zip, forged(tmp_path, size, stride, offset))


def rezip(path: Path, change: Any, method: int = zipfile.ZIP_STORED) -> Path:
    """The archive again, each member's bytes passed through ``change(short name, data)``; None leaves it out."""
    target = path.with_name("rezipped.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return target


def test_archives_that_lie(tmp_path: Path) -> None:
    import torch

    path = save({"a": torch.zeros(100), "b": torch.ones(100)}, tmp_path / "x.pt")

    assert "compressed" in refusal(read_torch_zip, rezip(path, lambda _, data: data, zipfile.ZIP_DEFLATED))
    big = rezip(path, lambda name, data: b"big" if name == "byteorder" else data)
    assert "'big'" in refusal(read_torch_zip, big)
    short = rezip(path, lambda name, data: data[:-4] if name == "data/0" else data)
    assert "396 bytes" in refusal(read_torch_zip, short)
    gone = rezip(path, lambda name, data: None if name == "data/1" else data)
    assert "storage 1 is named but not in the archive" in refusal(read_torch_zip, gone)
    script = rezip(path, lambda name, data: data)
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("x/constants.pkl", b"")
    assert "TorchScript" in refusal(read_torch_zip, script)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:-200])
    assert "cut short" in refusal(read_torch_zip, cut)


def test_a_record_is_the_one_that_its_own_header_names(tmp_path: Path) -> None:
    import torch

    path = save({"a": torch.zeros(64), "b": torch.ones(64)}, tmp_path / "x.pt")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"x/data/{n}").header_offset for n in (0, 1))
    entry = data.rindex(b"x/data/1") - 46
    assert struct.unpack_from("<I", data, entry + 42) == (second,)
    struct.pack_into("<I", data, entry + 42, first)
    path.write_bytes(data)

    assert "x/data/1 is called or stored otherwise by its own header" in refusal(read_torch_zip, path)


def test_legacy_files_that_lie(tmp_path: Path) -> None:
    import torch

    path = save({"a": torch.zeros(100)}, tmp_path / "x.pt", zipped=False)
    data = path.read_bytes()

    path.write_bytes(data[:-1])
    assert "cut short" in refusal(read_legacy, path)
    path.write_bytes(data + b"more")
    assert "4 bytes follow" in refusal(read_legacy, path)
    at = data.index(b"little_endian")
    at = data.index(b"\x88", at)
    path.write_bytes(data[:at] + b"\x89" + data[at + 1 :])
    assert "big-endian" in refusal(read_legacy, path)
    at = len(data) - 408
    path.write_bytes(data[:at] + struct.pack("<q", 99) + data[at + 8 :])
    assert "99 elements" in refusal(read_legacy, path)


def safetensors_bytes(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_positions(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16), "s": torch.tensor(4)}
    save_file(tensors, path, metadata={"format": "pt"})

    found, metadata = read_safetensors(path)

    assert metadata == {"format": "pt"}
    assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert b"".join(elements(found["b"])) == struct.pack("<6f", *range(6))
    assert found["b"].stride == (3, 1)


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": entry(0, 8, [3])}, bytes(8), "needs 12 bytes"),
        ({"a": entry(0, 8, [2], "F33")}, bytes(8), "unknown dtype"),
        ({"a": entry(0, 8, [-2])}, bytes(8), "not a dtype, a shape"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, bytes(16), "a gap before b"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, bytes(8), "another tensor in the bytes of b"),
        ({"a": entry(0, 8, [2])}, bytes(4), "ends at byte"),
        ({"a": entry(0, 8, [2])}, bytes(12), "ends at byte"),
        ({"a": {**entry(0, 8, [2]), "extra": 1}}, bytes(8), "not a dtype, a shape"),
        (b'{"a": 1, "a": 2}', b"", "occurs twice"),
        (b"{no json", b"", "not JSON"),
        ({"__metadata__": {"a": 1}}, b"", "not a table of strings"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, header: object, body: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, body))

    assert message in refusal(read_safetensors, path)


def test_safetensors_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")

    assert "out of bounds" in refusal(read_safetensors, path)


def write_shards(folder: Path, weight_map: dict[str, str]) -> None:
    for n, name in ((1, "a"), (2, "b")):
        shard = folder / f"model-0000{n}-of-00002.safetensors"
        shard.write_bytes(safetensors_bytes({name: entry(0, 4, [1])}, bytes(4)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_is_checked_against_the_headers_all_at_once(tmp_path: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_shards(tmp_path, {"a": one, "b": two})
    assert set(read_index(tmp_path)) == {"a", "b"}
    assert set(open_checkpoint(tmp_path).trees[0]) == {"a", "b"}
    assert set(open_checkpoint(tmp_path / one).trees[0]) == {"a", "b"}

    write_shards(tmp_path, {"a": two, "c": one})
    message = refusal(read_index, tmp_path)
    assert f"the index says that a is in {two}, but it is in {one}" in message
    assert f"b is in {two} but not in the index" in message
    assert "no shard holds it" in message

    write_shards(tmp_path, {"a": "../a.safetensors", "b": "/etc/passwd", "c": "gone.safetensors"})
    message = refusal(read_index, tmp_path)
    assert message.count("outside its folder") == 2
    assert "gone.safetensors is missing" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello world\n", "text file"),
        ("grüße".encode() * 150, "text file"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x00" * 257 + b"ustar\x00", "tar archive"),
        (pickle.dumps({"a": 1}), "plain pickle"),
        (b"\xde\xad\xbe\xef" * 8, "de ad be ef"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)

    assert message in refusal(open_checkpoint, path)
    assert message in refusal(open_checkpoint, tmp_path)


def test_other_refusals_of_paths(tmp_path: Path) -> None:
    assert "no such file" in refusal(open_checkpoint, tmp_path / "gone.pt")
    assert "holds no checkpoint" in refusal(open_checkpoint, tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not written by torch.save" in refusal(open_checkpoint, tmp_path / "x.pt")
    (tmp_path / ".metadata").write_bytes(b"\x80")
    assert "several checkpoints: x.pt, .metadata" in refusal(open_checkpoint, tmp_path)


def test_a_folder_with_several_checkpoints_names_them(tmp_path: Path) -> None:
    save({"a": 1}, tmp_path / "one.pt")
    save({"a": 1}, tmp_path / "two.pt")
    save({"a": 1}, tmp_path / "optimizer.pt")

    assert "one.pt, two.pt" in refusal(open_checkpoint, tmp_path)


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    save({"a": 1}, tmp_path / "weights.safetensors", zipped=False)
    assert open_checkpoint(tmp_path).format == "torch legacy"
    save({"a": 1}, tmp_path / "weights.safetensors")
    assert open_checkpoint(tmp_path / "weights.safetensors").format == "torch zip"


def test_rank_files_and_what_lies_beside_them(tmp_path: Path) -> None:
    import torch

    for rank in (1, 0, 2):
        save({"w": torch.full((2,), float(rank))}, tmp_path / f"consolidated.{rank:02d}.pth")
    (tmp_path / "params.json").write_text('{"dim": 8}')
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "vocab.json").write_text("{}")

    for path in (tmp_path, tmp_path / "consolidated.01.pth"):
        ckpt = open_checkpoint(path)
        assert [Path(file).name for file in ckpt.files] == [f"consolidated.0{n}.pth" for n in range(3)]
        assert [elements(tree["w"])[0] for tree in ckpt.trees] == [struct.pack("<f", n) for n in range(3)]
        assert ckpt.sidecars == {"params": {"dim": 8}}
        assert [Path(file).name for file in ckpt.tokenizers] == ["tokenizer.model"]

    (tmp_path / "consolidated.01.pth").unlink()
    assert "{01}" in refusal(open_checkpoint, tmp_path)
    (tmp_path / "params.json").write_text("{")
    assert "params.json can't be parsed" in refusal(open_checkpoint, save({"a": 1}, tmp_path / "one.pt"))


def test_the_meta_file_of_the_same_step(tmp_path: Path) -> None:
    for step in ("000010", "000020"):
        save({"a": 1}, tmp_path / f"model_{step}.pt")
        (tmp_path / f"meta_{step}.json").write_text(json.dumps({"step": int(step)}))

    assert open_checkpoint(tmp_path / "model_000020.pt").sidecars == {"meta": {"step": 20}}


def test_reading_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    import torch
    from torch.distributed import checkpoint as dcp

    save({"model": {"a.w": torch.zeros(2)}}, tmp_path / "zip.pt")
    save({"model": {"a.w": torch.zeros(2)}}, tmp_path / "old.pt", zipped=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"a.w": torch.zeros(2)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code = (
        "import sys; from pathlib import Path; from mdl.convert.open import open_checkpoint; "
        "from mdl.convert.inventory import take_inventory\n"
        "for p in sys.argv[1:]: assert set(take_inventory(open_checkpoint(Path(p))).tensors) == {'a.w'}\n"
        "assert not {'torch', 'numpy', 'transformers', 'vllm'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("zip.pt", "old.pt", "dcp"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 0, done.stderr


def test_a_checkpoint_as_lightning_lays_it_out(tmp_path: Path) -> None:
    """The keys are those of the dump_checkpoint of its trainer's checkpoint connector."""
    import torch

    from mdl.convert.inventory import take_inventory

    weights = {"model._orig_mod.h.0.w": torch.ones(2, 3), "model._orig_mod.norm.w": torch.ones(3)}
    callback = "ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0}"
    tree = {
        "epoch": 2,
        "global_step": 30,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": collections.OrderedDict(weights),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}}}},
        "callbacks": {callback: {"best_model_score": torch.tensor(1.5), "best_model_path": ""}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 1e-3}]}],
        "lr_schedulers": [],
        "MixedPrecision": {"scale": 65536.0},
        "hparams_name": "kwargs",
        "hyper_parameters": {"n_layer": 1, "config": Config(), "lr": 1e-3},
    }
    found = take_inventory(open_checkpoint(save(tree, tmp_path / "epoch=2-step=30.ckpt")))

    assert list(found.tensors) == ["h.0.w", "norm.w"]
    assert found.wrapper == ("state_dict",)
    assert found.extras["hyper_parameters"]["n_layer"] == 1
    untouched = {note.partition(":")[0] for note in found.notes if "not touched (training state)" in note}
    assert untouched == {"loops", "callbacks", "optimizer_states", "lr_schedulers"}


def test_a_folder_as_accelerate_lays_it_out(tmp_path: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    save_file({"h.0.w": torch.ones(2, 3), "norm.w": torch.ones(3)}, tmp_path / "model.safetensors")
    save({"state": {0: {"exp_avg": torch.zeros(2, 3)}}}, tmp_path / "optimizer.bin")
    for name in ("scheduler.bin", "sampler.bin", "scaler.pt", "custom_checkpoint_0.pkl"):
        save({"last_epoch": 3}, tmp_path / name)
    save({"numpy_random_seed": np.random.get_state(), "step": 3}, tmp_path / "random_states_0.pkl")
    found = open_checkpoint(tmp_path)

    assert [Path(file).name for file in found.files] == ["model.safetensors"]
    assert len([note for note in found.notes if "not touched (training state, by its name)" in note]) == 6


def test_weights_beside_their_ema_are_a_question(tmp_path: Path) -> None:
    import torch

    from mdl.convert.inventory import take_inventory

    tree = {"state_dict": {"a.w": torch.ones(2)}, "ema_state_dict": {"a.w": torch.zeros(2)}, "epoch": 1}
    checkpoint = open_checkpoint(save(tree, tmp_path / "x.ckpt"))
    choices = "--weights state_dict (1 tensors); --weights ema_state_dict (1 tensors)"
    assert choices in refusal(take_inventory, checkpoint)
    assert take_inventory(checkpoint, weights="ema_state_dict").wrapper == ("ema_state_dict",)


def test_deepspeed_opens_where_weights_are_whole(tmp_path: Path) -> None:
    import torch

    one, two = tmp_path / "zero1", tmp_path / "parallel"
    for folder in (one, two):
        folder.mkdir()
    model = {"module": {"a.w": torch.ones(2), "b.w": torch.ones(3)}, "ds_config": {}, "global_steps": 3}
    save(model, one / "mp_rank_00_model_states.pt")
    save({"optimizer_state_dict": {}}, one / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for rank in (0, 1):
        save(model, two / f"mp_rank_0{rank}_model_states.pt")

    assert [Path(file).name for file in open_checkpoint(one).files] == ["mp_rank_00_model_states.pt"]
    assert "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt: not touched" in open_checkpoint(one).notes[0]
    assert "2 processes shared" in refusal(open_checkpoint, two)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module._flat_param", "h.0._fsdp_wrapped_module.flat_param_1"])
def test_flat_parameters_of_fsdp_are_told(name: str, tmp_path: Path) -> None:
    import torch

    from mdl.convert.inventory import take_inventory

    path = save({"model": {name: torch.ones(9), "norm.w": torch.ones(2)}}, tmp_path / "x.pt")
    assert "FULL_STATE_DICT" in refusal(take_inventory, open_checkpoint(path))
