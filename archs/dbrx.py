"""Mixtures of llm-foundry, whose experts megablocks holds in stacks: DBRX, and what is a Mixtral but for its names.

A checkpoint of Composer's has the config that llm-foundry trained with below ``state.integrations`` (llmfoundry/models/
mpt/configuration_mpt.py); it may also lie beside the weights as config.json. Weights alone do not tell whether norms
are LayerNorm (DBRX) or RMSNorm (Mixtral): neither has biases.
"""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, Value, lookup
from .classes.choosing import Unsupported
from .llama_meta import decoder_config
from .olmoe import ROUTER, STACK, fused_heads, stacked_experts

_AT = "transformer.blocks.0."
_PLACES = ("integrations.huggingface.model.config.content", "config")
_ASK = (
    "llm-foundry's config has it, which Composer saves below state.integrations, and which may lie here as config.json"
)
_NORMS = {
    **dict.fromkeys(("layernorm", "low_precision_layernorm"), "layernorm"),
    **dict.fromkeys(("rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm"), "rmsnorm"),
}
_UNSERVED: Unsupported = {
    "attn_config.rope": ((True,), "its positions are not rotary ones"),
    "attn_config.alibi": ((False, None), "its positions are ALiBi's"),
    "attn_config.qk_ln": ((False, None), "q and k are normed"),
    "attn_config.qk_gn": ((False, None), "q and k are normed"),
    "attn_config.softmax_scale": ((None,), "its scores are scaled otherwise"),
    "attn_config.sliding_window_size": ((-1, None), "its attention has a window"),
    "attn_config.attn_logit_softcapping": ((None,), "its scores are capped"),
    "attn_config.rope_dail_config.type": (("original", None), "its rotations are stretched"),
    "attn_config.rope_hf_config.type": (("no_scaling", None), "its rotations are stretched"),
    "logit_scale": ((None,), "its logits are scaled"),
    "final_logit_softcapping": ((None,), "its logits are capped"),
    "block_overrides": ((None,), "its blocks differ"),
    "no_bias": ((True,), "it has biases"),
}
"""Fields of llm-foundry's config, the values with which vLLM's classes compute, and what any other value means."""
_DO = "no class of vLLM's computes that"


def detect(inv: Inventory) -> list[str]:
    """llm-foundry's names for attention, and megablocks' for a router and experts in one stack. With the config.json
    of the release beside them they are Hugging Face's."""
    found = [name for name in ("", "norm_attn_norm.") if f"{_AT}{name}attn.Wqkv.weight" in inv]
    if not found or not all(name in inv for name in ("transformer.wte.weight", ROUTER, STACK)):
        return []
    if lookup(inv.extras, "config.architectures") == ["DbrxForCausalLM"]:
        return []
    because = [f"transformer.blocks.N.{found[0]}attn.Wqkv are llm-foundry's names"]
    return [*because, "ffn.router.layer and ffn.experts.mlp.w1 are those of megablocks: a mixture of experts, as DBRX"]


def dims(m: Measure) -> None:
    """Sizes from the shapes, checked against the config; what is in neither is asked for."""
    inv = m.inventory
    rows, width = inv.shape("transformer.wte.weight") or (None, None)
    layers = inv.count("transformer.blocks.{}.ffn.router.layer.weight")
    m.set("layers", file=_at("n_layers"), shape=(layers, "blocks with a router"))
    m.set("hidden", file=_at("d_model"), shape=(width, "columns of transformer.wte"))
    m.set("vocab", file=_at("vocab_size"), shape=(rows, "rows of transformer.wte"))
    _names(m)
    fused = f"{_AT}{m['in_attn']}.Wqkv.weight"
    fused_heads(m, fused, _at("n_heads"), _at("attn_config.kv_n_heads"), f". {_ASK}")
    _experts(m)
    _norms(m)
    m.set("rope_theta", kind=float, file=_at("attn_config.rope_theta"), ask=_ASK)
    m.set("context", file=_at("max_seq_len"), ask=_ASK)
    clip = (0.0, "the config has no clip_qkv") if _said(inv, "d_model") is not None else None
    m.set("clip_qkv", kind=float, file=_at("attn_config.clip_qkv"), default=clip, ask=f"0 for none. {_ASK}")
    for key, (allowed, meaning) in _UNSERVED.items():
        said = _said(inv, key)
        if said is not None and said not in allowed:
            m.problem(f"{key} is {said} in the config: {meaning}", do=_DO)
    _classes(m)


def _at(key: str) -> tuple[str, ...]:
    return tuple(f"{place}.{key}" for place in _PLACES)


