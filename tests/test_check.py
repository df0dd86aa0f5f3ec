"""`mdl check` sees every way in which a layout differs from what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl.convert.check import check_layout
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError

from . import checkpoints as make

FIRST = "model-00001-of-00006.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def layout(tied: Path, tmp_path: Path) -> Path:
    """A layout of several files, with a tokenizer's place left empty."""
    convert(prepare(tied), tmp_path / "out", options=Options(), tokenizer="none", max_shard_size=6000)
    assert (tmp_path / "out" / FIRST).is_file()
    return tmp_path / "out"


def found(layout: Path) -> list[str]:
    return [f"{Path(p.where.partition(': ')[0]).name}: {p.what}" for p in check_layout(layout, read_manifest(layout))]


def test_a_fresh_layout_has_no_problem(layout: Path) -> None:
    seen: list[int] = []

    assert check_layout(layout, read_manifest(layout), seen.append) == []
    assert sum(seen) == sum(t.numel() * 4 for t in make.saved(layout).values())


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_a_flipped_bit(layout: Path, place: float) -> None:
    data = bytearray((layout / FIRST).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(place * (len(data) - start - 1))] ^= 1
    (layout / FIRST).write_bytes(data)

    assert found(layout) == [f"{FIRST}: the bytes are not those that were written"]


def remove(name: str) -> Callable[[Path], None]:
    return lambda layout: (layout / name).unlink()


def edit(name: str) -> Callable[[Path], None]:
    return lambda layout: (layout / name).write_text((layout / name).read_text() + " ")


def add(name: str) -> Callable[[Path], None]:
    return lambda layout: (layout / name).write_bytes(b"anything")


def index_more(layout: Path) -> None:
    file = layout / INDEX
    index = json.loads(file.read_text())
    index["weight_map"]["no.such.tensor"] = FIRST
    file.write_text(json.dumps(index))


def truncate(layout: Path) -> None:
    (layout / FIRST).write_bytes((layout / FIRST).read_bytes()[:-1])


def rewrite(layout: Path) -> None:
    """The first file anew: one tensor less, one more, one of another type."""
    tensors = load_file(layout / FIRST)
    del tensors["transformer.wte.weight"]
    tensors |= {"transformer.wpe.weight": tensors["transformer.wpe.weight"].half(), "new": torch.zeros(2)}
    save_file(tensors, layout / FIRST)


CHANGED = "was changed after mdl convert wrote it"
STRAY = "was not written by mdl convert, and vLLM would read it"
SABOTAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no_shard": (remove(FIRST), [f"{FIRST}: is missing"]),
    "no_config": (remove("config.json"), ["config.json: is missing"]),
    "no_index": (remove(INDEX), [f"{INDEX}: is missing"]),
    "config": (edit("config.json"), [f"config.json: {CHANGED}"]),
    "generation": (edit("generation_config.json"), [f"generation_config.json: {CHANGED}"]),
    "index": (index_more, [f"{INDEX}: {CHANGED}"]),
    "stray": (add("extra.safetensors"), [f"extra.safetensors: {STRAY}"]),
    "stray_bin": (add("pytorch_model.bin"), [f"pytorch_model.bin: {STRAY}"]),
    "stray_index": (add("other.safetensors.index.json"), [f"other.safetensors.index.json: {STRAY}"]),
    "cut": (truncate, [f"{FIRST}: by its header this file ends at byte 6,280, but it has 6,279"]),
    "rewritten": (
        rewrite,
        [
            f"{FIRST}: transformer.wte.weight is not there",
            f"{FIRST}: is float16 [12, 16], the manifest says float32 [12, 16]",
            f"{FIRST}: new is in no manifest",
        ],
    ),
}


@pytest.mark.parametrize(("sabotage", "wanted"), SABOTAGE.values(), ids=SABOTAGE)
def test_sabotage_is_found(layout: Path, sabotage: Callable[[Path], None], wanted: list[str]) -> None:
    sabotage(layout)

    assert sorted(found(layout)) == sorted(wanted)


def test_a_note_beside_the_weights_is_no_problem(layout: Path) -> None:
    (layout / "README.md").write_text("how this was trained")

    assert found(layout) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "more": 2}'])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "mdl.json").write_text(text)

    with pytest.raises(MdlError, match="manifest"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=r"holds no mdl\.json"):
        read_manifest(tmp_path)
    with pytest.raises(MdlError, match="no such folder"):
        read_manifest(tmp_path / "none")
