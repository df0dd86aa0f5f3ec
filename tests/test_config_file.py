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
from . import checkpoints_olmo as olmo


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


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"model": {"rope_scaling": {"type": "linear", "factor": 2}}}, "model.rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"text_config": {"attention_bias": True}}, "text_config.attention_bias"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
    ],
)
def test_what_changes_the_model_and_nobody_reads_is_refused(
    values: dict[str, Any], key: str, bare: Path, tmp_path: Path
) -> None:
    words = refusals(bare, written(tmp_path / "a.json", {"n_head": 4, "activation": "gelu", **values}))
    assert f"{key} in a.json (--config) is " in words
    assert "changes what the model computes" in words


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": None, "sliding_window": None, "attention_bias": False, "num_experts": 0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 131072, "use_sliding_window": False},
        {"vision_config": {"attention_bias": True}, "optimizer": {"sliding_window": 8}},
        {"logits_scaling": 1.0, "attn_logit_softcapping": 0.0, "scale_attn_weights": True},
    ],
)
def test_what_changes_nothing_is_only_listed(values: dict[str, Any], bare: Path, tmp_path: Path) -> None:
    prepared = with_file(bare, written(tmp_path / "a.json", {"n_head": 4, "activation": "gelu", **values}))
    assert all(key in prepared.inventory.remarks[0] for key in values)


@pytest.mark.parametrize("name", ["config.json", "rope.json"])
@pytest.mark.parametrize("table", ["rope_scaling", "rope_parameters"])
def test_hugging_faces_rotary_tables_are_the_family_s_own_dims(table: str, name: str, tmp_path: Path) -> None:
    """Meta's params.json says use_scaled_rope at most; its factors are in Hugging Face's config.json."""
    state = make.llama_state()
    folder = make.meta(tmp_path / "there", state, make.params(state))
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
    file = written(tmp_path / name, {table: {**rope, "original_max_position_embeddings": 4096}})
    prepared = prepare(folder, Options(config=read_config_file(file)))

    said = {**rope, "original_max_position_embeddings": 4096, "rope_theta": prepared.dims["rope_theta"]}
    assert prepared.config["rope_parameters"] == said
    assert prepared.dims.entries["rope_factor"] == Dim(32.0, "user", f"{table}.factor in {name} (--config)")
    plain = written(tmp_path / "plain.json", {table: {"rope_type": "default"}})
    assert prepare(folder, Options(config=read_config_file(plain))).dims["rope_scaling"] == "none"
    yarn = written(tmp_path / "yarn.json", {table: {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(MdlError, match="rope_scaling is 'yarn'"):
        prepare(folder, Options(config=read_config_file(yarn)))


def test_an_activation_that_a_family_does_not_ask_for_is_refused(tmp_path: Path) -> None:
    """Meta's Llama has SiLU always, and params.json does not speak of it."""
    state = make.llama_state()
    folder = make.meta(tmp_path / "there", state, make.params(state))
    silu, gelu = (written(tmp_path / f"{name}.json", {"hidden_act": name}) for name in ("silu", "gelu"))
    assert prepare(folder, Options(config=read_config_file(silu))).config["hidden_act"] == "silu"
    with pytest.raises(MdlError, match=r"hidden_act in gelu\.json \(--config\) is 'gelu'"):
        prepare(folder, Options(config=read_config_file(gelu)))


def test_what_was_worked_out_is_no_setting(tmp_path: Path) -> None:
    """A bare key of the same name in a file, such as the target of a build, replaces no choice of a family's."""
    folder = olmo.old(tmp_path / "step10-unsharded", "olmo2")
    values = {"target": "Nonsense", "norms_before": True, "norms_after": False}
    prepared = prepare(folder, Options(config=read_config_file(written(tmp_path / "a.json", values))))
    assert dict(prepared.dims) == dict(prepare(folder).dims)
    assert all(key in prepared.inventory.remarks[0] for key in values)


@pytest.mark.parametrize("said", ["yes", 1, [True]])
def test_whether_the_head_is_the_embedding_is_true_or_false(said: Any, bare: Path, tmp_path: Path) -> None:
    words = refusals(bare, written(tmp_path / "a.json", {"n_head": 4, "activation": "gelu", "tied": said}))
    assert f"tied in a.json (--config) is {said!r}: not a value for tied expected true or false" in words


def test_whether_the_head_is_the_embedding_is_said_once(bare: Path, tmp_path: Path) -> None:
    values = {"n_head": 4, "activation": "gelu", "tied": True, "model": {"tie_word_embeddings": False}}
    words = refusals(bare, written(tmp_path / "a.json", values))
    assert "tied is True by tied and False by model.tie_word_embeddings in a.json (--config)" in words


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
    convert(prepare(bare, options), out)
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