def _said(inv: Inventory, key: str) -> Any:
    return next((value for path in _at(key) if (value := lookup(inv.extras, path)) is not None), None)


def _names(m: Measure) -> None:
    """``fuse_norm_attn_norm`` puts attention and both norms into a module of their own."""
    fused = f"{_AT}norm_attn_norm.attn.Wqkv.weight" in m.inventory
    why = f"there is {'a' if fused else 'no'} norm_attn_norm"
    for name in ("attn", "norm_1", "norm_2"):
        m.set(f"in_{name}", kind=str, shape=(f"norm_attn_norm.{name}" if fused else name, why))


def _experts(m: Measure) -> None:
    stacked_experts(m, _at("ffn_config.moe_num_experts"), _DO)
    m.set("experts_per_token", file=_at("ffn_config.moe_top_k"), ask=f"no shape tells. {_ASK}")
    there = _said(m.inventory, "d_model") is not None
    plain: Value = "gelu" if there else None
    known = (plain, "llm-foundry's default: the config has no ffn_act_fn") if there else None
    m.set("activation", kind=str, file=_at("ffn_config.ffn_act_fn.name"), default=known, ask=_ASK, choices=("silu",))
    power = _at("ffn_config.moe_normalize_expert_weights")
    known = (0.0, "megablocks' default: weights as they are") if there else None
    m.set("normalised", kind=float, file=power, default=known, ask=f"1 for DBRX. {_ASK}", choices=(1.0,))


def _norms(m: Measure) -> None:
    said = _said(m.inventory, "norm_type")
    known = (_NORMS.get(str(said), str(said)), f"norm_type is {said} in the config") if said is not None else None
    ask = f"layernorm (DBRX) or rmsnorm. {_ASK}"
    m.set("norm", kind=str, default=known, ask=ask, choices=("layernorm", "rmsnorm"))
    layer = m["norm"] == "layernorm"
    known = (1e-5, "torch's default for LayerNorm") if layer else None
    ask = f"torch's RMSNorm has the type's own by default, 1.1920929e-07 in float32. {_ASK}"
    eps = m.set("norm_eps", kind=float, file=_at("norm_eps"), default=known, ask=ask)
    if layer and eps not in (1e-5, None):
        m.problem(f"norm_eps is {eps}, and DbrxForCausalLM has 1e-05", do=_DO)


def _classes(m: Measure) -> None:
    """Which class it is, and what that one lacks."""
    layer = m["norm"] == "layernorm"
    m.accept("is_dbrx", layer, "LayerNorm: DbrxForCausalLM" if layer else "RMSNorm: MixtralForCausalLM")
    if layer and "lm_head.weight" not in m.inventory:
        m.problem("there is no lm_head: the head is the embedding, which DbrxForCausalLM does not take", do=_DO)
    if not layer and m["clip_qkv"]:
        m.problem(f"clip_qkv is {m['clip_qkv']}: q, k and v are clipped, which MixtralForCausalLM leaves out", do=_DO)


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of DbrxForCausalLM, or of MixtralForCausalLM. vLLM's DBRX can't load itself, so that one is ours."""
    rope = {"rope_type": "default", "rope_theta": d["rope_theta"]}
    if not d["is_dbrx"]:
        sizes = decoder_config(d, rope)
        experts = {"num_local_experts": d["experts"], "num_experts_per_tok": d["experts_per_token"]}
        own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        return {**own, **sizes, **experts, "tie_word_embeddings": d["tied"]}
    attention = {"kv_n_heads": d["kv_heads"], "clip_qkv": d["clip_qkv"] or None, "rope_theta": d["rope_theta"]}
    experts = {"ffn_hidden_size": d["ffn"], "moe_num_experts": d["experts"], "moe_top_k": d["experts_per_token"]}
    return {
        "architectures": ["MdlDbrxForCausalLM"],
        "model_type": "dbrx",
        "vocab_size": d["vocab"],
        "d_model": d["hidden"],
        "n_layers": d["layers"],
        "n_heads": d["heads"],
        "max_seq_len": d["context"],
        "rope_parameters": rope,
        "attn_config": attention,
        "ffn_config": {**experts, "ffn_act_fn": {"name": "silu"}, "moe_normalize_expert_weights": 1.0},
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="dbrx",
    title="DBRX, mixtures of llm-foundry",
    source="mosaicml/llm-foundry with megablocks",
    target="MdlDbrxForCausalLM, MixtralForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.dbrx:build",
    served="mdl.archs.served.dbrx:MdlDbrxForCausalLM",
)
