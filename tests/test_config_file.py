"""`--config FILE`: values that are neither in the checkpoint nor in its shapes, each with its file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mdl.archs.base import Dim
from mdl.archs.given import ConfigFile, Given
from mdl.cli import app
from mdl.convert.config_file import read_config_file
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.choose import source_of
from mdl.validate.facts import trusted
from mdl.validate.verify import Settings

from . import checkpoints as make


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A nanoGPT state dict by itself: nothing tells how many heads it has, or which GELU."""
    path = tmp_path / "bare" / "weights.pt"
    path.parent.mkdir()
    state = make.nanogpt_state()
    state["lm_head.weight"] = state["transformer.wte.weight"]  # one storage: tied
    torch.save(state, path)
    return path


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return path


def with_file(checkpoint: Path, file: Path, **given: str) -> Prepared:
    return prepare(checkpoint, Options(arch="nanogpt", given=given, config=read_config_file(file)))


def refusals(checkpoint: Path, file: Path) -> str:
    with pytest.raises(MdlError) as caught:
        with_file(checkpoint, file)
    return "\n".join(f"{p.what} {p.do}" for p in caught.value.problems)


def test_without_a_file_the_heads_are_asked_for(bare: Path) -> None:
    with pytest.raises(MdlError, match="heads is neither"):
        prepare(bare, Options(arch="nanogpt"))


@pytest.mark.parametrize(
    ("name", "values", "key"),
    [
        ("args.json", {"n_head": 4, "activation": "gelu"}, "n_head"),
        ("args.yaml", {"heads": 4, "activation": "gelu"}, "heads"),
        ("dump.yml", {"model_args": {"n_head": 4, "activation": "gelu"}}, "model_args.n_head"),
        ("dump.json", {"train": {"lr": 1e-4}, "model": {"n_head": 4, "activation": "gelu"}}, "model.n_head"),
        ("model_args.json", {"n_head": "4", "activation": "gelu"}, "n_head"),
        ("hf.json", {"num_attention_heads": 4, "hidden_act": "gelu"}, "num_attention_heads"),
    ],
)
def test_every_value_says_its_file_and_key(
    name: str, values: dict[str, Any], key: str, bare: Path, tmp_path: Path
) -> None:
    prepared = with_file(bare, written(tmp_path / name, values))
    assert prepared.dims.entries["heads"] == Dim(4, "user", f"{key} in {name} (--config)")
    assert prepared.config["n_head"] == 4
    assert any(f"{key} in {name}" in line for line in trusted(prepared))


