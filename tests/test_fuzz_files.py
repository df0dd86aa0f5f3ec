"""Damaged and random files against every reader of a container, and against the way from a file to its inventory."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdl.convert import inventory, legacy, torch_zip
from mdl.convert import open as opening
from mdl.convert.inert import NumpyArray, NumpyType
from mdl.convert.inventory import take_inventory
from mdl.convert.safetensors_file import DTYPES
from mdl.errors import MdlError
from mdl.mappings.jsonable import to_json
from mdl.mappings.tensors import ITEMSIZE, TensorInfo

from .fuzz import seeds, targets
from .fuzz.inputs import fixed, held, mutated, pickles


@pytest.mark.parametrize("name", ["torch_zip", "legacy", "safetensors", "dcp_metadata", "inventory"])
def test_mutated_files(name: str, tmp_path: Path) -> None:
    accepted: list[bool] = []

    @fixed(150)
    @given(data=mutated(seeds.seeds()[name]))
    def run(data: bytes) -> None:
        accepted.append(held(name, data, tmp_path) is None)

    run()
    assert 0 < accepted.count(True) < len(accepted)  # neither is all of it refused, nor is the damage without effect


@pytest.mark.parametrize("name", ["torch_zip", "legacy", "safetensors", "dcp_metadata", "mapping", "inventory"])
def test_real_files_are_accepted_and_cut_ones_never_break_a_promise(name: str, tmp_path: Path) -> None:
    for data in seeds.seeds()[name]:
        assert name == "mapping" or held(name, data, tmp_path) is None or name == "inventory"
        for end in range(0, len(data), max(1, len(data) // 40)):
            error = held(name, data[:end], tmp_path)
            assert error is not None or name == "mapping", f"accepted {end} of {len(data)} bytes"


@fixed(150)
@given(data=pickles())
def test_random_instructions_behind_a_real_head(data: bytes, tmp_path: Path) -> None:
    whole = seeds.seeds()["legacy"][0]
    head = whole.index(b"little_endian")
    behind = whole.index(b".", whole.index(b"u", head)) + 1
    held("legacy", whole[:behind] + data + b"\x80\x02]q\x00.", tmp_path)
    held("inventory", whole[:behind] + data + b"\x80\x02]q\x00.", tmp_path)


NUMBERS = st.integers(-2, 9) | st.sampled_from([1 << 31, 1 << 63, (1 << 64) - 1, 10**4299, 1.5, True, None, "4"])


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header of some entries: most of them right, or nearly right."""
    entries: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.sampled_from(["a", "b.c", "", "\ud800", "__metadata__", "model.w"]), max_size=4)):
        dtype = draw(st.sampled_from([*DTYPES, *DTYPES, "F4", 7]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3) | st.lists(NUMBERS, max_size=3))
        honest = all(type(n) is int and 0 <= n < 10 for n in shape) and dtype in DTYPES
        end = at + (math.prod(shape) * ITEMSIZE[DTYPES[dtype]] if honest else 0)
        offsets = draw(st.just([at, end]) | st.lists(NUMBERS, max_size=3))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at = end if end < 1000 else at
    anything = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    entries |= draw(
        st.just({}) | st.dictionaries(st.sampled_from(["__metadata__", "b.c", "\x00"]), anything, max_size=2)
    )
    text = json.dumps(entries, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    length = draw(st.just(len(text)) | st.sampled_from([0, 1, len(text) - 1, 1 << 40, (1 << 64) - 1]))
    return struct.pack("<Q", max(length, 0)) + text + bytes(at)


def test_random_headers(tmp_path: Path) -> None:
    accepted: list[bool] = []

    @fixed(150)
    @given(data=headers())
    def run(data: bytes) -> None:
        accepted.append(held("safetensors", data, tmp_path) is None)
        held("inventory", data, tmp_path)

    run()
    assert 10 < accepted.count(True) < len(accepted)


# --- the promises can be broken: the check of ranges sees a reader that does not check them ---


def test_a_tensor_outside_its_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip._Archive, "_start", lambda *_: 1 << 20)
    monkeypatch.setattr(torch_zip._Archive, "pickled", lambda _: seeds.seeds()["unpickle"][0])
    with pytest.raises(targets.BrokenPromise, match="outside its file"):
        held("torch_zip", seeds.seeds()["torch_zip"][0], tmp_path)

    whole = seeds.seeds()["legacy"][0]
    monkeypatch.setattr(
        legacy, "_starts", lambda _mapped, _at, _file, keys, _sizes: dict.fromkeys(map(str, keys), 9999)
    )
    with pytest.raises(targets.BrokenPromise, match="outside its file"):
        held("legacy", whole, tmp_path)


# --- what the fuzzers found ---


def header(entry: dict[str, Any]) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


FOUND = {
    "a shape whose size no text can show": ("safetensors", header({"shape": [10**4000, 10**4000]})),
    "one byte that may begin a pickle": ("inventory", b"\x80"),
    "no byte, in the reader of streams": ("legacy", b""),
}


@pytest.mark.parametrize(("name", "data"), FOUND.values(), ids=FOUND)
def test_what_once_broke_a_promise(name: str, data: bytes, tmp_path: Path) -> None:
    assert held(name, data, tmp_path) is not None


def checkpoint(tree: dict[str, Any]) -> opening.Checkpoint:
    return opening.Checkpoint("x.pt", "torch zip", ("x.pt",), (tree,))


WEIGHT = TensorInfo("", (1,), "float32", "x.pt", 0, (1,), "x.pt:0")


def test_weights_that_hold_themselves_or_share_without_end() -> None:
    within: dict[str, Any] = {"w": WEIGHT}
    within["again"] = within
    with pytest.raises(MdlError, match="tables inside tables without end"):
        take_inventory(checkpoint({"model": within}))

    deep: dict[str, Any] = {"w": WEIGHT}
    for _ in range(5000):
        deep = {"in": deep}
    with pytest.raises(MdlError, match="tables inside tables without end"):
        take_inventory(checkpoint({"model": {"w": WEIGHT, "deep": deep}}))


def test_more_names_than_any_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "MAX_VISITED", 1000)
    shared: dict[str, Any] = {"w": WEIGHT}
    for _ in range(15):  # fewer tables inside one another than may be
        shared = {"a": shared, "b": shared}
    with pytest.raises(MdlError, match="tables inside tables without end"):
        take_inventory(checkpoint({"model": {"w": WEIGHT, "shared": shared}}))


def test_settings_that_hold_themselves_or_share_without_end() -> None:
    deep: list[Any] = []
    shared: list[Any] = [1]
    for _ in range(5000):
        deep = [deep]
    for _ in range(40):  # fewer within each other than may be
        shared = [shared, shared]
    got = take_inventory(checkpoint({"model": {"w": WEIGHT}, "deep": deep, "shared": shared, "fine": []}))

    assert got.extras == {"fine": []}
    assert {"deep: left out, for it is nested too deeply", "shared: left out, for it has too many values"} <= {
        *got.notes
    }


def test_an_array_of_text_that_is_none() -> None:
    kind = NumpyType("U1")
    array = NumpyArray()
    array.fill((1,), kind, b"\xff\xff\xff\xff", fortran=False)
    assert array.value() == ["\ufffd"]

    array.fill((1,), NumpyType("U\u00b2"), b"abcd", fortran=False)  # a digit, but no number
    assert array.value() == "array U\u00b2 [1]"


def test_half_a_surrogate_pair_can_be_printed() -> None:
    assert json.loads(to_json({"\ud800": 1}).encode()) == {"\ud800": 1}
