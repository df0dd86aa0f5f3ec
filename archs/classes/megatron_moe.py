"""Which class of transformers and vLLM a Megatron-LM run with experts describes, and that class's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base import Dims, Measure, Value
from .choosing import Unsupported, first, refuse_settings
from .megatron import BRIDGE, OVERRULE, UNSUPPORTED, rotary_sizes

_UNSUPPORTED: Unsupported = {
    **UNSUPPORTED,
    "moe_router_score_function": ((None, "softmax"), "a router whose scores are no softmax"),
    "moe_router_enable_expert_bias": ((None, False), "biases in the choice of experts"),
    "moe_router_topk_scaling_factor": ((None, 0, 1, 1.0), "experts' weights that are scaled"),
    "moe_router_num_groups": ((None,), "a choice within groups of experts"),
    "moe_router_group_topk": ((None, 0), "a choice within groups of experts"),
    "moe_router_topk_limited_devices": ((None,), "a choice within groups of experts"),
    "moe_router_force_load_balancing": ((None, False), "random experts"),
    "moe_router_force_biased": ((None,), "random biases in the choice of experts"),
    "moe_mlp_glu_interleave_size": ((None,), "gates and values in alternating blocks"),
    "moe_shared_expert_glu_interleave_size": ((None,), "gates and values in alternating blocks"),
    "moe_apply_probs_on_input": ((None, False), "weights on what goes into the experts"),
    "moe_latent_size": ((None,), "experts on a projection of the hidden states"),
}
_QWEN = {"moe": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_WORDS = {
    "Mixtral": {"moe": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"},
    "Qwen2Moe": _QWEN,
    "Qwen3Moe": _QWEN,
}
"""What the classes call the same matrices."""


def choose(m: Measure, said: Mapping[str, Any]) -> None:
    """Settle ``target`` and the words for its tensors, or report why no class will do."""
    refuse_settings(m, "args", said, _UNSUPPORTED, "which this family does not carry over", BRIDGE)
    balanced = said.get("moe_router_load_balancing_type")
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in (balanced if isinstance(balanced, list) else [balanced]):
            m.problem(f"args.moe_router_load_balancing_type is {kind}: a router of another kind", do=BRIDGE)
    name = "Qwen3Moe" if m["qk_norm"] else "Qwen2Moe" if m["shared_ffn"] else "Mixtral"
    heads, size, hidden = m["heads"], m["head_dim"], m["hidden"]
    whole = isinstance(heads, int) and isinstance(size, int) and heads * size == hidden
    reason = first(
        (m["norm"] != "RMSNorm", "LayerNorm with experts"),
        (m["position"] != "rope", f"{m['position']} positions"),
        (not m["gated"], "experts without a gate"),
        (m["rotary_percent"] != 1.0, f"rotary_percent {m['rotary_percent']}"),
        (m["linear_bias"] or (name != "Qwen2Moe" and m["qkv_bias"]), "matrices with biases"),
        (name == "Qwen3Moe" and m["shared_ffn"], "an expert that all tokens go to, with normed q and k"),
        (name == "Qwen2Moe" and not whole, f"{heads} heads of {size} channels are not the width, {hidden}"),
        (name == "Mixtral" and m["dense_layers"], "layers without experts, but no normed q and k"),
        (name == "Mixtral" and m["pre_softmax"], "moe_router_pre_softmax, but no normed q and k"),
    )
    if reason:
        m.problem(f"{name} describes it but for this: {reason}", do=OVERRULE)
    shared = ", one for all tokens" if m["shared_ffn"] else ""
    m.accept("target", name, f"experts{shared}, RMSNorm, {'normed' if m['qk_norm'] else 'plain'} q and k")
    for word, text in _WORDS[name].items():
        m.accept(word, text, f"{name}'s word")


def flags(m: Measure) -> dict[str, Value]:
    """What the mapping's ``when`` asks, besides the dims that are true or false."""
    form = m["experts_form"]
    names = {"local": "local", "numbered": "numbered", "one_part": "grouped", "parts": "parts", "stacked": "stacked"}
    return {
        "is_qwen2": m["target"] == "Qwen2Moe",
        "dense": bool(m["dense_layers"]),
        "grouped": form in ("grouped", "parts"),
        **{flag: form == name for flag, name in names.items()},
    }


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class that ``target`` names."""
    name = str(d["target"])
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": {"Mixtral": "mixtral", "Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}[name],
        "vocab_size": d["vocab"],
        "tie_word_embeddings": d["tied"],
        **rotary_sizes(d),
        "num_key_value_heads": d["kv_heads"],
        "rms_norm_eps": d["norm_eps"],
        "hidden_act": "silu",
        "num_experts_per_tok": d["experts_per_token"],
    }
    if name == "Mixtral":
        experts = {"num_local_experts": d["experts"], "intermediate_size": d["expert_ffn"]}
        return {**fields, **experts, "head_dim": d["head_dim"], "sliding_window": None}
    if name == "Qwen2Moe":  # its heads are always as wide as hidden_size / num_attention_heads
        fields |= {"qkv_bias": True, "shared_expert_intermediate_size": d["shared_ffn"]}
    else:
        fields |= {"attention_bias": False, "head_dim": d["head_dim"]}
    return fields | {
        "use_sliding_window": False,
        "num_experts": d["experts"],
        "moe_intermediate_size": d["expert_ffn"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": d["dense_layers"],
        "norm_topk_prob": not d["pre_softmax"],
    }
