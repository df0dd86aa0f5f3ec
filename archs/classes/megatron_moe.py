"""Which class of transformers and vLLM a Megatron-LM run with experts describes, and that class's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base import Dims, Measure
from .choosing import Unsupported, first, refuse_settings
from .megatron import UNSUPPORTED, rotary_sizes

_UNSUPPORTED: Unsupported = {
    **UNSUPPORTED,
    "moe_router_score_function": ((None, "softmax"), "a router whose scores are no softmax"),
    "moe_router_enable_expert_bias": ((None, False), "biases in the choice of experts"),
    "moe_router_topk_scaling_factor": ((None, 0, 1, 1.0), "experts' weights that are scaled"),
    "moe_router_num_groups": ((None,), "a choice within groups of experts"),
    "moe_router_group_topk": ((None, 0), "a choice within groups of experts"),
    "moe_router_topk_limited_devices": ((None,), "a choice within groups of experts"),
    "moe_router_force_load_balancing": ((None, False), "random experts"),
    "moe_expert_capacity_factor": ((None,), "experts that leave tokens out"),
    "moe_apply_probs_on_input": ((None, False), "weights on what goes into the experts"),
    "moe_latent_size": ((None,), "experts on a projection of the hidden states"),
    "moe_shared_expert_intermediate_size": ((None, 0), "an expert that all tokens go to"),
}
_WORDS = {
    "Mixtral": {"moe": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"},
    "Qwen3Moe": {"moe": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
"""What the classes call the same matrices."""


def choose(m: Measure, said: Mapping[str, Any]) -> None:
    """Settle ``target`` and the words for its tensors, or report why no class will do."""
    refuse_settings(m, "args", said, _UNSUPPORTED, "which this family does not carry over")
    balanced = said.get("moe_router_load_balancing_type")
    if "sinkhorn" in (balanced if isinstance(balanced, list) else [balanced]):
        m.problem("args.moe_router_load_balancing_type is sinkhorn: a router of another kind")
    name = "Qwen3Moe" if m["qk_norm"] else "Mixtral"
    reason = first(
        (m["norm"] != "RMSNorm", "LayerNorm with experts"),
        (m["position"] != "rope", f"{m['position']} positions"),
        (not m["gated"], "experts without a gate"),
        (m["rotary_percent"] != 1.0, f"rotary_percent {m['rotary_percent']}"),
        (m["qkv_bias"] or m["linear_bias"], "matrices with biases"),
        (name == "Mixtral" and m["dense_layers"], "layers without experts, but no normed q and k"),
        (name == "Mixtral" and m["pre_softmax"], "moe_router_pre_softmax, but no normed q and k"),
    )
    if reason:
        do = "its tensors and arguments say so; if the arguments are wrong, overrule them with --set"
        m.problem(f"{name} describes it but for this: {reason}", do=do)
    m.accept("target", name, f"experts, RMSNorm, {'normed' if m['qk_norm'] else 'plain'} q and k")
    for word, text in _WORDS[name].items():
        m.accept(word, text, f"{name}'s word")


def flags(m: Measure) -> dict[str, bool]:
    """What the mapping's ``when`` asks."""
    stacked, pairs, form = m["layers_stacked"] is True, m["interleaved"] is True, m["experts_form"]
    fused, expert_norms, whole = m["fused_norms"] is True, m["fused_expert_norms"] is True, m["experts_whole"] is True
    dense, normed, grouped = bool(m["dense_layers"]), m["qk_norm"] is True, form in ("grouped", "parts")
    return {
        "halves": not stacked and not pairs,
        "pairs": not stacked and pairs,
        "norms_halves": not stacked and normed and not pairs,
        "norms_pairs": not stacked and normed and pairs,
        "fused": not stacked and fused,
        "unfused": not stacked and not fused,
        "fused_in_experts": not stacked and expert_norms,
        "unfused_in_experts": not stacked and not expert_norms,
        "dense": dense,
        "dense_fused": dense and fused,
        "dense_unfused": dense and not fused,
        **{f"{kind}_form": not stacked and form == kind for kind in ("local", "numbered", "grouped", "parts")},
        "stacked_form": not stacked and form == "stacked",
        "cut": not whole and not grouped,
        "cut_grouped": not whole and grouped,
        "whole": whole,
        "all_stacked": stacked,
        "all_halves": stacked and not pairs,
        "all_pairs": stacked and pairs,
        "all_norms_halves": stacked and normed and not pairs,
        "all_norms_pairs": stacked and normed and pairs,
        "all_fused": stacked and expert_norms,
        "all_unfused": stacked and not expert_norms,
    }


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class that ``target`` names."""
    name = str(d["target"])
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": "mixtral" if name == "Mixtral" else "qwen3_moe",
        "vocab_size": d["vocab"],
        "tie_word_embeddings": d["tied"],
        **rotary_sizes(d),
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "rms_norm_eps": d["norm_eps"],
        "hidden_act": "silu",
        "num_experts_per_tok": d["experts_per_token"],
    }
    if name == "Mixtral":
        one = {"intermediate_size": d["expert_ffn"], "num_local_experts": d["experts"], "sliding_window": None}
        return fields | one
    return fields | {
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": d["experts"],
        "moe_intermediate_size": d["expert_ffn"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": d["dense_layers"],
        "norm_topk_prob": not d["pre_softmax"],
    }
