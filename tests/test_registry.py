"""Which family a checkpoint belongs to, on what evidence; and families of one's own."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from mdl.archs import installed, targets
from mdl.archs.base import Match
from mdl.archs.registry import all_archs, detect, load_arch, mapping_path
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, prepare, recognise
from mdl.errors import Kind, MdlError

from . import checkpoints as make
from .family import stub_target, write_family


def match(path: Path) -> Match:
    return detect(take_inventory(open_checkpoint(path)))


def refusal(kind: Kind, call: object, *args: object) -> str:
    assert callable(call)
    with pytest.raises(MdlError) as caught:
        call(*args)
    assert caught.value.kind is kind
    return str(caught.value)


def test_the_registry_is_the_folder() -> None:
    archs = all_archs()

    assert set(archs) >= {"nanogpt", "llama_meta", "llama2c"}
    assert all(arch.name == name and mapping_path(arch).is_file() for name, arch in archs.items())


def test_nanogpt_is_told_by_names_shapes_and_hyperparameters(tied: Path, tmp_path: Path) -> None:
    found = match(tied)
    assert found.arch.name == "nanogpt"
    assert [text.split(":")[0] for text in found.because] == [
        "transformer.wte, transformer.wpe and transformer.h.N.attn.c_attn are nanoGPT's names",
        "c_attn.weight is [48, 16]",
        "the file holds model_args with n_layer, n_head, n_embd, as train.py saves them",
    ]

    torch.save(make.nanogpt_state(), tmp_path / "bare.pt")
    assert len(match(tmp_path / "bare.pt").because) == 2


def test_gpt2_of_hugging_face_is_not_nanogpt(tmp_path: Path) -> None:
    torch.save(make.gpt2_of(make.nanogpt_state(tied=False)), tmp_path / "gpt2.pt")

    message = refusal(Kind.INPUT, match, tmp_path / "gpt2.pt")

    assert "no known architecture has these tensors" in message
    assert "nanogpt" not in message  # which it isn't; it lacks one file
    assert "no config.json that names a class" in message
    assert "pass --config config.json" in message
    assert "--arch" in message


@pytest.mark.parametrize("name", ["encoder.0.weight", "transformer.h.0.attn.c_attn.weight"])
def test_names_that_transformers_does_not_have_get_the_list_of_families(name: str, tmp_path: Path) -> None:
    torch.save({name: torch.ones(96, 32)}, tmp_path / "other.pt")

    message = refusal(Kind.INPUT, match, tmp_path / "other.pt")

    assert "config.json" not in message
    assert "known: bloom, dbrx" in message


def test_a_decoder_of_transformers_saved_by_torch_needs_its_config_alone(tmp_path: Path) -> None:
    names = ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj")
    torch.save({f"{name}.weight": torch.ones(8, 8) for name in names}, tmp_path / "model.pt")

    assert "pass --config config.json" in refusal(Kind.INPUT, match, tmp_path / "model.pt")


def test_llama2c_and_meta_are_told_apart(llama2c: Path, two_ranks: Path, stored_twice: Path) -> None:
    assert match(llama2c).arch.name == "llama2c"
    assert match(stored_twice).arch.name == "llama_meta"
    found = match(two_ranks)
    assert found.arch.name == "llama_meta"
    assert "2 consolidated.NN.pth files: model-parallel ranks" in found.because


def test_what_could_be_either_is_asked(tmp_path: Path) -> None:
    torch.save(make.llama_state(), tmp_path / "bare.pt")

    message = refusal(Kind.INPUT, match, tmp_path / "bare.pt")

    assert "could be any of llama2c, llama_meta" in message
    assert "say which with --arch NAME" in message


@pytest.mark.parametrize("key", ["sliding_window", "moe", "head_dim"])
def test_mistral_is_not_taken_for_llama(key: str, stored_twice: Path) -> None:
    file = stored_twice / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 8}))

    assert "no known architecture" in refusal(Kind.INPUT, match, stored_twice)


def test_a_name_that_is_given_is_taken(tmp_path: Path) -> None:
    torch.save(make.llama_state(), tmp_path / "bare.pt")
    given = {"n_heads": "4", "max_seq_len": "64"}

    got = recognise(tmp_path / "bare.pt", Options(arch="llama2c", given=given))

    assert (got.arch.name, got.dims["kv_heads"], got.dims["context"]) == ("llama2c", 2, 64)
    assert "no architecture 'gpt5'; or" not in refusal(Kind.USAGE, load_arch, "gpt5")
    assert "one of: " in refusal(Kind.USAGE, load_arch, "gpt5")


def test_a_file_of_ones_own_with_its_mapping_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_spec", {"MadeUp": stub_target({"b": (2, 3)})}.get)
    path = write_family(tmp_path / "own", "rename: {a: b}\n", name="owned")
    monkeypatch.chdir(path.parent)  # from where the mapping is named by its name alone
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pt")

    got = prepare(tmp_path / "x.pt", Options(arch=str(path)))

    got.plan.refuse()
    assert (got.arch.name, got.mapping.path) == ("owned", str(path.with_suffix(".yaml")))
    assert got.plan.writes[0].rule == "owned.yaml:3:10"


def test_a_file_of_ones_own_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    assert "no such file" in refusal(Kind.USAGE, load_arch, str(path))

    path.write_text("ARCH = 3\n")
    assert "defines no ARCH" in refusal(Kind.INPUT, load_arch, str(path))

    path.write_text("import nowhere_to_be_found\n")
    assert "raised ModuleNotFoundError" in refusal(Kind.INPUT, load_arch, str(path))

    path = write_family(tmp_path / "own", "keep: [a]\n")
    path.with_suffix(".yaml").unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert "write made_up.yaml beside made_up.py" in refusal(
        Kind.INPUT, prepare, tmp_path / "x.pt", Options(arch=str(path))
    )


def test_families_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path, "keep: [a]\n", name="zz_installed")
    write_family(tmp_path, "keep: [a]\n", name="nanogpt")
    monkeypatch.syspath_prepend(str(tmp_path))

    def archs(*points: str) -> dict[str, object]:
        info = tmp_path / "brings_families-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brings-families\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[mdl.archs]", *(f"{p} = {p}" for p in points)]))
        return dict(all_archs.__wrapped__())

    brought = archs("zz_installed")["zz_installed"]
    assert mapping_path(brought) == tmp_path / "zz_installed.yaml"  # type: ignore[arg-type]  # it is an Arch
    assert "zz_missing raised ModuleNotFoundError" in refusal(Kind.MACHINE, archs, "zz_missing")
    assert "two architectures are called nanogpt" in refusal(Kind.MACHINE, archs, "nanogpt")


def test_places_that_may_bring_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what can hold an entry point of mdl's is left to importlib.metadata, and that is what it would find."""
    folder, archive = tmp_path / "plain", tmp_path / "packed.zip"
    other = folder / "other-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "entry_points.txt").write_text("[mdl.archs.served]\nx = y\n")
    places = [str(folder), str(tmp_path / "nowhere")]
    monkeypatch.setattr("sys.path", places)
    assert list(installed.family_points()) == []
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("packed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed\nVersion: 1.0\n")
        packed.writestr("packed-1.0.dist-info/entry_points.txt", "[mdl.archs]\npacked = packed\n")
    monkeypatch.setattr("sys.path", [*places, str(archive)])
    assert [point.name for point in installed.family_points()] == ["packed"]
    egg = folder / "old.egg-info"
    egg.mkdir()
    (egg / "entry_points.txt").write_text("[mdl.archs]\nold = old\n")
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: old\nVersion: 1.0\n")
    monkeypatch.setattr("sys.path", places)
    assert [point.name for point in installed.family_points()] == ["old"]


def test_a_closed_place_brings_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(place: str) -> object:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(installed.os, "scandir", closed)
    assert list(installed.family_points()) == []
