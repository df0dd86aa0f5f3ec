"""litgpt from the folder to the layout: every class that its one GPT can be, in both layouts of q, k and v.

Three implementations are held to each other: litgpt's own GPT (where it is importable), mdl's eager forward on the raw
names, and transformers' class on the converted layout.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdl.archs.eager.huggingface import Lifted
from mdl.archs.registry import load_arch, mapping_path
from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import lit
from ..converted import IDS, by_transformers, exact, layout, nmse

TARGETS = {
    "llama": "LlamaForCausalLM",
    "llama_mha": "LlamaForCausalLM",
    "llama_31": "LlamaForCausalLM",
    "llama_condensed": "LlamaForCausalLM",
    "llama_wide_heads": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "stablelm_bias": "StableLmForCausalLM",
    "falcon_7b": "FalconForCausalLM",
    "falcon_40b": "FalconForCausalLM",
    "neox": "GPTNeoXForCausalLM",
    "neox_serial": "GPTNeoXForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi": "PhiForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
LAYOUTS = {"attn.qkv": False, "attn.attn": True}


@pytest.mark.parametrize("row", lit.ROWS)
def test_the_layout_computes_what_the_checkpoint_did(row: str, tmp_path: Path) -> None:
    prepared = layout(lit.checkpoint(tmp_path / "in", row), tmp_path / "out")

    assert (prepared.arch.name, prepared.target) == ("litgpt", TARGETS[row])
    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) < 1e-11  # its norms and tables are in float32


@pytest.mark.parametrize("row", lit.ROWS)
def test_both_layouts_of_q_k_v_become_the_same_tensors_and_come_back(row: str, tmp_path: Path) -> None:
    for name, old in LAYOUTS.items():
        source = lit.checkpoint(tmp_path / name, row, old=old)
        layout(source, tmp_path / f"{name}.out")
        export(tmp_path / f"{name}.out", tmp_path / f"{name}.pth")
        raw = torch.load(source / "lit_model.pth", weights_only=True)
        make.same(torch.load(tmp_path / f"{name}.pth", weights_only=True), raw)

    make.same(make.saved(tmp_path / "attn.attn.out"), make.saved(tmp_path / "attn.qkv.out"))


@pytest.mark.parametrize("row", ["llama", "neox", "gemma3"])
def test_the_eager_forward_reads_both_layouts(row: str, tmp_path: Path) -> None:
    new, old = (exact(prepare(lit.checkpoint(tmp_path / name, row, old=flag))) for name, flag in LAYOUTS.items())

    assert torch.equal(new, old)


@pytest.mark.parametrize("row", ["llama", "llama_mha", "qwen2", "neox"])
def test_rows_that_are_taken_for_the_other_layout_show(row: str, tmp_path: Path) -> None:
    """Old rows under the new name: what a converter that looks at shapes only would do."""
    fields = lit.fields(row)
    rows = {name.replace("attn.attn", "attn.qkv"): t for name, t in lit.grouped(lit.state(fields), fields).items()}
    layout(lit.save(tmp_path / "wrong", rows, fields), tmp_path / "out")

    assert nmse(by_transformers(tmp_path / "out"), exact(prepare(lit.checkpoint(tmp_path / "right", row)))) > 1e-2


CHANGED: dict[str, tuple[str, dict[str, str]]] = {
    "rotary share of GPT-NeoX": ("neox", {"rotary_percentage": "0.5"}),
    "rotary share of StableLM": ("stablelm", {"rotary_percentage": "0.5"}),
    "experts per token": ("qwen3_moe", {"n_expert_per_token": "3"}),
    "rotary share of Phi": ("phi", {"rotary_percentage": "0.25"}),
    "residuals": ("neox", {"parallel_residual": "false"}),
    "rotary base": ("llama", {"rope_base": "500000"}),
    "window": ("mistral", {"sliding_window_size": "25"}),
    "softcap": ("gemma2", {"attention_logit_softcapping": "6.0"}),
    "scale of the scores": ("gemma2", {"attention_scores_scalar": "64"}),
    "local rotary base": ("gemma3", {"rope_local_base_freq": "1000000"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_field_that_is_wrong_shows(what: str, tmp_path: Path) -> None:
    row, given = CHANGED[what]
    source = lit.checkpoint(tmp_path / "in", row)
    layout(source, tmp_path / "out", **given)

    assert nmse(by_transformers(tmp_path / "out"), exact(prepare(source))) > 1e-6


def test_sizes_and_fields_say_where_they_are_from(tmp_path: Path) -> None:
    prepared = prepare(lit.checkpoint(tmp_path / "in", "llama_31", old=True))

    entries = prepared.dims.entries
    assert {name: entries[name].value for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "ffn")} == {
        "vocab": 96, "hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 160
    }  # fmt: skip
    assert (entries["heads"].source, entries["heads"].because) == ("file", "model_config.n_head")
    assert (entries["kv_heads"].source, entries["rope_theta"].because) == ("shapes", "model_config.rope_base")
    assert entries["sliding_window"].because == "model_config.sliding_window_size is null"
    assert prepared.dims["grouped_rows"] is True
    assert prepared.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def test_a_field_that_is_null_in_the_file_can_be_given(tmp_path: Path) -> None:
    source = lit.checkpoint(tmp_path / "in", "llama")

    prepared = prepare(source, Options(given={"sliding_window_size": "24", "sliding_window_indices": "[1, 1]"}))

    assert (prepared.target, prepared.config["sliding_window"]) == ("MistralForCausalLM", 24)
    assert prepared.dims.entries["sliding_window"].because == "--set sliding_window_size=24"


def test_fields_that_an_old_release_did_not_have_are_litgpt_s_defaults(tmp_path: Path) -> None:
    fields = lit.fields("llama")
    newer = ("norm_qk", "sliding_window_size", "rope_adjustments", "attention_logit_softcapping", "norm_1", "norm_2")
    old = {key: value for key, value in fields.items() if key not in newer}

    prepared = prepare(lit.save(tmp_path / "in", lit.grouped(lit.state(fields), fields), old))

    prepared.plan.refuse()
    assert prepared.target == "LlamaForCausalLM"
    assert "the default of litgpt's Config" in prepared.dims.entries["sliding_window"].because


@pytest.mark.parametrize("wrapped", [{"model": {}}, {"model": {}, "iter_num": 3, "step_count": 2}])
def test_what_pretraining_saves_is_unwrapped(wrapped: dict[str, Any], tmp_path: Path) -> None:
    fields = lit.fields("llama")
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in lit.state(fields).items()}
    lit.save(tmp_path / "in", {**wrapped, "model": compiled}, fields)

    layout(tmp_path / "in", tmp_path / "out")

    layout(lit.checkpoint(tmp_path / "bare", "llama"), tmp_path / "bare.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "bare.out"))


def test_a_head_that_equals_the_embedding(tmp_path: Path) -> None:
    fields = lit.fields("qwen2")
    state = lit.state(fields)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()

    prepared = layout(lit.save(tmp_path / "in", state, fields), tmp_path / "out")

    assert prepared.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in make.saved(tmp_path / "out")
    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) < 1e-11


def test_without_model_config_it_asks(tmp_path: Path) -> None:
    fields = lit.fields("llama")
    folder = lit.save(tmp_path / "in", lit.state(fields), None)
    with pytest.raises(MdlError) as caught:
        prepare(folder)
    said = str(caught.value)
    assert caught.value.kind is Kind.INPUT
    assert "model_config.yaml, which does not lie beside the weights: put it there" in said
    assert "pass --set n_head=VALUE" in said
    assert "describes it" not in said  # before it knows


def test_all_that_it_asks_for_can_be_given(tmp_path: Path) -> None:
    fields = lit.fields("llama")
    folder = lit.save(tmp_path / "in", lit.state(fields), None)
    asked = ("name", "block_size", "norm_eps", "n_head", "mlp_class_name", "parallel_residual", "shared_attention_norm")
    asked += ("gelu_approximate", "scale_embeddings", "rope_base", "rotary_percentage", "rope_condense_ratio")
    given = {key: str(fields[key]) for key in asked}
    given |= dict.fromkeys(("sliding_window_size", "rope_local_base_freq", "attention_logit_softcapping"), "0")
    given |= {"norm_class_name": "RMSNorm", "final_logit_softcapping": "0", "attention_scores_scalar": "32"}
    given |= {"rope_scaling": "none"}

    prepared = layout(folder, tmp_path / "out", **given)

    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) < 1e-11


_YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 64}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "YaRN": ("llama", {"rope_adjustments": _YARN}, "whose ramp is the wrong way round in litgpt"),
    "part of Llama 3's": ("llama", {"rope_adjustments": {"low_freq_factor": 1.0}}, "rope_factor is neither"),
    "two scalings": ("llama_31", {"rope_condense_ratio": 2}, "rope_condense_ratio 2.0 and rope_adjustments together"),
    "part of a head": ("llama", {"rotary_percentage": 0.5}, "Llama describes it but for this: a rotation of 16 of 32"),
    "an odd number of channels": ("neox", {"rotary_percentage": 0.1}, "a rotation of 3 of 32 channels"),
    "latent attention": ("llama", {"latent_attention": {"q_lora_rank": 8}}, "multi-head latent attention"),
    "neighbouring pairs": ("llama", {"rope_interleave": True}, "rotation of neighbouring pairs"),
    "StableLM": ("neox", {"norm_class_name": "RMSNorm"}, "norm is 'LayerNorm' by the tensors"),
    "Falcon with part of a head": ("neox", {"bias": False}, "Falcon describes it but for this: a rotation of 8 of 32"),
    "Falcon of another width": ("falcon_40b", {"intermediate_size": 160}, "an MLP that is not four times as wide"),
    "some biases": ("neox", {"bias": False, "attn_bias": True}, "biases in some matrices only"),
    "shared key heads": ("neox", {"n_query_groups": 2}, "query heads that share key heads"),
    "OLMo 1": ("neox", {"name": "OLMo-1B-hf"}, "no weights where the name holds OLMo"),
    "experts and biases": ("mixtral", {"attn_bias": True}, "experts with biased or wholly normed q and k"),
    "StableLM side by side": ("stablelm", {"parallel_residual": True}, "attention and MLP side by side"),
    "StableLM with wide heads": ("stablelm", {"head_size": 64}, "heads that are not the width divided"),
    "some windows": ("mistral", {"sliding_window_indices": [1, 0]}, "windows in some layers"),
    "a name of Gemma": ("llama", {"name": "my-Gemma"}, "norms that multiply by 1 \\+ weight"),
    "no name of Gemma": ("gemma", {"name": "mine"}, "where the name does not hold Gemma"),
    "exact GELU": ("gemma", {"gelu_approximate": "none"}, "GELU without the tanh approximation"),
    "other local layers": ("gemma3", {"rope_indices": [0, 1]}, "rope_indices other than sliding_window_indices"),
    "softcaps": ("llama", {"final_logit_softcapping": 30.0}, "softcaps"),
    "another size": ("llama", {"padded_vocab_size": 128, "vocab_size": 128, "_only_said": True}, "vocab is 96 by"),
    "heads that do not fit": ("llama", {"n_head": 3, "_only_said": True}, "3 heads do not fit attn.proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    row, changed, phrase = REFUSED[case]
    said = {key: value for key, value in changed.items() if key != "_only_said"}
    written = lit.fields(row) if "_only_said" in changed or case == "StableLM" else lit.fields(row, **said)
    folder = lit.save(tmp_path / "in", lit.state(written), lit.fields(row, **said))

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(folder).plan.refuse()

    assert caught.value.kind is Kind.INPUT


def test_gemma_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    fields = lit.fields("gemma")
    state = lit.state(fields)
    state["lm_head.weight"] = state["lm_head.weight"] + 1

    with pytest.raises(MdlError, match=r"lm_head\.weight"):
        prepare(lit.save(tmp_path / "in", state, fields)).plan.refuse()


# --- against litgpt itself ---------------------------------------------------------------------------------------


def upstream() -> Any:
    reason = "litgpt's own code is not here: pip install --no-deps litgpt lightning lightning-utilities torchmetrics"
    for name in ("litgpt.utils", "litgpt.config", "litgpt.model"):
        pytest.importorskip(name, reason=reason, exc_type=ImportError)
    return importlib.import_module("litgpt")


@pytest.mark.parametrize("row", lit.ROWS)
def test_the_eager_forward_is_litgpt_s(row: str, tmp_path: Path) -> None:
    """On a checkpoint that litgpt's own code saved; names, shapes and fields of this folder's files are held to it."""
    litgpt, wanted = upstream(), lit.fields(row)
    config = litgpt.config.Config(**wanted)
    model = litgpt.model.GPT(config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == lit.shapes(wanted)
    assert list(model.state_dict()) == list(lit.shapes(wanted))
    model.load_state_dict(lit.state(wanted), strict=True)
    torch.save(model.state_dict(), tmp_path / "lit_model.pth")
    litgpt.utils.save_config(config, tmp_path)
    assert yaml.safe_load((tmp_path / "model_config.yaml").read_text()).keys() == wanted.keys()

    found = exact(prepare(tmp_path))

    with torch.inference_mode(), Lifted():  # its norms are in float32, whatever the weights
        theirs = model.double()(torch.tensor([IDS]))[0]
    assert float((found - theirs).abs().max()) < 1e-12


@pytest.mark.parametrize("row", ["llama", "qwen2", "neox"])
def test_litgpt_reads_the_older_layout_as_written_here(row: str) -> None:
    litgpt, fields = upstream(), lit.fields(row)
    model = litgpt.model.GPT(litgpt.config.Config(**fields))

    model.load_state_dict(lit.grouped(lit.state(fields), fields), strict=True)

    make.same(model.state_dict(), lit.state(fields))


# --- with vLLM ---------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_vllm_computes_what_litgpt_computes(tmp_path: Path, engine: Engine) -> None:
    layout(lit.checkpoint(tmp_path / "in", "qwen3_moe", old=True), tmp_path / "out")

    report = verify(tmp_path / "out", Settings(), engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]


_WRONG = """
from msgspec.structs import replace

