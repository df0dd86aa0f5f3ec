"""What mdl recognises and refuses: each on names as its own code writes them, and no family of mdl's among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.base import Inventory
from mdl.archs.refused import all_refused, recognised
from mdl.convert.expected import expected_tensors
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, prepare
from mdl.errors import Kind, MdlError

from . import checkpoints as make
from . import checkpoints_mistral as mistral
from . import gpts, lit, torchtune_cases
from .family import write_family
from .test_detect import OWN
from .test_targets import CONFIGS

_RWKV = ["emb.weight", "blocks.0.ln0.weight", "blocks.0.att.receptance.weight", "ln_out.weight", "head.weight"]
_LLAMA = ["tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight", "norm.weight"]
_NANOCHAT = ["resid_lambdas", "transformer.wte.weight", "transformer.h.0.attn.c_q.weight", "lm_head.weight"]
_HF = ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"]
_Q = "model.layers.0.self_attn.q_proj."
_HELD = "base_model.model.model.layers.0.self_attn.q_proj."

LAYOUTS: dict[str, list[list[str]]] = {
    "rwkv_4_5": [
        [*_RWKV, *(f"blocks.0.att.{x}" for x in ("time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r")),
         "blocks.0.ffn.time_mix_k", "blocks.0.ffn.time_mix_r"],
        [*_RWKV, *(f"blocks.0.att.{x}" for x in ("time_decay", "time_faaaa", "time_mix_k", "time_mix_g")),
         "blocks.0.att.gate.weight", "blocks.0.att.ln_x.weight", "blocks.0.ffn.time_mix_k"],
        ["rwkv.embeddings.weight", "rwkv.blocks.0.attention.time_decay", "rwkv.blocks.0.attention.time_mix_key"],
    ],
    "rwkv_6": [
        [*_RWKV, *(f"blocks.0.att.{x}" for x in ("time_decay", "time_faaaa", "time_maa_x", "time_maa_w1")),
         "blocks.0.ffn.time_maa_k", "blocks.0.ffn.receptance.weight"],
    ],
    "rwkv_7": [[*_RWKV, *(f"blocks.0.att.{x}" for x in ("x_r", "w0", "a1", "g2", "k_k", "r_k")), "blocks.0.ffn.x_k"]],
    "modded_nanogpt": [
        ["embed.weight", "bigram_embed.weight", "qk_bank", "vo_bank", "mlp_bank", "ve_gate_bank", "scalars"],
        ["embed.weight", "attn_bank", "mlp_bank", "attn_gate_bank", "x0_lambdas", "lm_head.weight"],
        ["embed.weight", "blocks.0.attn.qkvo_w", "blocks.0.mlp.c_fc", "value_embeds.0.weight", "scalars"],
        ["embed.weight", "blocks.1.attn.qkv_w", "blocks.1.attn.lambdas", "value_embeds.0.weight", "skip_weights"],
        ["embed.weight", "blocks.0.attn.c_q.weight", "blocks.0.lambdas", "value_embeds.embed.0.weight"],
        ["transformer.wte.weight", "transformer.h.0.attn.c_q.weight", "transformer.h.0.attn.lamb",
         "transformer.h.0.lambdas", "lm_head.weight"],
    ],
    "nanochat_experiment": [
        [*_NANOCHAT, "v0_lambdas", "value_embed_A.weight", "value_embed_B.weight"],
        [*_NANOCHAT, "v0_lambdas", "value_embeds.0.weight", "value_embeds.1.weight"],
        [*_NANOCHAT, "bigram_lambdas", "bigram_embed.embed.weight", "value_embeds.1.weight"],
    ],
    "ngpt": [
        ["sz", "transformer.wte.weight", "lm_head.weight", *(f"transformer.h.0.{x}" for x in (
            "attn_alpha", "mlp_alpha", "sqk", "suv", "query.weight", "att_c_proj.weight", "mlp_c_proj.weight"))],
    ],
    "flash_attn_gpt": [
        ["transformer.embeddings.word_embeddings.weight", "transformer.layers.0.mixer.Wqkv.weight",
         "transformer.layers.0.mlp.fc1.weight", "transformer.ln_f.weight", "lm_head.weight"],
    ],
    "phi_old": [
        ["layers.0.wte.weight", "layers.1.ln.weight", "layers.1.mixer.Wqkv.weight", "layers.25.linear.weight"],
        ["transformer.embd.wte.weight", "transformer.h.0.mixer.Wqkv.weight", "lm_head.ln.weight"],
    ],
    "openelm": [
        ["transformer.token_embeddings.weight", "transformer.layers.0.attn.qkv_proj.weight",
         "transformer.layers.0.ffn.proj_1.weight"],
    ],
    "bloom": [
        ["word_embeddings.weight", "word_embeddings.norm.weight", "word_embeddings.norm.bias"],
        ["language_model.embedding.word_embeddings.weight", "language_model.embedding.word_embeddings.norm.weight"],
    ],
    "mpt": [
        ["transformer.wte.weight", "transformer.blocks.0.norm_1.weight", "transformer.blocks.0.attn.Wqkv.weight",
         "transformer.blocks.0.ffn.up_proj.weight"],
        ["state.model.transformer.blocks.0.norm_1.weight", "state.model.transformer.blocks.0.attn.Wqkv.weight",
         "state.model.transformer.blocks.0.ffn.up_proj.weight"],
    ],
    "meta_quantised": [[*_LLAMA, "layers.0.attention.wq.scales", "layers.0.feed_forward.w1.scales", "output.scales"]],
    "gptq_awq": [[*_HF, _Q + "qweight", _Q + "qzeros", _Q + "scales", _Q + "g_idx"]],
    "bitsandbytes": [
        [*_HF, _Q + "weight", _Q + "weight.absmax", _Q + "weight.quant_map",
         _Q + "weight.quant_state.bitsandbytes__nf4"],
        [*_HF, _Q + "weight", _Q + "SCB"],
    ],
    "packed_weights": [
        [*_HF, _Q + "weight_packed", _Q + "weight_scale", _Q + "weight_shape"],
        [*_HF, _Q + "weight", _Q + "weight_scale", _Q + "input_scale"],
    ],
    "float8_blocks": [[*_HF, _Q + "weight", _Q + "weight_scale_inv"]],
    "gpt_fast_quantised": [
        ["tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.attention.wqkv.scales_and_zeros"],
    ],
    "torch_quantised": [[*_HF, "model.layers.0.self_attn.q_proj._packed_params.dtype"]],
    "multimodal": [
        ["vision_model.vision_encoder.conv1._linear.weight", "text_model.tok_embeddings.weight"],
        [*_LLAMA, "vision_encoder.patch_conv.weight", "vision_language_adapter.w_in.weight"],
        [*_LLAMA, "vision_embeddings.vision_encoder.class_embedding", "vision_projection.weight"],
        [*_HF, "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight", "model.mm_projector.0.weight"],
        ["language_model.model.norm.weight", "vision_tower.x.weight", "multi_modal_projector.linear_1.weight"],
        [*_HF, "audio_tower.conv1.weight"],
        ["encoder.clip.conv.weight", "decoder.tok_embeddings.weight", "decoder.layers.0.attn.q_proj.weight"],
    ],
    "encoder_decoder": [
        ["encoder.conv1.weight", "encoder.blocks.0.attn.query.weight", "decoder.blocks.0.cross_attn.query.weight"],
        ["model.encoder.conv1.weight", "model.decoder.layers.0.encoder_attn.q_proj.weight"],
        ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
         "decoder.block.0.layer.1.EncDecAttention.q.weight"],
    ],
    "lora": [
        ["transformer.wte.weight", "transformer.h.0.attn.attn.lora_A", "transformer.h.0.attn.attn.lora_B"],
        ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
        [*_HF, _Q + "base_layer.weight", _Q + "lora_A.default.weight", _Q + "lora_B.default.weight"],
        [*_HF, "model.embed_tokens.lora_embedding_A.default", "model.embed_tokens.lora_embedding_B.default"],
        [*_LLAMA, "layers.0.attention.wq.adaptor.A.weight", "layers.0.attention.wq.adaptor.B.weight"],
    ],
    "parametrized": [
        ["embed.weight", "lin.parametrizations.weight.original0", "lin.parametrizations.weight.original1"],
        ["lin.parametrizations.weight.original", "lin.parametrizations.weight.0._u"],
    ],
    "weight_norm": [
        ["embed.weight", "lin.weight_g", "lin.weight_v", "lin.bias"],
        ["lin.weight_orig", "lin.weight_u", "lin.weight_v"],
        ["embed.weight", "lin.weight_g"],
        ["embed.weight", "lin.weight_v"],
        ["embed.weight", "lin.weight_orig"],
        ["embed.weight", "lin.weight", "lin.weight_mask"],
    ],
    "adapter": [
        ["base_model.model.score.modules_to_save.weight", "base_model.model.prompt_encoder.default.embedding.weight"],
        [_HELD + "ia3_l"],
        [_HELD + "oft_R.weight"],
        [_HELD + "oft_r"],
        [_HELD + "boft_R", _HELD + "boft_s"],
        [_HELD + "hada_w1_a", _HELD + "hada_w1_b"],
        [_HELD + "lokr_w1", _HELD + "lokr_w2"],
        ["base_model.vera_A", "base_model.vera_B", _HELD + "vera_lambda_b", _HELD + "vera_lambda_d"],
        ["base_model.model.model.embed_tokens.weight", _HELD + "base_layer.weight", _HELD + "oft_R.default.weight"],
        [*_HF, _Q + "base_layer.weight", _Q + "hada_w1_a.default", _Q + "hada_w1_b.default"],
        ["prompt_embeddings"],
        ["word_embeddings.weight", *(f"base_model.{name}" for name in _HF), "prompt_encoder.default.embedding.weight"],
    ],
}  # fmt: skip
SCALED = {"SCB": torch.int8, "weight_scale": torch.float8_e4m3fn, "weight_scale_inv": torch.float8_e4m3fn}
"""What gives a quantised matrix away, and of which type that matrix then is."""


def of(names: list[str], folder: Path, **beside: Any) -> Path:
    """A file of tensors with these names, with keys beside its state dict."""
    held = {name: torch.ones(2, 2) for name in names}
    for scale, dtype in SCALED.items():
        if _Q + scale in held and _Q + "weight" in held:
            held[_Q + "weight"] = held[_Q + "weight"].to(dtype)
    return gpts.saved(folder / "x.pt", {"model": held, **beside})


def kinds(inventory: Inventory) -> list[str]:
    return [kind.name for kind, _ in recognised(inventory)]


def test_every_entry_is_tested_and_says_all() -> None:
    assert {kind.name for kind in all_refused()} == {*LAYOUTS, "nanotron"}
    for kind in all_refused():
        assert all((kind.title, kind.source, kind.reason, kind.do, kind.evidence))
        assert not kind.do.endswith(".")
        assert all(each.tensors or each.every or each.beside or each.files for each in kind.evidence)


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, known in LAYOUTS.items() for n in range(len(known))])
def test_names_of_a_layout_are_recognised_and_refused(name: str, number: int, tmp_path: Path) -> None:
    path = of(LAYOUTS[name][number], tmp_path)
    entry = next(kind for kind in all_refused() if kind.name == name)

    assert kinds(take_inventory(open_checkpoint(path))) == [name]
    for options in (Options(), Options(arch="nanogpt")):
        with pytest.raises(MdlError) as caught:
            prepare(path, options)
        assert caught.value.kind is Kind.INPUT
        assert [(p.where, p.do) for p in caught.value.problems] == [(str(path), entry.do)]
        assert caught.value.problems[0].what.startswith(f"this is {entry.title} ({entry.source}), by ")
        assert caught.value.problems[0].what.endswith(entry.reason)


def test_every_alternative_is_what_some_layout_needs() -> None:
    """None is there that no names were ever held against, but those that look at what lies beside."""
    for kind in all_refused():
        for evidence in kind.evidence:
            patterns = (*evidence.tensors, *evidence.every)
            if patterns and not evidence.beside:
                alone = [n for names in LAYOUTS[kind.name] if _holds(patterns, names) for n in names]
                assert alone, (kind.name, evidence)


def _holds(patterns: tuple[str, ...], names: list[str]) -> bool:
    words = [{word for word in pattern.split(".") if "*" not in word} for pattern in patterns]
    return all(any(w <= set(name.split(".")) for name in names) for w in words)


@pytest.mark.parametrize("name", OWN)
def test_no_family_is_taken_for_one(name: str, tmp_path: Path) -> None:
    assert not kinds(take_inventory(open_checkpoint(OWN[name][1](tmp_path))))


OTHERS: dict[str, list[str]] = {
    **{f"torchtune {name}": list(torchtune_cases.state(case)) for name, case in torchtune_cases.CASES.items()},
    **{f"litgpt {row}": list(lit.shapes(lit.fields(row))) for row in lit.ROWS},
    **{f"the class of {name}": list(expected_tensors(config)) for name, config in CONFIGS.items()},
    "mistral": list(mistral.shapes(mistral.SIZES)),
    "mixtral": list(mistral.shapes({**mistral.SIZES, "moe": mistral.MOE})),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_names_are_either(name: str) -> None:
    assert not kinds(Inventory("x", dict.fromkeys(OTHERS[name], ())))


def test_what_lies_beside_tells_too(tmp_path: Path) -> None:
    state = make.llama_state()
    folder = make.meta(tmp_path / "a", state, make.params(state, quantization_args={"group_size": 32}))
    record = of(["transformer.wte.weight", "transformer.h.0.attn.c_q.weight"], tmp_path, code="x", step=5)

    assert kinds(take_inventory(open_checkpoint(folder))) == ["meta_quantised"]
    assert kinds(take_inventory(open_checkpoint(record))) == ["modded_nanogpt"]


def test_an_adapter_is_never_left_out_in_silence(tmp_path: Path) -> None:
    """Neither alone in its folder, nor beside the model that it belongs to."""
    gpts.saved(tmp_path / "adapter_model.bin", {_HELD + "lora_A.weight": torch.ones(2, 2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))

    with pytest.raises(MdlError, match=r"an adapter of PEFT.*--merge-lora ADAPTER") as caught:
        prepare(tmp_path)
    assert len(caught.value.problems) == 2  # and its tensors are LoRA's
    make.nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(MdlError, match=r"several checkpoints: adapter_model\.bin, ckpt\.pt"):
        prepare(tmp_path)
    with pytest.raises(MdlError, match=r"by adapter_config\.peft_type.*a folder of its own"):
        prepare(tmp_path / "ckpt.pt")


def test_lora_is_called_lora_however_it_was_wrapped() -> None:
    """What is to be done of it differs: --merge-lora knows it."""
    whole = ["base_model.model.lm_head.weight", _HELD + "base_layer.weight", _HELD + "lora_A.default.weight"]
    for names in (whole, [_HELD + "lora_A.weight", _HELD + "lora_B.weight"]):
        assert kinds(Inventory("x", dict.fromkeys(names, ()))) == ["lora"]


def test_a_model_of_ones_own_may_have_a_base_model_in_it() -> None:
    names = ["base_model.model.embed.weight", "base_model.model.layers.0.weight", "head.weight"]
    assert not kinds(Inventory("x", dict.fromkeys(names, ())))


@pytest.mark.parametrize("scale", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_beside_a_weight_that_is_not_quantised_is_the_models_own(
    scale: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    own = {"lin.weight": torch.ones(2, 2, dtype=dtype), f"lin.{scale}": torch.ones(2), scale: torch.ones(1)}
    path = gpts.saved(tmp_path / "own.pt", {**own, "weight": torch.ones(2, dtype=dtype)})
    assert not kinds(take_inventory(open_checkpoint(path)))

    path = gpts.saved(tmp_path / "packed.pt", {**own, "lin.weight": torch.ones(2, 2).to(SCALED[scale])})
    assert kinds(take_inventory(open_checkpoint(path)))


def test_several_reasons_are_told_together(tmp_path: Path) -> None:
    path = of([*_LLAMA, *(f"layers.0.{x}" for x in (
        "attention.wq.scales", "feed_forward.w1.scales", "attention.wq.adaptor.A.weight"))], tmp_path)  # fmt: skip

    assert kinds(take_inventory(open_checkpoint(path))) == ["meta_quantised", "lora"]


def test_a_family_of_ones_own_is_believed(tmp_path: Path) -> None:
    """It may bring what vLLM lacks; its mapping still accounts for every tensor."""
    path = of(["w", *LAYOUTS["rwkv_7"][0]], tmp_path)
    own = write_family(tmp_path / "own", "keep: [w]", name="rwkv_of_mine")

    with pytest.raises(MdlError) as caught:
        prepare(path, Options(arch=str(own)))
    assert "this is RWKV" not in str(caught.value)


def test_folders_in_which_no_weights_are_found(tmp_path: Path) -> None:
    (tmp_path / "model" / "model").mkdir(parents=True)
    for name in ("checkpoint_metadata.json", "model_config.json"):
        (tmp_path / name).write_text("{}")

    with pytest.raises(MdlError, match=r"a checkpoint folder of nanotron's.*convert_nanotron_to_hf"):
        prepare(tmp_path)
    (tmp_path / "model_config.json").unlink()
    with pytest.raises(MdlError, match="holds no checkpoint; it has the folders model"):
        prepare(tmp_path)


def test_torchscript_is_called_by_its_name(tmp_path: Path) -> None:
    traced: Any = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    traced.save(str(tmp_path / "x.pt"))

    with pytest.raises(
        MdlError, match=r"a TorchScript archive.*torch\.jit\.load\(path, map_location='cpu'\)\.state_dict"
    ):
        prepare(tmp_path / "x.pt")
