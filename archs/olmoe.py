"""OLMoE: allenai/OLMo's model.pt with block_type moe, whose experts megablocks holds, and config.yaml beside it."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, lookup
from .llama_meta import decoder_config

_BLOCK = "transformer.blocks.0."
ROUTER, STACK = _BLOCK + "ffn.router.layer.weight", _BLOCK + "ffn.experts.mlp.w1"
"""megablocks' names, which llm-foundry's mixtures have too (:mod:`.dbrx`)."""
Paths = tuple[str, ...]
_TARGET = "OlmoeForCausalLM"
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "block_type": (("moe",), "its blocks are of another kind"),
    "layer_norm_type": (("rms",), "its norms are LayerNorm"),
    "activation_type": (("swiglu",), "its experts are not SwiGLU"),
    "clip_qkv": ((None,), "q, k and v are clipped, which vLLM's OlmoeForCausalLM leaves out"),
    "norm_after": ((False,), "its norms come after attention and experts"),
    "alibi": ((False,), "its positions are ALiBi's"),
    "rope": ((True,), "its positions are not rotary ones"),
    "scale_logits": ((False,), "its logits are scaled"),
    "moe_dropless": ((True,), "tokens beyond an expert's capacity are dropped"),
    "moe_normalize_expert_weights": ((None,), "the chosen experts' weights are normalised"),
    "moe_interleave": ((False,), "dense blocks alternate with those of experts"),
    "moe_shared_expert": ((False,), "an expert is shared by all tokens"),
}
"""Fields of OLMo's ModelConfig, the values with which vLLM's class computes, and what any other value means."""


def detect(inv: Inventory) -> list[str]:
    """OLMo's names for attention, and megablocks' for a router and experts in one stack."""
    if not all(name in inv for name in ("transformer.wte.weight", _BLOCK + "att_proj.weight", ROUTER, STACK)):
        return []
    because = ["transformer.blocks.N.att_proj and attn_out are the names of OLMo's training code"]
    return [*because, "ffn.router.layer and ffn.experts.mlp.w1 are those of megablocks: its mixture of experts, OLMoE"]


def dims(m: Measure) -> None:
    """Sizes from the shapes, checked against config.yaml; what is in neither is asked for."""
    inv = m.inventory
    rows, width = inv.shape("transformer.wte.weight") or (None, None)
    layers = inv.count("transformer.blocks.{}.ffn.router.layer.weight")
    m.set("layers", file=_at("n_layers"), shape=(layers, "blocks with a router"))
    m.set("hidden", file=_at("d_model"), shape=(width, "columns of transformer.wte"))
    said = lookup(inv.extras, "config.model.embedding_size")  # 0 or null: as many rows as the vocabulary has
    where = _at("embedding_size") if said else ()
    m.set("vocab", file=where, shape=(rows, "rows of transformer.wte, padding included"))
    fused_heads(m, _BLOCK + "att_proj.weight", _at("n_heads"), _at("n_kv_heads"), "")
    stacked_experts(m, _at("moe_num_experts"), _NO_CLASS)
    if _BLOCK + "q_norm.weight" not in inv:
        m.problem("there is no q_norm: q and k are not normed", do=_NO_CLASS)
    m.set("experts_per_token", file=_at("moe_top_k"), ask="no shape tells; OLMoE-1B-7B was trained with 8")
    m.set("norm_eps", kind=float, file=_at("layer_norm_eps"), default=(1e-5, "hard-wired before the config had it"))
    if m["norm_eps"] != 1e-5:
        m.problem(f"layer_norm_eps is {m['norm_eps']}, and vLLM's {_TARGET} norms q and k with 1e-05", do=_NO_CLASS)
    m.set("rope_theta", kind=float, file=_at("rope_theta"), default=(10000.0, "hard-wired before the config had it"))
    m.set("context", file=_at("max_sequence_length"), ask="OLMoE-1B-7B has 4096")
    _refuse(m)


def _at(key: str) -> tuple[str, ...]:
    return (f"config.model.{key}",)


def fused_heads(m: Measure, fused: str, heads_at: Paths, kv_at: Paths, ask: str) -> None:
    """As many query channels as the model is wide; what else the matrix ``fused`` has is half k and half v.

    Read at ``heads_at`` and ``kv_at`` in the config, whose last words are what --set calls them; ``ask`` where there is
    none.
    """
    name, hidden = fused.removesuffix(".weight").rpartition(".")[2], m["hidden"]
    rows = (m.inventory.shape(fused) or (None,))[0]
    heads = m.set("heads", file=heads_at, ask=f"q, k and v lie in one matrix, so no shape tells{ask}")
    if not (isinstance(heads, int) and isinstance(hidden, int) and rows):
        m.unsettled("kv_heads", kv_at[0].rpartition(".")[2])
        return
    if heads < 1 or hidden % heads or (rows - hidden) % (2 * hidden // heads) or rows <= hidden:
        m.problem(f"{heads} heads of {hidden} channels do not fit {name} with {rows} rows", do="pass --set n_heads=N")
        return
    head = hidden // heads
    kv = (rows - hidden) // (2 * head)
    m.set("head_dim", shape=(head, "d_model / n_heads, as its code computes it"))
    m.set("kv_heads", file=kv_at, shape=(kv, f"({rows} rows of {name} - {hidden}) / 2 / {head}"))
    if heads % kv:
        m.problem(f"{heads} query heads can't share {kv} key heads evenly", do="pass --set n_heads=N")


def stacked_experts(m: Measure, count_at: Paths, do: str) -> None:
    """How many experts megablocks' stacks hold, and how wide each is; ``do`` where they have no gate."""
    inv, hidden = m.inventory, m["hidden"]
    rows, stack = (inv.shape(ROUTER) or (None,))[0], list(inv.shape(STACK) or ())
    experts = m.set("experts", file=count_at, shape=(rows, "rows of ffn.router.layer"))
    fits = len(stack) == 2 and isinstance(experts, int) and experts > 0 and stack[0] % experts == 0
    if not fits or stack[1] != hidden:
        what = f"ffn.experts.mlp.w1 has the shape {stack}, not [{experts} x rows of an expert, {hidden}]"
        m.problem(what, do="so megablocks stacks the experts of a dropless mixture; no other is carried over")
    elif isinstance(experts, int):
        m.set("ffn", shape=(stack[0] // experts, f"{stack[0]} rows of ffn.experts.mlp.w1 / {experts} experts"))
    if f"{STACK[:-2]}v1" not in inv:
        m.problem("there is no ffn.experts.mlp.v1: the experts have no gate", do=do)


def _refuse(m: Measure) -> None:
    for key, (allowed, meaning) in _UNSERVED.items():
        said = lookup(m.inventory.extras, f"config.model.{key}")
        if said is not None and said not in allowed:
            m.problem(f"config.model.{key} is {said}: {meaning}", do=_NO_CLASS)


_NO_CLASS = f"vLLM's {_TARGET} computes none of that"


def hf_config(d: Dims) -> dict[str, Any]:
    """OlmoeForCausalLM's config.json."""
    sizes = decoder_config(d, {"rope_type": "default", "rope_theta": d["rope_theta"]})
    del sizes["head_dim"]  # the class has no such field: always hidden_size / num_attention_heads
    return {
        "architectures": [_TARGET],
        "model_type": "olmoe",
        **sizes,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": d["experts"],
        "num_experts_per_tok": d["experts_per_token"],
        "norm_topk_prob": False,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="olmoe",
    title="OLMoE",
    source="allenai/OLMo with megablocks",
    target=_TARGET,
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.olmoe:build",
)
