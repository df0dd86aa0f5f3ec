"""Which class of transformers and vLLM a litgpt Config describes, and that class's config.json.

The fields decide, as they decide what litgpt's GPT computes (litgpt/model.py); its ``name`` only where litgpt itself
reads it: norms multiply by 1 + weight where the name holds "Gemma", and have no weights where it holds "OLMo".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base import Dims, Measure, Value
from ..llama_meta import rope_parameters
from .choosing import Unsupported, first, refuse_settings

_UNSUPPORTED: Unsupported = {
    "latent_attention": ((None,), "multi-head latent attention (DeepSeek)"),
    "n_expert_groups": ((None,), "experts in groups (DeepSeek)"),
    "n_shared_expert": ((None, 0), "shared experts (DeepSeek)"),
    "first_k_dense_replace": ((None, 0), "dense layers before the experts (DeepSeek)"),
    "routed_scaling_factor": ((None, 1, 1.0), "scaled experts (DeepSeek)"),
    "rope_interleave": ((None, False), "rotation of neighbouring pairs (DeepSeek)"),
}
_MIXTURES = {"Mixtral", "Qwen3Moe"}
_LLAMA_LIKE = {"Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "StableLm", *_MIXTURES}
_LAYERNORM = {"GPTNeoX", "Phi", "StableLm", "Falcon"}
_PARTIAL = {"GPTNeoX", "Phi", "StableLm"}
_MODEL_TYPES = {"Gemma3": "gemma3_text", "GPTNeoX": "gpt_neox", "Qwen3Moe": "qwen3_moe"}


def choose(m: Measure, config: Mapping[str, Any]) -> None:
    """Settle ``target``, or report why no class will do."""
    refuse_settings(m, "model_config", config, _UNSUPPORTED, "which this family does not carry over")
    if m["norm"] == "LayerNorm":
        name, reason = _with_layernorm(m)
    elif m["mlp"] == "GemmaMLP":
        name, reason = _gemma(m)
    else:
        name, reason = _like_llama(m)
    if reason:
        do = "its fields say so; if they are wrong, mend model_config.yaml"
        m.problem(f"{name} describes it but for this: {reason}" if name else f"no class for this: {reason}", do=do)
    m.accept("target", name, ", ".join(str(m[k]) for k in ("norm", "mlp")) + " and the fields above")


def _windowed(m: Measure) -> bool:
    return any(_list(m["sliding_layers"]))


def _list(value: Value) -> list[Any]:
    return value if isinstance(value, list) else []


def _even(rotary: Value, size: Value) -> bool:
    return isinstance(rotary, int) and isinstance(size, int) and 0 < rotary <= size and rotary % 2 == 0


def _plain(m: Measure) -> bool:
    """Whether it has something that no class with LayerNorm has."""
    found = (m["attention_softcap"], m["logit_softcap"], m["scale_embeddings"], m["norm_qk"], _windowed(m))
    return any(bool(one) for one in found)


def _stablelm(m: Measure) -> tuple[str, str]:
    return "StableLm", first(
        (m["bias"] or m["lm_head_bias"], "biases outside norms, q, k and v"),
        (m["parallel_residual"] or m["shared_attention_norm"], "attention and MLP side by side"),
        (m["post_attention_norm"] or m["post_mlp_norm"] or not m["norm_1"] or not m["norm_2"], "norms in other places"),
        (not _even(m["rotary"], m["head_dim"]), f"a rotation of {m['rotary']} of {m['head_dim']} channels"),
        (_plain(m), "softcaps, scaled embeddings, normed q and k or windows"),
        (m["attention_scalar"] != m["head_dim"], "attention_scores_scalar"),
        (not _divides(m), "heads that are not the width divided by their number"),
    )


def _falcon(m: Measure) -> tuple[str, str]:
    ffn, hidden, shared = m["ffn"], m["hidden"], m["shared_attention_norm"]
    return "Falcon", first(
        ("OLMo" in str(m["name"]), "litgpt's norms have no weights where the name holds OLMo"),
        (m["lm_head_bias"], "a head with a bias"),
        (not m["parallel_residual"], "attention and MLP one after the other"),
        (m["post_attention_norm"] or m["post_mlp_norm"] or not m["norm_1"], "norms in other places"),
        (not shared and not m["norm_2"], "no norm_2"),
        (shared and m["kv_heads"] != 1, "a shared norm with several key heads"),
        (m["rotary"] != m["head_dim"], f"a rotation of {m['rotary']} of {m['head_dim']} channels"),
        (_plain(m), "softcaps, scaled embeddings, normed q and k or windows"),
        (m["attention_scalar"] != m["head_dim"], "attention_scores_scalar"),
        (not _divides(m), "heads that are not the width divided by their number"),
        (not (isinstance(hidden, int) and ffn == 4 * hidden), "an MLP that is not four times as wide"),
        (m["gelu_approximate"] != "none", "GELU by the tanh approximation"),
    )


def _divides(m: Measure) -> bool:
    heads, size = m["heads"], m["head_dim"]
    return isinstance(heads, int) and isinstance(size, int) and heads * size == m["hidden"]


def _with_layernorm(m: Measure) -> tuple[str, str]:
    if m["mlp"] == "LLaMAMLP" and "OLMo" not in str(m["name"]):
        return _stablelm(m)
    if m["mlp"] == "GptNeoxMLP" and not m["bias"] and not m["qkv_bias"]:
        return _falcon(m)
    name = "Phi" if m["shared_attention_norm"] else "GPTNeoX"
    return name, first(
        ("OLMo" in str(m["name"]), "litgpt's norms have no weights where the name holds OLMo"),
        (m["mlp"] != "GptNeoxMLP", f"LayerNorm with {m['mlp']}"),
        (not m["bias"] or not m["qkv_bias"], "biases in some matrices only"),
        (m["post_attention_norm"] or m["post_mlp_norm"] or not m["norm_1"], "norms in other places"),
        (not _even(m["rotary"], m["head_dim"]), f"a rotation of {m['rotary']} of {m['head_dim']} channels"),
        (_plain(m), "softcaps, scaled embeddings, normed q and k or windows"),
        (m["attention_scalar"] != m["head_dim"], "attention_scores_scalar"),
        (name == "Phi" and not m["parallel_residual"], "a shared norm without parallel_residual"),
        (name == "Phi" and not m["lm_head_bias"], "a shared norm with a head that has no bias"),
        (name == "GPTNeoX" and m["lm_head_bias"], "a head with a bias"),
        (name == "GPTNeoX" and m["heads"] != m["kv_heads"], "query heads that share key heads"),
        (name == "GPTNeoX" and not m["norm_2"], "no norm_2"),
    )


def _rms(m: Measure, offset: bool) -> tuple[tuple[object, str], ...]:
    """What no class with RMSNorm has. ``offset`` is whether the class multiplies by 1 + weight."""
    named = "Gemma" in str(m["name"])
    return (
        (m["mlp"] == "GptNeoxMLP", "RMSNorm with GptNeoxMLP"),
        (m["bias"] or m["lm_head_bias"], "biases outside q, k and v"),
        (m["parallel_residual"], "parallel_residual"),
        (m["rotary"] != m["head_dim"], f"a rotation of {m['rotary']} of {m['head_dim']} channels"),
        (named and not offset, "norms that multiply by 1 + weight, as litgpt's do where the name holds Gemma"),
        (offset and not named, "norms that multiply by the weight, as litgpt's do where the name does not hold Gemma"),
        (m["gelu_approximate"] != "tanh" and offset, "GELU without the tanh approximation"),
        (m["scale_embeddings"] is not offset, f"scale_embeddings: {m['scale_embeddings']}"),
    )


def _like_llama(m: Measure) -> tuple[str, str]:
    after = m["post_attention_norm"], m["post_mlp_norm"]
    before = m["norm_1"], m["norm_2"]
    name = "Llama"
    if m["norm_qk"]:
        name = "Qwen3" if m["norm_qk_type"] == "default" else "Olmo2"
        name = "Qwen3Moe" if name == "Qwen3" and m["mlp"] == "LLaMAMoE" else name
    elif m["qkv_bias"]:
        name = "Qwen2"
    elif m["mlp"] == "LLaMAMoE":
        name = "Mixtral"
    elif _windowed(m):
        name = "Mistral"
    places = (False, False, True, True) if name == "Olmo2" else (True, True, False, False)
    windows = all(_list(m["sliding_layers"])) if name in ("Mistral", "Mixtral") else not _windowed(m)
    return name, first(
        *_rms(m, offset=False),
        ((*before, *after) != places, "norms in other places"),
        (m["norm_qk"] and m["qkv_bias"], "both normed and biased q and k"),
        (m["mlp"] == "LLaMAMoE" and name not in _MIXTURES, "experts with biased or wholly normed q and k"),
        (m["attention_softcap"] or m["logit_softcap"], "softcaps"),
        (m["attention_scalar"] != m["head_dim"], "attention_scores_scalar"),
        (m["rope_local_theta"], "rope_local_base_freq"),
        (_windowed(m) and not windows, "windows in some layers"),
    )


def _gemma(m: Measure) -> tuple[str, str]:
    after = bool(m["post_attention_norm"]), bool(m["post_mlp_norm"])
    name = "Gemma3" if m["norm_qk"] else "Gemma2" if any(after) else "Gemma"
    local = m["rope_local_theta"]
    return name, first(
        *_rms(m, offset=True),
        (not m["norm_1"] or not m["norm_2"] or after != (name != "Gemma",) * 2, "norms in other places"),
        (m["qkv_bias"], "biases of q, k and v"),
        (m["norm_qk"] and m["norm_qk_type"] != "default", "q and k normed as a whole"),
        (name == "Gemma" and (m["attention_softcap"] or m["logit_softcap"] or _windowed(m)), "softcaps or windows"),
        (name == "Gemma" and m["attention_scalar"] != m["head_dim"], "attention_scores_scalar"),
        (name != "Gemma" and not m["sliding_window"], "no sliding_window_size"),
        (name != "Gemma3" and local, "rope_local_base_freq"),
        (local and m["rope_local_layers"] != m["sliding_layers"], "rope_indices other than sliding_window_indices"),
        (local and m["rope_condense_ratio"] != 1, "rope_condense_ratio with rope_local_base_freq"),
    )


def flags(m: Measure) -> dict[str, bool]:
    """What the mapping's ``when`` asks: which of the layouts it knows this checkpoint and its target have."""
    name = str(m["target"])
    neox, falcon, like_llama, gemma = name == "GPTNeoX", name == "Falcon", name in _LLAMA_LIKE, name.startswith("Gemma")
    groups, bias = bool(m["grouped_rows"]), bool(m["qkv_bias"])
    return {
        "qkv_rows": not neox and not falcon and not groups,
        "qkv_rows_bias": not neox and not groups and bias,
        "qkv_groups": not neox and not falcon and groups,
        "qkv_groups_bias": not neox and groups and bias,
        "falcon": falcon,
        "falcon_rows": falcon and not groups,
        "falcon_groups": falcon and groups,
        "falcon_shared_norm": falcon and bool(m["shared_attention_norm"]),
        "falcon_two_norms": falcon and not m["shared_attention_norm"],
        "neox_rows": neox and not groups,
        "neox_groups": neox and groups,
        "llama_like": like_llama,
        "untied_allowed": like_llama and not gemma,
        "always_tied": gemma,
        "gated": like_llama and name not in _MIXTURES,
        "mixture": name == "Mixtral",
        "mixture_qwen": name == "Qwen3Moe",
        "norm_biases": name == "StableLm",
        "norms_before": like_llama and name not in ("Gemma2", "Gemma3", "Olmo2"),
        "norms_after": name == "Olmo2",
        "norms_around": name in ("Gemma2", "Gemma3"),
        "neox": neox,
        "phi": name == "Phi",
    }


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class that ``target`` names."""
    name = str(d["target"])
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": _MODEL_TYPES.get(name, name.lower()),
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "max_position_embeddings": d["context"],
        "rope_parameters": _rope_parameters(d, name),
        "attention_dropout": 0.0,
        "tie_word_embeddings": d["tied"],
        **(_layernorm_fields(d, name) if name in _LAYERNORM else _rms_fields(d, name)),
    }


def _rope_parameters(d: Dims, name: str) -> dict[str, Any]:
    rope = rope_parameters(d)
    if name in _PARTIAL:
        rope["partial_rotary_factor"] = d["rotary_percentage"]
    if name != "Gemma3":
        return rope
    local = {"rope_type": "default", "rope_theta": d["rope_local_theta"]} if d["rope_local_theta"] else rope
    return {"full_attention": rope, "sliding_attention": local}


def _layernorm_fields(d: Dims, name: str) -> dict[str, Any]:
    tanh = d["gelu_approximate"] == "tanh"  # gelu_new is that approximation, by the name of Phi's own config
    fields: dict[str, Any] = {"layer_norm_eps": d["norm_eps"], "hidden_act": "gelu_new" if tanh else "gelu"}
    if name == "Phi":
        return {**fields, "num_key_value_heads": d["kv_heads"], "qk_layernorm": False}
    if name == "Falcon":
        return _falcon_fields(d)
    if name == "StableLm":
        more = {"hidden_act": "silu", "use_qkv_bias": d["qkv_bias"], "use_parallel_residual": False}
        return {**fields, "num_key_value_heads": d["kv_heads"], "qk_layernorm": False, "hidden_dropout": 0.0, **more}
    return {**fields, "use_parallel_residual": d["parallel_residual"], "attention_bias": True}


def _falcon_fields(d: Dims) -> dict[str, Any]:
    """One norm before both halves in Falcon 7B, which has one key head; two norms and key heads in groups since."""
    shared = bool(d["shared_attention_norm"])
    return {
        "layer_norm_epsilon": d["norm_eps"],
        "activation": "gelu",
        "num_kv_heads": d["kv_heads"],
        "ffn_hidden_size": d["ffn"],
        "new_decoder_architecture": not shared,
        "num_ln_in_parallel_attn": None if shared else 2,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "hidden_dropout": 0.0,
    }


def _rms_fields(d: Dims, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "rms_norm_eps": d["norm_eps"],
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if name.startswith("Gemma"):
        # the fields of Gemma 1 and of its successors have different names
        fields["hidden_act"] = fields["hidden_activation"] = "gelu_pytorch_tanh"
    if name in ("Gemma2", "Gemma3"):
        fields |= {
            "query_pre_attn_scalar": d["attention_scalar"],
            "attn_logit_softcapping": d["attention_softcap"] or None,
            "final_logit_softcapping": d["logit_softcap"] or None,
            "sliding_window": d["sliding_window"],
            "layer_types": ["sliding_attention" if x else "full_attention" for x in _list(d["sliding_layers"])],
        }
    elif name in ("Mistral", "Mixtral"):
        fields["sliding_window"] = d["sliding_window"] or None
    if name == "Qwen2":
        del fields["attention_bias"]  # its q, k and v have one always
    if name == "Llama":
        fields["mlp_bias"] = False
    if name == "Mixtral":
        fields |= {"num_local_experts": d["experts"], "num_experts_per_tok": d["experts_per_token"]}
    if name == "Qwen3Moe":
        fields |= {"num_experts": d["experts"], "num_experts_per_tok": d["experts_per_token"]}
        fields |= {"moe_intermediate_size": d["ffn"], "decoder_sparse_step": 1, "mlp_only_layers": []}
        fields |= {"norm_topk_prob": True, "use_sliding_window": False}  # litgpt's softmax is over the chosen ones
    return fields
