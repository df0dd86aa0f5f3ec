"""`mdl check` sees every way in which a layout differs from what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl.convert.check import check_layout, quick_check, unreadable
from mdl.convert.manifest import digest_of, read_manifest
from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.errors import MdlError

from . import checkpoints as make

FIRST = "model-00001-of-00006.safetensors"
SECOND = "model-00002-of-00006.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def layout(tied: Path, tmp_path: Path) -> Path:
    """A layout of several files, with a tokenizer's place left empty."""
    convert(prepare(tied), tmp_path / "out", tokenizer="none", max_shard_size=6000)
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


def index_less(layout: Path) -> None:
    file = layout / INDEX
    index = json.loads(file.read_text())
    del index["weight_map"]["transformer.wte.weight"]
    file.write_text(json.dumps(index))


def index_moved(layout: Path) -> None:
    file = layout / INDEX
    index = json.loads(file.read_text())
    index["weight_map"]["transformer.wte.weight"] = SECOND
    file.write_text(json.dumps(index))


def twice(layout: Path) -> None:
    """The second file holds a tensor of the first one too."""
    more = {"transformer.wte.weight": load_file(layout / FIRST)["transformer.wte.weight"]}
    save_file(load_file(layout / SECOND) | more, layout / SECOND, {"format": "pt"})


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda layout: (layout / name).write_bytes(content) and None


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
    "index": (
        index_more,
        [
            f"{INDEX}: {CHANGED}",
            f"{INDEX}: the index says that no.such.tensor is in {FIRST}, but no shard holds it",
        ],
    ),
    "index_less": (
        index_less,
        [f"{INDEX}: {CHANGED}", f"{INDEX}: transformer.wte.weight is in {FIRST} but not in the index"],
    ),
    "index_moved": (
        index_moved,
        [
            f"{INDEX}: {CHANGED}",
            f"{INDEX}: the index says that transformer.wte.weight is in {SECOND}, but it is in {FIRST}",
        ],
    ),
    "no_index_at_all": (
        overwrite(INDEX, b"[]"),
        [f"{INDEX}: {CHANGED}", f"{INDEX}: is not an index: it has no weight_map of tensor names to file names"],
    ),
    "second_copy": (
        twice,
        [
            f"{INDEX}: transformer.wte.weight is in several shards: {FIRST}, {SECOND}",
            f"{SECOND}: is in another file than the manifest says: {FIRST}",
        ],
    ),
    "not_safetensors": (
        overwrite(FIRST, b"anything"),
        [f"{FIRST}: the length of this safetensors header is out of bounds"],
    ),
    "stray": (add("extra.safetensors"), [f"extra.safetensors: {STRAY}"]),
    "stray_bin": (add("pytorch_model.bin"), [f"pytorch_model.bin: {STRAY}"]),
    "stray_pt": (add("optimizer.pt"), [f"optimizer.pt: {STRAY}"]),
    "stray_settings": (add("adapter_config.json"), [f"adapter_config.json: {STRAY}"]),
    "stray_template": (add("chat_template.jinja"), [f"chat_template.jinja: {STRAY}"]),
    "stray_index": (add("other.safetensors.index.json"), [f"other.safetensors.index.json: {STRAY}"]),
    "cut": (truncate, [f"{FIRST}: by its header this file ends at byte 9,728, but it has 9,727"]),
    "rewritten": (
        rewrite,
        [
            f"{FIRST}: transformer.wte.weight is not there",
            f"{FIRST}: is float16 [12, 16], the manifest says float32 [12, 16]",
            f"{FIRST}: new is in no manifest",
            f"{INDEX}: new is in {FIRST} but not in the index",
            f"{INDEX}: the index says that transformer.wte.weight is in {FIRST}, but no shard holds it",
        ],
    ),
}


@pytest.mark.parametrize(("sabotage", "wanted"), SABOTAGE.values(), ids=SABOTAGE)
def test_sabotage_is_found(layout: Path, sabotage: Callable[[Path], None], wanted: list[str]) -> None:
    sabotage(layout)

    assert sorted(found(layout)) == sorted(wanted)


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_the_quick_form_finds_all_but_flipped_bits(layout: Path, sabotage: str) -> None:
    change, wanted = SABOTAGE[sabotage]
    change(layout)

    assert len(quick_check(layout, read_manifest(layout))) == len(wanted)


def test_the_quick_form_reads_no_weights(layout: Path) -> None:
    data = bytearray((layout / FIRST).read_bytes())
    data[-1] ^= 1
    (layout / FIRST).write_bytes(data)

    assert quick_check(layout, read_manifest(layout)) == []
    assert len(check_layout(layout, read_manifest(layout))) == 1


def test_what_nothing_can_run_with(layout: Path) -> None:
    manifest = read_manifest(layout)
    edit("config.json")(layout)
    assert unreadable(layout, manifest) == []
    truncate(layout)
    (layout / SECOND).unlink()
    assert [Path(p.where).name for p in unreadable(layout, manifest)] == [FIRST, SECOND]


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_nothing_can_run_without_a_file_that_is_no_weights_either(name: str, layout: Path) -> None:
    manifest = read_manifest(layout)
    remove(name)(layout)

    assert [(Path(p.where).name, p.what) for p in unreadable(layout, manifest)] == [(name, "is missing")]


def test_a_note_beside_the_weights_is_no_problem(layout: Path) -> None:
    (layout / "README.md").write_text("how this was trained")

    assert found(layout) == []


def rewritten(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = layout / "mdl.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def other_hash(document: dict[str, Any]) -> None:
    document["tensors"]["transformer.wte.weight"]["xxh3"] = "0" * 32


def other_source(document: dict[str, Any]) -> None:
    document["source"]["path"] = "another.pt"


def no_digest(document: dict[str, Any]) -> None:
    del document["digest"]


@pytest.mark.parametrize("change", [other_hash, other_source, no_digest])
def test_an_edited_manifest_is_found(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewritten(layout, change)

    with pytest.raises(MdlError, match="was edited after mdl convert wrote it"):
        read_manifest(layout)


def test_other_spacing_is_no_edit(layout: Path) -> None:
    before = read_manifest(layout)
    rewritten(layout, lambda document: document.update(sorted(document.items())))

    assert read_manifest(layout) == before


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", ""])
def test_no_name_leads_out_of_the_folder(layout: Path, name: str) -> None:
    """A layout may be a stranger's, digest and all."""

    def lead_out(document: dict[str, Any]) -> None:
        document["files"][name] = "0" * 64
        del document["digest"]
        document["digest"] = digest_of(document)

    rewritten(layout, lead_out)

    with pytest.raises(MdlError, match="names a file outside its folder"):
        read_manifest(layout)


@pytest.mark.parametrize("text", ['{"format": NaN}', '{"format": 1, "a": -Infinity}', '{"format": 1, "format": 1}'])
def test_a_manifest_is_strict_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "mdl.json").write_text(text)

    with pytest.raises(MdlError, match=r"not a manifest: .*(is not JSON|occurs twice)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "more": 2}']
)
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "mdl.json").write_text(text)

    with pytest.raises(MdlError, match="manifest"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=r"holds no mdl\.json"):
        read_manifest(tmp_path)
    with pytest.raises(MdlError, match="no such folder"):
        read_manifest(tmp_path / "none")
