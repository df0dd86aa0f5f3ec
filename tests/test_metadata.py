"""Planning looks at what it needs: little of a large file, and each tensor a fixed number of times."""

from __future__ import annotations

import json
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert import stored
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Prepared, prepare
from mdl.convert.same_bytes import same_bytes
from mdl.convert.zip_directory import MAX_DIRECTORY, BadDirectoryError, read_directory
from mdl.mappings.jsonable import LONG, Each, plain, to_json
from mdl.mappings.tensors import TensorInfo
from mdl.views import planned

from . import checkpoints as make

linux = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's own account of what was read")


def bytes_read(work: Callable[[], object]) -> int:
    """What this process asked the system to read meanwhile; maps of files don't count."""

    def so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = so_far()
    work()
    return so_far() - before


def sparse(folder: Path, ranks: int) -> Path:
    """21 GB of holes, in so many rank files."""
    with torch.device("meta"):
        shapes = make.llama_state(
            layers=2, hidden=16_384, heads=128, kv_heads=8, ffn=53_248, vocab=128_256, dtype=torch.bfloat16
        )
    folder.mkdir()
    for rank in range(ranks):
        parts = {
            name: torch.empty(make.cut(name, tensor, ranks, by_columns=False)[0].shape, dtype=tensor.dtype)
            for name, tensor in shapes.items()
        }
        with torch.serialization.skip_data():
            torch.save(parts, folder / f"consolidated.{rank:02d}.pth")
    params = {"dim": 16_384, "n_layers": 2, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128_256, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@linux
@pytest.mark.parametrize("ranks", [1, 4])
def test_planning_reads_little_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    def mapped(*_: object) -> None:
        raise AssertionError("planning reads tensors")

    monkeypatch.setattr(stored.Files, "tensor", mapped)
    folder = sparse(tmp_path / "raw", ranks)
    prepare(folder)  # modules and mappings are read once

    assert sum(file.stat().st_size for file in folder.iterdir()) > 20e9
    assert bytes_read(lambda: prepare(folder)) < 200_000 * ranks


def calls_made(work: Callable[[], object]) -> int:
    """How many functions are called meanwhile, of Python and of C."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("family", ["zip", "safetensors"])
def test_work_grows_with_the_number_of_tensors_and_no_faster(tmp_path: Path, family: str) -> None:
    def work(layers: int) -> int:
        state = make.llama_state(layers=layers, hidden=8, heads=2, kv_heads=2, ffn=8, vocab=8)
        path = tmp_path / f"{family}{layers}"
        if family == "zip":
            make.meta(path, state, make.params(state, heads=2, kv_heads=2))
        else:
            hugging_face(path, make.llama_of(state, 2, 2), layers)
        prepare(path)
        return calls_made(lambda: to_json(planned(prepare(path))))

    base, once, twice = work(10), work(110), work(210)

    assert once > base
    assert twice - once < 1.1 * (once - base)


def hugging_face(folder: Path, state: make.State, layers: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def by_zipfile(path: Path) -> list[tuple[Any, ...]] | None:
    """What the standard library finds in an archive's directory; None if it refuses it."""
    try:
        with zipfile.ZipFile(path) as archive:
            start = archive.start_dir
            found = [(i.filename, i.flag_bits, i.compress_type, i.compress_size, i.file_size, i.header_offset)
                     for i in archive.infolist()]  # fmt: skip
    except Exception:
        return None
    return [*found, (start,)]


def by_us(path: Path) -> list[tuple[Any, ...]] | None:
    with path.open("rb") as stream:
        try:
            found, again, start = read_directory(stream.fileno())
        except BadDirectoryError:
            return None
    return None if again else [*((name, *member[1:]) for name, member in found.items()), (start,)]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The archive with some bytes of its end changed, with bytes before or behind it, or cut."""
    made = bytearray(data)
    begin = data.index(b"PK\x01\x02")
    for _ in range(rng.randint(0, 3)):
        made[rng.randrange(begin, len(made))] = rng.choice((0, 1, 0x50, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.3:
        del made[rng.randrange(begin, len(made)) :]
    return bytes(rng.randint(0, 1) * 5) + bytes(made) + bytes(rng.choice((0, 0, 0, 7)))


def test_what_zipfile_refuses_is_refused_and_what_it_reads_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(3), "ü": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/ü", b"1")
        archive.comment = b"two words"
    good, rng = path.read_bytes(), random.Random(0)  # noqa: S311 - damage, not secrets
    seen = {True: 0, False: 0}
    assert by_us(path) == by_zipfile(path) is not None
    for _ in range(3000):
        path.write_bytes(damaged(good, rng))
        theirs, ours = by_zipfile(path), by_us(path)
        seen[theirs is None] += 1
        assert ours is None or ours == theirs

    assert min(seen.values()) > 300


def test_the_version_is_looked_at_first(tmp_path: Path) -> None:
    """As zipfile does, also where the entry is longer than what is left."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 64, 0, 0, 0, 0, 0, 5, 5, 3, 0, 0, 0, 0, 0, 7)
    (tmp_path / "x.zip").write_bytes(entry + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), 0, 0))

    with (tmp_path / "x.zip").open("rb") as file, pytest.raises(BadDirectoryError, match=r"zip file version 6\.4"):
        read_directory(file.fileno())


