"""llm-foundry's mixtures, as DBRX and as Mixtral: the layout against transformers' classes, and under vLLM.

By hand: the experts and the router of llm-foundry's own torch_dmoe (llmfoundry/models/layers/dmoe.py at 8c8dd48) give
what mdl's eager mixture gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import foundry
from .. import gpts_checks as checks
from ..converted import nmse

IDS = torch.tensor([(7 * k * k + 11 * k + 3) % foundry.VOCAB for k in range(110)])


@pytest.mark.parametrize("row", foundry.ROWS)
def test_it_computes_what_transformers_computes_of_the_layout(row: str, tmp_path: Path) -> None:
    source = foundry.folder(tmp_path / "raw", row)
    prepared = checks.layout(source, tmp_path / "out")

    dbrx = row.startswith("dbrx")
    assert prepared.arch.name == "dbrx"
    assert prepared.config["architectures"] == ["MdlDbrxForCausalLM" if dbrx else "MixtralForCausalLM"]
    if dbrx and not prepared.dims["clip_qkv"]:  # transformers' class can't do without
        config = {**prepared.config, "attn_config": {**prepared.config["attn_config"], "clip_qkv": 1e9}}
        prepared = replace(prepared, config=config)
    wanted = checks.by_transformers(tmp_path / "out", prepared, IDS)
    assert nmse(checks.eager(source, ids=IDS), wanted) < 1e-12  # both have a rotary table in float32
    back = checks.back(tmp_path / "out", lost="what lay beside the weights")
    make.same(back, foundry.state(row))


def test_composer_s_own_file_has_the_config_in_it(tmp_path: Path) -> None:
    path = foundry.composer(tmp_path / "ep0-ba7-rank0.pt", "dbrx")
    with pytest.raises(MdlError, match="--weights state/model"):
        prepare(path)

    options = Options(weights="state/model")
    prepared = prepare(path, options)
    convert(prepared, tmp_path / "out", tokenizer="none")

    content = "integrations.huggingface.model.config.content."
    assert prepared.dims.entries["clip_qkv"].because == content + "attn_config.clip_qkv"
    checks.layout(foundry.folder(tmp_path / "raw", "dbrx"), tmp_path / "plain")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "plain"))
    done = export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(done.out)["state"]["model"], torch.load(path)["state"]["model"])


def test_without_the_config_it_asks(tmp_path: Path) -> None:
    source = foundry.folder(tmp_path / "raw", "dbrx")
    (source / "config.json").unlink()
    with pytest.raises(MdlError) as caught:
        prepare(source)
    given = {"n_heads": "4", "norm": "layernorm", "rope_theta": "500000", "max_seq_len": "128", "clip_qkv": "1.5"}
    given |= {"moe_top_k": "2", "name": "silu", "moe_normalize_expert_weights": "1"}
    for key in given.keys() - {"norm"}:
        assert f"--set {key}=VALUE" in str(caught.value)
    assert "layernorm (DBRX) or rmsnorm" in str(caught.value)
    with_norm = given | {"norm_eps": "1e-5"}
    assert prepare(source, Options(given=with_norm)).config["architectures"] == ["MdlDbrxForCausalLM"]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions": ("dbrx", {"attn_config": {"rope": False}}, "attn_config.rope is False in the config: its positions"),
    "alibi": ("dbrx", {"attn_config": {"alibi": True}}, "ALiBi"),
    "activation": ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "activation is 'gelu'.*silu"),
    "weights": ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": None}}, "normalised is 0.0"),
    "clipped": ("mixtral", {"attn_config": {"clip_qkv": 8}}, "clipped, which MixtralForCausalLM leaves out"),
    "tied": ("mixtral, tied", {"norm_type": "layernorm", "norm_eps": 1e-5}, "there is no lm_head"),
    "epsilon": ("dbrx", {"norm_eps": 1e-6}, "norm_eps is 1e-06, and DbrxForCausalLM has 1e-05"),
    "heads": ("dbrx", {"n_heads": 3}, "3 heads of 128 channels do not fit Wqkv"),
    "experts": ("dbrx", {"ffn_config": {"moe_num_experts": 4}}, "experts is 6 by the tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    row, changed, phrase = REFUSED[case]
    with pytest.raises(MdlError, match=phrase):
        prepare(foundry.folder(tmp_path / "raw", row, **changed)).plan.refuse()


def test_experts_without_a_gate(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in foundry.state("dbrx").items() if not name.endswith("v1")}
    with pytest.raises(MdlError, match=r"no ffn.experts.mlp.v1: the experts have no gate"):
        prepare(foundry.folder(tmp_path / "raw", "dbrx", state))


MISTAKES: dict[str, dict[str, str]] = {
    "clip": {"clip_qkv": "3"},
    "theta": {"rope_theta": "10000"},
    "norms": {"norm": "rmsnorm", "norm_eps": "1e-5", "clip_qkv": "0"},
    "experts per token": {"moe_top_k": "3"},
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_setting_that_is_wrong_shows(what: str, tmp_path: Path) -> None:
    source = foundry.folder(tmp_path / "raw", "dbrx")
    prepared = checks.layout(source, tmp_path / "out")
    wanted = checks.by_transformers(tmp_path / "out", prepared, IDS)
    assert nmse(checks.eager(source, ids=IDS, given=MISTAKES[what]), wanted) > 1e-6


def test_gate_and_value_exchanged_show(tmp_path: Path) -> None:
    source = foundry.folder(tmp_path / "raw", "dbrx")
    prepared = checks.layout(source, tmp_path / "out")
    wanted = checks.by_transformers(tmp_path / "out", prepared, IDS)
    other = {name.replace(".v1", ".w1") if ".v1" in name else name.replace(".w1", ".v1"): t
             for name, t in foundry.state("dbrx").items()}  # fmt: skip
    assert nmse(checks.eager(foundry.folder(tmp_path / "wrong", "dbrx", other), ids=IDS), wanted) > 1e-3


@pytest.mark.engine
def test_vllm_computes_it(tmp_path: Path, engine: Engine) -> None:
    checks.layout(foundry.folder(tmp_path / "raw", "dbrx"), tmp_path / "out")
    checks.is_green(tmp_path / "out", engine)