def test_a_text_in_yaml_may_be_a_number(bare: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("n_head: 2\nactivation: gelu\nnorm_eps: 1e-6\n")  # yaml 1.1 takes 1e-6 for a text
    assert with_file(bare, file).dims["norm_eps"] == 1e-6


def test_the_word_on_the_command_line_goes_before_the_file(bare: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", {"n_head": 4, "activation": "gelu"})
    assert with_file(bare, file, n_head="2").dims.entries["heads"] == Dim(2, "user", "--set n_head=2")


def test_what_contradicts_the_shapes_is_refused(bare: Path, tmp_path: Path) -> None:
    words = refusals(bare, written(tmp_path / "a.json", {"n_head": 4, "n_layer": 9, "hidden_size": 17}))
    assert "layers is 2 by the tensors" in words
    assert "9 by n_layer in a.json (--config)" in words
    assert "17 by hidden_size in a.json (--config)" in words


def test_what_is_no_value_is_refused(bare: Path, tmp_path: Path) -> None:
    words = refusals(bare, written(tmp_path / "a.json", {"n_head": "many", "activation": "swish"}))
    assert "n_head in a.json (--config) is 'many': not a value for heads" in words
    assert "activation is 'swish'" in words


def test_two_tables_that_differ_are_refused(bare: Path, tmp_path: Path) -> None:
    words = refusals(bare, written(tmp_path / "a.json", {"args": {"n_head": 2}, "net": {"n_head": 4}}))
    assert "heads is 2 by args.n_head in a.json (--config) and 4 by net.n_head" in words


def test_what_nobody_reads_is_listed(bare: Path, tmp_path: Path) -> None:
    values = {"n_head": 4, "activation": "gelu", "dropout": 0.1, "optimizer": {"norm_eps": 1e-8, "lr": 3e-4}}
    prepared = with_file(bare, written(tmp_path / "a.json", values))
    (remark,) = prepared.inventory.remarks
    assert remark.startswith("a.json (--config) also has what this family does not read: ")
    assert remark.endswith("dropout, optimizer.norm_eps, optimizer.lr")
    assert prepared.dims["norm_eps"] == 1e-5  # an optimizer's is none of the model's


def test_params_json_elsewhere_is_as_if_it_lay_beside(tmp_path: Path) -> None:
    """Families that look for themselves find it, and what they look at counts as read."""
    state = make.llama_state()
    folder = make.meta(tmp_path / "there", state, make.params(state))
    values = json.loads((folder / "params.json").read_text())
    beside = prepare(folder)
    (tmp_path / "params.json").write_text(json.dumps({**values, "use_scaled_rope": False, "mystery": 1}))
    (folder / "params.json").unlink()
    with pytest.raises(MdlError):
        prepare(folder, Options(arch="llama_meta"))
    moved = prepare(folder, Options(arch="llama_meta", config=read_config_file(tmp_path / "params.json")))
    assert moved.config == beside.config
    assert moved.inventory.remarks[0].endswith(": mystery") or "mystery" in moved.inventory.remarks[0]
    assert "use_scaled_rope" not in moved.inventory.remarks[0]
    assert moved.dims.entries["heads"].because == "n_heads in params.json (--config)"


def test_whether_the_head_is_the_embedding_may_be_said(bare: Path, tmp_path: Path) -> None:
    values = {"n_head": 4, "activation": "gelu", "tie_word_embeddings": False}
    prepared = with_file(bare, written(tmp_path / "a.json", values))
    assert prepared.dims.entries["tied"] == Dim(False, "user", "tie_word_embeddings in a.json (--config)")
    assert prepared.inventory.remarks == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "[1]"), ("a.json", "{"), ("a.yaml", "a: ["), ("a.toml", "a = 1"), ("absent.json", None)],
)
def test_files_that_cannot_be_read_are_refused(name: str, text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(MdlError, match="--config") as caught:
        read_config_file(tmp_path / name)
    assert caught.value.kind is Kind.USAGE


def test_verify_measures_with_what_was_recorded_or_with_another_file(bare: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", {"n_head": 4, "activation": "gelu", "dropout": 0.0})
    options = Options(arch="nanogpt", config=read_config_file(file))
    out = tmp_path / "out"
    convert(prepare(bare, options), out, options=options)
    file.unlink()  # the manifest holds what it said
    manifest = read_manifest(out)
    assert any("does not read: dropout" in note for note in manifest.notes)
    again = source_of(manifest, Settings())
    assert again.dims.entries["heads"] == Dim(4, "user", "n_head in a.json (--config)")
    other = read_config_file(written(tmp_path / "b.json", {"n_head": 2, "activation": "gelu"}))
    assert source_of(manifest, Settings(config=other)).dims["heads"] == 2


def test_the_command_line_shows_values_and_what_was_not_used(bare: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "run.yaml", {"model": {"n_head": 4, "activation": "gelu"}, "seed": 1})
    words = ["--arch", "nanogpt", "--config", str(file)]
    inspected = CliRunner().invoke(app, ["inspect", str(bare), *words, "--json"])
    assert json.loads(inspected.output)["dims"]["heads"]["because"] == "model.n_head in run.yaml (--config)"
    planned = CliRunner().invoke(app, ["plan", str(bare), *words])
    assert planned.exit_code == 0
    assert "does not read: seed" in " ".join(planned.output.split())
    assert json.loads(CliRunner().invoke(app, ["plan", str(bare), *words, "--json"]).output)["notes"]


def test_a_table_that_is_walked_through_counts_as_read() -> None:
    given = Given(ConfigFile("/x/config.json", {"a": 1, "b": {"c": 2, "d": 3}}))
    config = given.extras(())["config"]
    assert config == {"a": 1, "b": {"c": 2, "d": 3}}
    assert given.unused() == ["a", "b.c", "b.d"]
    assert config["b"].get("c") == 2
    assert given.unused() == ["a", "b.d"]
    assert [key for key, _ in config.items()] == ["a", "b"]
    assert given.unused() == ["b.d"]
    assert given.extras(("config",)) == {}
    given.forget()
    assert len(given.unused()) == 3
