"""Hugging Face layouts: written by transformers, carried over as they are, and verified against its own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl.archs.base import Dim
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.mutate import run_mutations
from mdl.validate.reference import builtin_reference
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import hf
from ..converted import layout


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM", "GPTNeoXForCausalLM"])
def test_the_same_tensors_under_the_same_names(name: str, tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", name)

    prepared = layout(source, tmp_path / "out")

    assert prepared.arch.name == "huggingface"
    assert prepared.target == name
    make.same(make.saved(tmp_path / "out"), load_file(source / "model.safetensors"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {k: v for k, v in before.items() if k != "transformers_version" and after.get(k) != v} == {}


def test_shards_and_an_index_are_one_model(tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", "LlamaForCausalLM", max_shard_size="500KB")
    assert (source / "model.safetensors.index.json").is_file()

    layout(source, tmp_path / "out")

    make.same(make.saved(tmp_path / "out"), dict(hf.model("LlamaForCausalLM").state_dict()))


@pytest.mark.parametrize(("name", "prefix"), [("Gemma2ForCausalLM", "model."), ("GPT2LMHeadModel", "transformer.")])
def test_a_base_model_without_its_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    source = hf.pickled(tmp_path / "in", name, drop=prefix)

    prepared = layout(source, tmp_path / "out")

    assert f"put {prefix} before the tensor names, as the class has it" in prepared.inventory.notes
    export(tmp_path / "out", tmp_path / "back.bin")
    raw = torch.load(source / "pytorch_model.bin", weights_only=True)
    make.same(torch.load(tmp_path / "back.bin", weights_only=True), raw)


def test_a_prefix_that_all_tensors_share_is_the_class_s_own(tmp_path: Path) -> None:
    """With a tied head every tensor begins with model., which elsewhere is an outer module's attribute."""
    source = hf.checkpoint(tmp_path / "in", "LlamaForCausalLM", tie_word_embeddings=True)

    prepared = layout(source, tmp_path / "out")

    assert not any("model." in note for note in prepared.inventory.notes)
    make.same(make.saved(tmp_path / "out"), load_file(source / "model.safetensors"))


@pytest.mark.parametrize("field", ["tie_word_embeddings", "head_dim", "num_key_value_heads"])
def test_what_config_json_leaves_out_is_the_class_s_default(field: str, tmp_path: Path) -> None:
    defaults: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4}
    fields: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 32, **defaults}
    source = hf.edit(hf.checkpoint(tmp_path / "in", "Gemma2ForCausalLM", **fields), **{field: ...})

    prepared = prepare(source)

    assert prepared.plan.problems == ()
    said = {"tie_word_embeddings": "tied", "num_key_value_heads": "kv_heads"}.get(field, field)
    assert prepared.dims[said] == defaults[field]
    assert "by default" in prepared.dims.entries[said].because


def test_token_ids_and_sampling_settings_come_along(tmp_path: Path) -> None:
    source = hf.edit(hf.checkpoint(tmp_path / "in", "LlamaForCausalLM"), eos_token_id=[7, 9], bos_token_id=1)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')

    layout(source, tmp_path / "out")

    config, generation = (json.loads((tmp_path / f"out/{n}.json").read_text()) for n in ("config", "generation_config"))
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([7, 9], 1, None)
    assert (generation["eos_token_id"], generation["temperature"]) == ([7, 9], 0.6)


