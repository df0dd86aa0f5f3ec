"""Which class of transformers and vLLM the arguments of a Megatron-LM run describe, and that class's config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..base import Dims, Measure, Value
from ..llama_meta import rope_parameters
from ..nanogpt import gpt2_sizes
from .choosing import Unsupported, first, refuse_settings

UNSUPPORTED: Unsupported = {
    "multi_latent_attention": ((None, False), "multi-head latent attention"),
    "use_mup": ((None, False), "µP's multipliers of embedding, scores and logits"),
    "apply_layernorm_1p": ((None, False), "norms whose weights are stored less 1"),
    "apply_residual_connection_post_layernorm": ((None, False), "residuals taken behind the norm"),
    "window_size": ((None,), "a sliding window"),
    "squared_relu": ((None, False), "squared ReLU"),
    "quick_geglu": ((None, False), "quick GEGLU"),
    "qk_l2_norm": ((None, False), "q and k normed without weights"),
    "softmax_type": ((None, "vanilla"), "another softmax"),
    "attention_output_gate": ((None, False), "gated attention"),
    "no_rope_freq": ((None,), "layers without rotary positions"),
    "mtp_num_layers": ((None, 0), "multi-token prediction"),
    "is_hybrid_model": ((None, False), "Mamba layers"),
    "glu_linear_offset": ((None, 0, 0.0), "gates that are added to"),
    "activation_func_clamp_value": ((None,), "activations that are clamped"),
}
"""Arguments that change what the model computes, the values that leave it as it is, and what others mean."""
BRIDGE = "NVIDIA's Megatron-Bridge exports it, if transformers has a class for it; vLLM serves what it writes as it is"
OVERRULE = f"if the arguments are wrong, overrule them with --set; if not, {BRIDGE}"
"""The nearest ways out."""
_LLAMA_LIKE = ("Llama", "Qwen2", "Qwen3")
_MODEL_TYPES = {"GPTNeoX": "gpt_neox", "GPT2": "gpt2"}


def choose(m: Measure, said: Mapping[str, Any]) -> None:
    """Settle ``target``, or report why no class will do."""
    unsupported = {**UNSUPPORTED, "num_experts": ((None, 0), "experts")}
    refuse_settings(m, "args", said, unsupported, "which this family does not carry over", BRIDGE)
    if m["norm"] == "RMSNorm":
        name, reason = _like_llama(m)
    else:
        name = "GPT2" if m["position"] == "learned_absolute" else "GPTNeoX"
        reason = _with_layernorm(m, name)
    if reason:
        m.problem(f"{name} describes it but for this: {reason}", do=OVERRULE)
    why = f"{m['norm']}, {m['position']} positions, {'a gated' if m['gated'] else 'a plain'} MLP, and the biases"
    m.accept("target", name, why)


def settle(
    m: Measure,
    said: Mapping[str, Any],
    decide: Iterable[str],
    choose: Callable[[Measure, Mapping[str, Any]], None],
    flags: Callable[[Measure], Mapping[str, Value]],
) -> None:
    """The target class and what the mapping asks for, unless something that decides has to be asked for first."""
    if all(m[name] is not None for name in decide):
        choose(m, said)
        for name, value in flags(m).items():
            m.accept(name, value, f"what the mapping does for {m['target']}")


def _like_llama(m: Measure) -> tuple[str, str]:
    name = "Qwen3" if m["qk_norm"] else "Qwen2" if m["qkv_bias"] and not m["linear_bias"] else "Llama"
    return name, first(
        (m["position"] != "rope", f"{m['position']} positions with RMSNorm"),
        (not m["gated"], "RMSNorm with an MLP that has no gate"),
        (m["rotary_percent"] != 1.0, f"rotary_percent {m['rotary_percent']}"),
        (name == "Qwen3" and (m["qkv_bias"] or m["linear_bias"]), "biases beside normed q and k"),
        (name == "Llama" and m["qkv_bias"] != m["linear_bias"], "biases of some matrices only"),
    )


def _with_layernorm(m: Measure, name: str) -> str:
    heads, size, hidden = m["heads"], m["head_dim"], m["hidden"]
    whole = isinstance(heads, int) and isinstance(size, int) and heads * size == hidden
    return first(
        (m["position"] not in ("learned_absolute", "rope"), f"{m['position']} positions"),
        (m["gated"], "LayerNorm with a gated MLP"),
        (not m["qkv_bias"] or not m["linear_bias"], "matrices without biases"),
        (m["kv_heads"] != heads, "query heads that share key heads"),
        (m["qk_norm"], "normed q and k"),
        (not whole, f"{heads} heads of {size} channels are not the width, {hidden}"),
        (m["interleaved"] and name == "GPTNeoX", "a rotation of neighbouring pairs (rotary_interleaved)"),
    )


def flags(m: Measure) -> dict[str, bool]:
    """What the mapping's ``when`` asks."""
    name, pairs = str(m["target"]), bool(m["interleaved"])
    like_llama, gpt2, neox = name in _LLAMA_LIKE, name == "GPT2", name == "GPTNeoX"
    biases, fused = like_llama and m["qkv_bias"] is True, m["fused_norms"] is True
    return {
        "like_llama": like_llama,
        "llama_halves": like_llama and not pairs,
        "llama_pairs": like_llama and pairs,
        "llama_bias_halves": biases and not pairs,
        "llama_bias_pairs": biases and pairs,
        "llama_linear_bias": like_llama and m["linear_bias"] is True,
        "qk_norm_halves": name == "Qwen3" and not pairs,
        "qk_norm_pairs": name == "Qwen3" and pairs,
        "llama_norms": like_llama and not fused,
        "llama_fused_norms": like_llama and fused,
        "gpt2": gpt2,
        "gpt2_norms": gpt2 and not fused,
        "gpt2_fused_norms": gpt2 and fused,
        "neox": neox,
        "neox_norms": neox and not fused,
        "neox_fused_norms": neox and fused,
    }


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class that ``target`` names."""
    name = str(d["target"])
    common = {
        "architectures": ["GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"],
        "model_type": _MODEL_TYPES.get(name, name.lower()),
        "vocab_size": d["vocab"],
        "tie_word_embeddings": d["tied"],
    }
    return common | (gpt2_sizes(d) if name == "GPT2" else _neox(d) if name == "GPTNeoX" else _llama(d, name))


def rotary_sizes(d: Dims) -> dict[str, Any]:
    """The fields that all classes with rotary positions have in common."""
    return {
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "max_position_embeddings": d["context"],
        "rope_parameters": _rope(d),
        "attention_dropout": 0.0,
    }


def _rope(d: Dims) -> dict[str, Any]:
    share = {"partial_rotary_factor": d["rotary_percent"]} if d["target"] == "GPTNeoX" else {}
    return rope_parameters(d) | share


def _neox(d: Dims) -> dict[str, Any]:
    return {
        **rotary_sizes(d),
        "hidden_act": d["activation"],
        "layer_norm_eps": d["norm_eps"],
        "use_parallel_residual": False,
        "attention_bias": True,
    }


def _llama(d: Dims, name: str) -> dict[str, Any]:
    fields = {
        **rotary_sizes(d),
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "rms_norm_eps": d["norm_eps"],
        "hidden_act": "silu",
    }
    if name == "Qwen2":  # its q, k and v have a bias always, and nothing else has
        return fields
    if name == "Llama":
        fields["mlp_bias"] = d["linear_bias"]
    return {**fields, "attention_bias": name == "Llama" and d["linear_bias"]}