from mdl.archs.litgpt import ARCH as RIGHT


def hf_config(d):
    config = RIGHT.hf_config(d)
    config["rope_parameters"] |= {more}
    return config


ARCH = replace(RIGHT, name="wrong", hf_config=hf_config)
"""
WRONG: dict[str, tuple[str, bool, str, dict[str, float]]] = {
    "old rows not regrouped": ("llama", True, "          - deinterleave_qkv: {heads: heads, kv_heads: kv_heads}\n", {}),
    "new rows not regrouped": ("neox", False, "        ops: [{reorder_heads: {heads: 3*heads, groups: heads}}]\n", {}),
    "another rotary share": ("neox", False, "", {"partial_rotary_factor": 0.5}),
}
"""Mistake → row, layout, what is taken out of the mapping, what is put into rope_parameters."""


def _wrong(mistake: str, folder: Path) -> Prepared:
    """A layout made with a mistake: ``out`` in the folder."""
    row, old, gone, more = WRONG[mistake]
    mapping = Path(mapping_path(load_arch("litgpt"))).read_text()
    assert gone in mapping
    (folder / "wrong.yaml").write_text(mapping.replace(gone, ""))
    (folder / "wrong.py").write_text(_WRONG.format(more=more))
    options = Options(arch=str(folder / "wrong.py"))
    prepared = prepare(lit.checkpoint(folder / "in", row, old=old), options)
    convert(prepared, folder / "out", tokenizer="none")
    return prepared


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_this_family_s_own_files_shows(mistake: str, tmp_path: Path) -> None:
    prepared = _wrong(mistake, tmp_path)

    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) > 1e-4


@pytest.mark.engine
def test_a_mistake_in_this_family_s_own_files_is_noticed(tmp_path: Path, engine: Engine) -> None:
    _wrong("new rows not regrouped", tmp_path)

    report = verify(tmp_path / "out", Settings(arch=str(tmp_path / "wrong.py"), locate=False), engine=engine)

    assert {check.name: check.ok for check in report.checks}["prefill"] is False