def test_a_field_can_be_overruled(tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", "MistralForCausalLM")

    prepared = prepare(source, Options(given={"sliding_window": "null", "rms_norm_eps": "1e-5"}))

    assert (prepared.config["sliding_window"], prepared.config["rms_norm_eps"]) == (None, 1e-5)
    assert prepared.dims.entries["rms_norm_eps"].source == "user"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, r"the weights are quantised \(gptq\)"),
    "images": ({"vision_config": {}}, "not a text-only decoder"),
    "no head": ({"architectures": ["LlamaModel"]}, "LlamaModel is not a class that generates text"),
    "unknown": ({"architectures": ["NobodysForCausalLM"]}, "transformers has no class NobodysForCausalLM"),
    "another size": ({"intermediate_size": 161}, r"gate_proj.weight would be \[160, 128\], the target class has \[161"),
    "no size": ({"vocab_size": ...}, "config.json gives no vocab_size"),
    "a name of ours": ({"context": 3}, "config.json has the field context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    fields, phrase = REFUSED[case]
    source = hf.edit(hf.checkpoint(tmp_path / "in", "LlamaForCausalLM"), **fields)

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(source).plan.refuse()

    assert caught.value.kind is Kind.INPUT


def test_a_head_that_config_json_calls_tied_but_is_not(tmp_path: Path) -> None:
    source = hf.edit(hf.checkpoint(tmp_path / "in", "LlamaForCausalLM"), tie_word_embeddings=True)

    with pytest.raises(MdlError, match=r"tie_word_embeddings: True, but lm_head.weight and .* differ"):
        prepare(source)
    assert prepare(source, Options(given={"tie_word_embeddings": "false"})).plan.problems == ()


def test_set_tied_overrules_config_json(tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", "LlamaForCausalLM", tie_word_embeddings=True)
    state = load_file(source / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    assert prepare(source).config["tie_word_embeddings"] is True

    apart = prepare(source, Options(given={"tied": "false"}))
    assert apart.dims.entries["tied"] == Dim(False, "user", "--set tied=false")
    assert apart.config["tie_word_embeddings"] is False
    assert not apart.plan.problems
    assert "lm_head.weight" in [name for step in apart.plan.writes for name in step.targets]
    both = [builtin_reference(p.arch, p.dims, p.plan).logits([1, 2, 3], "float64") for p in (apart, prepare(source))]
    assert torch.equal(*both)

    hf.edit(source, tie_word_embeddings=False)
    assert prepare(source, Options(given={"tied": "true"})).config["tie_word_embeddings"] is True


def test_a_tied_head_that_was_saved_twice_is_written_once(tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", "LlamaForCausalLM", tie_word_embeddings=True)
    state = load_file(source / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, source / "model.safetensors")

    layout(source, tmp_path / "out")

    make.same(make.saved(tmp_path / "out"), state)


def test_buffers_that_old_releases_saved_are_dropped_with_a_reason(tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", "LlamaForCausalLM")
    state = load_file(source / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(3)}
    save_file({**state, **buffers}, source / "model.safetensors")

    prepared = layout(source, tmp_path / "out")

    assert {s.sources[0].name: s.reason for s in prepared.plan.steps if s.kind == "drop"} == dict.fromkeys(
        buffers, "rotary frequencies"
    )
    make.same(make.saved(tmp_path / "out"), state)


@pytest.mark.parametrize("name", hf.CLASSES)
def test_the_reference_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    prepared = prepare(hf.checkpoint(tmp_path / "in", name))
    ids = list(range(3, 90))

    reference = builtin_reference(prepared.arch, prepared.dims, prepared.plan)
    with torch.inference_mode():
        model = hf.model(name)
        model.set_attn_implementation("eager")  # the default one leaves Gemma 2's cap on the scores out
        want = model(torch.tensor([ids])).logits[0]

    single, exact = reference.logits(ids, "float32").clone(), reference.logits(ids, "float64")
    assert (single - want).abs().max() < 1e-4 * want.std()
    assert 1e-16 < float((single.double() - exact).square().mean() / exact.var()) < 1e-10


def test_the_float64_run_casts_nothing_to_float32(tmp_path: Path) -> None:
    """A norm that names float32 would leave an error of 1e-15 in what is called exact."""
    prepared = prepare(hf.checkpoint(tmp_path / "in", "LlamaForCausalLM"))
    reference = builtin_reference(prepared.arch, prepared.dims, prepared.plan)
    seen: set[torch.dtype] = set()

    def note(_module: Any, _args: Any, out: Any) -> None:
        out = out if isinstance(out, torch.Tensor) else next((o for o in out if isinstance(o, torch.Tensor)), None)
        seen.update([] if out is None else [out.dtype])

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    reference.logits([1, 2, 3], "float64")
    handle.remove()

    assert seen == {torch.float64}


# --- with vLLM ---------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM"])  # the others are rows of tests/cases.py
def test_vllm_computes_what_transformers_computes(name: str, tmp_path: Path, engine: Engine) -> None:
    layout(hf.checkpoint(tmp_path / "in", name), tmp_path / "out")

    report = verify(tmp_path / "out", Settings(), engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]


MISTAKES: dict[str, dict[str, tuple[str, str]]] = {
    "Qwen3ForCausalLM": {"qk-norms": ("model.layers.0.self_attn", "q_norm.weight")},
    "Gemma2ForCausalLM": {
        "window-longer": ("model.layers.0.self_attn", "config.json: sliding_window"),
        "softcap-attention": ("model.layers.0.self_attn", "config.json: attn_logit_softcapping"),
        "softcap-logits": ("", "config.json: final_logit_softcapping"),
    },
    "MixtralForCausalLM": {
        "experts": ("model.layers.1", "makes model.layers.1.block_sparse_moe.experts.0.w1.weight"),
        "experts-top-k": ("model.layers.0", "config.json: num_experts_per_tok"),
    },
}
"""Class → mistake → the module and the cause that have to be named: mistakes that the other families can't have."""


@pytest.mark.engine
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_with_windows_caps_norms_and_experts_are_killed_and_located(
    name: str, tmp_path: Path, engine: Engine
) -> None:
    layout(hf.checkpoint(tmp_path / "in", name), tmp_path / "out")

    found = run_mutations(tmp_path / "out", engine=engine, names=list(MISTAKES[name]), controls=False, locate=True)

    assert found.ok, found.verdict
    assert not [row.name for row in found.rows if row.skipped]
    for row in found.rows:
        module, cause = MISTAKES[name][row.name]
        assert {"prefill", "decode"} <= set(row.killed_by), row
        assert row.located is not None, row
        assert row.located[0] == module, row
        assert cause in row.located[1], row
