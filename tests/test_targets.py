"""What archs/targets says about a class equals the class itself, built by transformers on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from mdl.archs import targets
from mdl.archs.decoder.reading import COMPOSED, HYBRID
from mdl.archs.served import COMPUTES, SERVED
from mdl.archs.targets import from_spec, known_classes
from mdl.convert.expected import expected_target, expected_tensors, from_class
from mdl.errors import Kind, MdlError

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_positions": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "tie_word_embeddings": True,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
MAMBA: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "expand": 2,
    "conv_kernel": 3,
    "time_step_rank": 5,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
}
MAMBA2: dict[str, Any] = {
    **{key: value for key, value in MAMBA.items() if key != "time_step_rank"},
    "architectures": ["Mamba2ForCausalLM"],
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 2,
}
_OTHER = {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}
_OLMOE: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "architectures": ["OlmoeForCausalLM"],
}

OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "max_position_embeddings": 24,
    "num_attention_heads": 4,
}

_BLOOM: dict[str, Any] = {
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "n_layer": 2,
    "n_head": 4,
}

_DBRX: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "vocab_size": 40,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 3, "moe_top_k": 2},
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": MAMBA,
    "mamba_biases": {**MAMBA, **_OTHER},
    "mamba_by_default": {
        key: MAMBA[key] for key in ("architectures", "vocab_size", "hidden_size", "num_hidden_layers")
    },
    "mamba2": MAMBA2,
    "mamba2_biases": {**MAMBA2, **_OTHER},
    "mamba2_by_default": {
        **{key: MAMBA2[key] for key in ("architectures", "vocab_size", "num_hidden_layers", "head_dim")},
        "hidden_size": 1024,
    },
    "gpt2_tied": GPT2,
    "gpt2_untied": {**GPT2, "tie_word_embeddings": False},
    "gpt2_narrow": {**GPT2, "n_inner": 24, "n_layer": 1},
    "llama_untied": LLAMA,
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "llama_attention_bias": {**LLAMA, "attention_bias": True},
    "llama_mlp_bias": {**LLAMA, "mlp_bias": True, "num_hidden_layers": 3},
    "llama_wide_heads": {**LLAMA, "head_dim": 16, "num_key_value_heads": 4},
    "llama_by_default": {
        k: v for k, v in LLAMA.items() if not k.endswith(("_bias", "_embeddings")) and k != "head_dim"
    },
    "llama_null_heads": {**LLAMA, "num_key_value_heads": None, "head_dim": None},
    "gpt2_by_default": {k: v for k, v in GPT2.items() if k not in ("n_inner", "tie_word_embeddings")},
    **{
        name: {**LLAMA, "architectures": [f"{name}ForCausalLM"]}
        for name in ("Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3", "Phi")
    },
    **{
        f"{name}_by_default": {
            **{k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads", "tie_word_embeddings")},
            "architectures": [f"{name}ForCausalLM"],
            "num_attention_heads": 32,
            "hidden_size": 64,
        }
        for name in (
            *("Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Mixtral", "Olmo", "Olmo2", "Olmo3"),
            *("GPTNeoX", "Phi"),
        )
    },
    "Qwen3_biases": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
    "Gemma_biases": {**LLAMA, "architectures": ["GemmaForCausalLM"], "attention_bias": True},
    "Gemma2_biases": {**LLAMA, "architectures": ["Gemma2ForCausalLM"], "attention_bias": True},
    **{
        f"{name}_biases": {**LLAMA, "architectures": [f"{name}ForCausalLM"], "attention_bias": True}
        for name in ("Gemma3", "Olmo", "Olmo2", "Olmo3", "GPTNeoX")
    },
    "GPTNeoX_tied": {**LLAMA, "architectures": ["GPTNeoXForCausalLM"], "tie_word_embeddings": True},
    "Phi_tied": {**LLAMA, "architectures": ["PhiForCausalLM"], "tie_word_embeddings": True, "qk_layernorm": True},
    "Mixtral": {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 3},
    "opt_by_default": OPT,
    "opt_untied": {**OPT, "tie_word_embeddings": False, "word_embed_proj_dim": None},
    "opt_350m": {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "opt_bare": {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False},
    "opt_no_last_norm": {**OPT, "_remove_final_layer_norm": True},
    "StableLm": {**_OLMOE, "architectures": ["StableLmForCausalLM"]},
    "StableLm_tied_biases": {
        **_OLMOE,
        "architectures": ["StableLmForCausalLM"],
        "use_qkv_bias": True,
        "tie_word_embeddings": True,
    },
    "Olmoe": {**_OLMOE, "num_experts": 3},
    "Olmoe_by_default": {k: v for k, v in _OLMOE.items() if k not in ("num_key_value_heads", "tie_word_embeddings")},
    "Olmoe_tied_biases": {**_OLMOE, "num_experts": 2, "tie_word_embeddings": True, "attention_bias": True},
    "Bloom": _BLOOM,
    "Bloom_untied": {**_BLOOM, "tie_word_embeddings": False, "num_hidden_layers": 3},
    "Bloom_of_2022": {"architectures": ["BloomForCausalLM"], "n_embed": 32, "n_layer": 1, "num_attention_heads": 4},
    "Bloom_by_default": {"architectures": ["BloomForCausalLM"]},
    "llama_one_key_head": {**LLAMA, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_says_what_the_class_has(name: str) -> None:
    config = CONFIGS[name]

    assert from_spec(config) == from_class(config)


def test_a_class_of_our_own_has_what_the_one_that_it_computes_has() -> None:
    configs: dict[str, dict[str, Any]] = {"BloomForCausalLM": _BLOOM, "DbrxForCausalLM": _DBRX}
    assert COMPUTES.keys() == SERVED.keys() - {COMPOSED, HYBRID}  # which tests/test_decoder.py holds to their twin
    for ours, name in COMPUTES.items():
        assert expected_target({**configs[name], "architectures": [ours]}) == from_class(configs[name])


def test_every_file_is_compared() -> None:
    assert {config["architectures"][0] for config in CONFIGS.values()} == set(known_classes())


def test_a_class_without_a_file_is_built() -> None:
    """Under the names of files: in memory transformers calls embed_out lm_head, and fuses the experts."""
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 32, "tie_word_embeddings": False}
    neox = from_class({**common, "architectures": ["GPTNeoXForCausalLM"]}).shapes
    experts = {"num_key_value_heads": 2, "num_local_experts": 2}
    mixtral = from_class({**common, **experts, "architectures": ["MixtralForCausalLM"]}).shapes
    starcoder = expected_tensors({**common, "num_key_value_heads": 2, "architectures": ["Starcoder2ForCausalLM"]})

    assert neox["embed_out.weight"] == (40, 16)
    assert neox["gpt_neox.layers.0.attention.query_key_value.weight"] == (48, 16)
    assert starcoder["model.layers.0.mlp.c_fc.weight"] == (32, 16)
    assert mixtral["model.layers.0.block_sparse_moe.experts.1.w2.weight"] == (16, 32)


def test_a_class_that_nobody_knows() -> None:
    with pytest.raises(MdlError, match="transformers has no class NoSuchModel") as caught:
        expected_tensors({"architectures": ["NoSuchModel"], "tie_word_embeddings": False})
    assert caught.value.kind is Kind.INPUT


def test_a_config_that_leaves_out_a_size() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "hidden_size"}

    with pytest.raises(MdlError, match="does not size LlamaForCausalLM: unknown size 'hidden_size'"):
        expected_tensors(config)


def test_patterns_with_two_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"ranges": {"i": "n", "e": "m"}, "tensors": {"a.{e}.{i}": ["n", 2], "b": []}}
    monkeypatch.setattr(targets, "_spec", {"M": spec}.get)

    got = from_spec({"architectures": ["M"], "n": 2, "m": 3})

    assert got is not None
    assert got.shapes == {f"a.{e}.{i}": (2, 2) for i in range(2) for e in range(3)} | {"b": ()}
