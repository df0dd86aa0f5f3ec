"""vLLM's own known faults are named for the models that have them, and for no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdl.errors import Kind, MdlError, input_error, machine_error
from mdl.validate.client import Engine
from mdl.validate.faults import known_faults, naming_faults, of_no_numbers
from mdl.validate.report import Report
from mdl.validate.verify import Settings, verify

from . import hf
from . import servable as make


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"model_type": "deepseek_v3"}, "-rotary_embedding"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "mdl has a class of its own"),
        ({"model_type": "jetmoe"}, "MoE backend"),
        ({"model_type": "lfm2"}, "differs"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "LongRoPE"),
    ],
)
def test_named_where_it_applies(config: dict[str, Any], phrase: str) -> None:
    (note,) = known_faults(config)
    assert phrase in note
    assert note.startswith("vLLM itself")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gpt2"},
        {"model_type": "bloom", "architectures": ["MdlBloomForCausalLM"]},
        {"model_type": "falcon", "alibi": False},
        {"model_type": "granite", "logits_scaling": 1.0},
        {"model_type": "phi3"},
        {},
    ],
)
def test_silent_elsewhere(config: dict[str, Any]) -> None:
    assert known_faults(config) == ()


@pytest.mark.parametrize("config", [{"attn_logit_softcapping": 50.0}, {"attention": {"softcap": 50.0}}])
def test_scores_that_are_no_numbers(config: dict[str, Any]) -> None:
    assert "88.7 times their cap of 50" in of_no_numbers(config, "AVX512")
    assert of_no_numbers(config, "AVX2") == ""
    assert of_no_numbers({"attention": {"bias": True}, "attn_logit_softcapping": None}, "AVX512") == ""


def test_one_implementation_s_fault_is_not_another_s() -> None:
    config = {"model_type": "granite", "logits_scaling": 8.0}

    assert known_faults(config, "vllm.model_executor.models.transformers.TransformersForCausalLM")
    assert not known_faults(config, "vllm.model_executor.models.granite.GraniteForCausalLM")


def test_what_mdl_evades_is_told_of_a_pass_too() -> None:
    assert known_faults({"model_type": "deepseek_v2"}, evaded=True)
    assert not known_faults({"model_type": "lfm2"}, evaded=True)


def test_a_death_of_vllm_is_put_beside_what_is_known() -> None:
    died = pytest.raises(MdlError, match=r"SIGSEGV\nvLLM itself is known to differ")
    with died as caught, naming_faults({"model_type": "jetmoe"}):
        raise machine_error("killed by SIGSEGV")
    assert caught.value.kind is Kind.MACHINE

    with pytest.raises(MdlError, match=r"^unusable$"), naming_faults({"model_type": "jetmoe"}):
        raise input_error("unusable")


# --- with vLLM ----------------------------------------------------------------------------------------------------

FALCON = {
    **{k: hf.SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "alibi": True,
    "bias": True,
    "max_position_embeddings": 512,
    **dict.fromkeys(("new_decoder_architecture", "multi_query", "parallel_attn"), False),
}
DEEPSEEK = {
    **{k: v for k, v in hf.SIZES.items() if k != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 96,
    "v_head_dim": 32,  # vLLM's kernel wants 512
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
GRANITE = {**{k: v for k, v in hf.SIZES.items() if k != "head_dim"}, "logits_scaling": 8.0}


def verified(name: str, fields: dict[str, Any], folder: Path, engine: Engine) -> Report:
    layout = make.layout(hf.checkpoint(folder / "in", name, **fields), folder / "out")
    return verify(layout, Settings(), engine=engine)


@pytest.mark.engine
def test_falcon_s_alibi_fails_and_is_named(tmp_path: Path, engine: Engine) -> None:
    report = verified("FalconForCausalLM", FALCON, tmp_path, engine)

    assert not report.ok
    assert [check.name for check in report.checks if check.ok is False] == ["prefill", "decode"]
    assert any("ALiBi" in note for note in report.notes)
    assert report.located is not None
    assert report.located.module == "transformer.h.0.self_attention"  # not its projections, which vLLM orders anew


@pytest.mark.engine
def test_deepseek_passes_and_the_remedy_is_told(tmp_path: Path, engine: Engine) -> None:
    report = verified("DeepseekV2ForCausalLM", DEEPSEEK, tmp_path, engine)

    assert report.ok
    assert any('"-rotary_embedding"' in note for note in report.notes)


@pytest.mark.engine
def test_where_rounding_alone_reaches_the_ceiling_nothing_alarms(tmp_path: Path, engine: Engine) -> None:
    """Granite's scores are not divided by the head size: attention is all or nothing, and float32 noise is large."""
    report = verified("GraniteForCausalLM", GRANITE, tmp_path, engine)

    assert report.ok
    assert report.notes == ()
    prefill = next(check for check in report.checks if check.name == "prefill")
    assert prefill.figures["floor"] > 1e-10
    assert "would not show" in prefill.detail[-1]