def test_members_beyond_4_gib(tmp_path: Path) -> None:
    path = sparse(tmp_path / "raw", 1) / "consolidated.00.pth"

    assert by_us(path) == by_zipfile(path)
    assert max(entry[-1] for entry in by_us(path) or ()) > 1 << 33


def test_the_bound_is_the_one_in_the_page(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(1 << 30)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, (1 << 28) + 1, 0, 0))

    with path.open("rb") as file, pytest.raises(BadDirectoryError, match="a directory of 268,435,457 bytes"):
        read_directory(file.fileno())
    page = (Path(__file__).parent.parent / "SECURITY.md").read_text()
    assert f"{MAX_DIRECTORY >> 20} MiB of a zip's directory" in " ".join(page.split())


def test_records_that_no_tensor_names_are_noted(tmp_path: Path) -> None:
    path = make.nanogpt(tmp_path / "x.pt")
    assert not any("records" in note for note in take_inventory(open_checkpoint(path)).notes)

    with zipfile.ZipFile(path, "a") as archive:
        for name in ("900", "901\x1b[31m", *map(str, range(902, 907))):
            archive.writestr(f"x/data/{name}", b"1234")

    (note,) = [note for note in take_inventory(open_checkpoint(path)).notes if "records" in note]
    assert note.startswith("x.pt: 7 of its records belong to no tensor, left out: x/data/900, 'x/data/901\\x1b[31m', ")
    assert note.endswith(" and 2 more")


@dataclass
class Pair:
    """Two files of the same tensor."""

    folder: Path

    def same(self, a: bytes, b: bytes) -> bool:
        infos: list[TensorInfo] = []
        for name, data in (("a", a), ("b", b)):
            path = self.folder / name
            path.write_bytes(b"head" + data)
            infos.append(TensorInfo(name, (len(data),), "uint8", str(path), 4, (1,), name))
        return same_bytes(*infos)


def test_tensors_are_compared_to_their_last_byte(tmp_path: Path) -> None:
    pair, size = Pair(tmp_path), 3_000_001
    data = random.Random(1).randbytes(size)  # noqa: S311 - made-up weights, not secrets

    assert pair.same(data, data)
    assert pair.same(b"", b"")
    for place in (0, 5000, size - 1):
        assert not pair.same(data, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_a_hole_equals_zeros_and_nothing_else(tmp_path: Path) -> None:
    size = 1 << 22
    for name, at, byte in (("hole", None, b""), ("zeros", 0, bytes(size)), ("one", size - 1, b"\1")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
            if at is not None:
                file.seek(at)
                file.write(byte)
    hole, zeros, one = (
        TensorInfo(name, (size,), "uint8", str(tmp_path / name), 0, (1,), name) for name in ("hole", "zeros", "one")
    )

    assert same_bytes(hole, hole)
    assert same_bytes(hole, zeros)
    assert not same_bytes(hole, one)
    assert not same_bytes(zeros, one)


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_stored_again_is_compared_however_the_ranks_cut_it(
    tmp_path: Path, by_columns: bool, equal: bool
) -> None:
    state = make.llama_state()
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    if not equal:
        state["output.weight"][-1, -1] += 1
    path = make.meta(tmp_path / "raw", state, make.params(state), ranks=2, by_columns=by_columns)

    done: Prepared = prepare(path)

    assert done.dims["tied"] is equal
    assert done.dims.entries["tied"].source == "values"


def test_a_long_list_says_the_same_one_element_a_line() -> None:
    items = [{"k": k, "shape": (k, 2), "nan": float("nan"), "ü": None, "p": Path("x")} for k in range(LONG + 1)]
    short, long = ({"a": 1, "items": found, "end": [float("inf")]} for found in (items[:2], items))

    assert json.loads(to_json(long))["items"][:2] == json.loads(to_json(short))["items"]
    assert to_json({"items": Each(plain, items)}) == to_json({"items": items})
    assert to_json(short) == json.dumps(json.loads(to_json(short)), indent=1, ensure_ascii=False) + "\n"
    assert len(to_json(long).splitlines()) == LONG + 1 + 8
    for surrogates in (["\ud800"] * (LONG + 1), Each(str, ["\ud800"] * (LONG + 1))):
        assert json.loads(to_json({"items": surrogates}).encode())["items"][0] == "\ud800"
