"""x-transformers (lucidrains): a TransformerWrapper around a Decoder whose options make it a Llama.

Nothing but weights is in such a file. What an option adds shows in the names; what it only computes leaves no trace,
and is asked for or listed as taken on trust. Options that no class of vLLM's computes are refused by name.
"""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean
from .llama_meta import decoder_config

_ATTENTION, _FFN = "attn_layers.layers.0.1.", "attn_layers.layers.1.1.ff."
_NO_TRACE = (
    "attn_qk_norm, attn_softclamp_logits, attn_sparse_topk, attn_laser, residual_attn, shift_tokens, softclamp_output, "
    "l2norm_embed and rotary_interpolation_factor leave no trace in the weights: all as they are by default"
)
_TABLES = {
    "pos_emb.emb.weight": ("learned positions", "rotary_pos_emb=True"),
    "attn_layers.rotary_pos_emb.scale": ("xpos, which scales q and k by their distance", "rotary_xpos=False"),
    "attn_layers.layers.0.0.0.gamma": ("LayerNorm", "use_rmsnorm=True"),
    "attn_layers.layers.0.0.2.g": ("norms behind the residual", "pre_norm=True"),
    "attn_layers.layers.0.0.1.g": ("norms behind each branch", "sandwich_norm=False"),
    f"{_FFN}0.0.weight": ("a feed-forward without a gate", "ff_glu=True, ff_swish=True"),
    f"{_FFN}3.weight": ("a norm inside the feed-forward", "ff_post_act_ln=False"),
    f"{_ATTENTION}to_v_gate.weight": ("gates on the values", "attn_gate_values=False"),
    f"{_ATTENTION}mem_k": ("memory keys and values", "attn_num_mem_kv=0"),
    f"{_ATTENTION}qk_norm_q_scale": ("normalised q and k", "attn_qk_norm=False"),
    "memory_tokens": ("memory tokens", "num_memory_tokens=0"),
    "project_emb.weight": ("an embedding of another width", "emb_dim=dim"),
}
"""Tensors that only options have which Llama's class doesn't compute: what they are, and the options that it does."""


def detect(inv: Inventory) -> list[str]:
    """The names of TransformerWrapper and of a Decoder, whose layers are in turn attention and feed-forward."""
    if not all(
        name in inv for name in ("token_emb.emb.weight", _ATTENTION + "to_q.weight", _ATTENTION + "to_out.weight")
    ):
        return []
    return [
        "token_emb.emb is the name of x-transformers' TransformerWrapper",
        "attn_layers.layers.N.1.to_q, to_k, to_v and to_out are those of its Attention",
    ]


def dims(m: Measure) -> None:
    """What shapes tell; heads, context, the activation and the norms' offset are asked for."""
    inv = m.inventory
    for name, (what, option) in _TABLES.items():
        if name in inv:
            do = f"LlamaForCausalLM computes none: a model trained with {option} can be converted"
            m.problem(f"there is {name}: {what}", do=do)
    vocab, hidden = inv.shape("token_emb.emb.weight") or (None, None)
    ffn = inv.shape(f"{_FFN}2.weight") or (None, None)
    m.set("layers", shape=(_layers(inv), "even numbers N of attn_layers.layers.N that have a to_q"))
    m.set("hidden", shape=(hidden, "columns of token_emb.emb.weight"))
    m.set("vocab", shape=(vocab, "rows of token_emb.emb.weight"))
    m.set("ffn", shape=(ffn[1], "columns of ff.2.weight"), ask="there is no layer with a ff.2")
    m.set("context", ask="it is max_seq_len of the TransformerWrapper")
    _heads(m)
    _rotary(m)
    m.set("norm_eps", kind=float, default=(1e-20, "F.normalize has none"))
    ask = "true where g is near 0 (norm_add_unit_offset, x-transformers' default since 2.0), false where it is near 1"
    m.set("unit_offset", kind=boolean, ask=ask)
    there = f"{_FFN}2.bias" in inv
    m.set("down_bias", kind=boolean, shape=(there, f"there is {'a' if there else 'no'} {_FFN}2.bias"))
    _untraced(m)


def _layers(inv: Inventory) -> int:
    count = 0
    while f"attn_layers.layers.{2 * count}.1.to_q.weight" in inv:
        count += 1
    return count


def _heads(m: Measure) -> None:
    """H heads of D channels are the rows of to_q, K of D those of to_k; D has nothing to do with the width."""
    inv = m.inventory
    heads = m.set("heads", ask="it is heads of the Decoder (8 by default)")
    q, k = ((inv.shape(f"{_ATTENTION}to_{x}.weight") or (0,))[0] for x in "qk")
    if not isinstance(heads, int):
        m.unsettled("head_dim", "attn_dim_head")
        m.unsettled("kv_heads", "attn_kv_heads")
        return
    size = q // heads if heads > 0 and q % heads == 0 else 0
    if not size or k % size or not k or heads % (k // size):
        m.problem(f"{heads} heads do not fit to_q with {q} rows and to_k with {k}", do="pass --set heads=N")
    hidden = m["hidden"]
    if isinstance(hidden, int) and heads > 0 and hidden % heads:
        what = f"{heads} heads do not divide the width {hidden}, which transformers' LlamaConfig demands"
        m.problem(
            what, do="no other class has free head sizes without a norm of q and k: train with heads that divide it"
        )
    m.set("head_dim", shape=(size or None, f"{q} rows of to_q / heads"))
    m.set("kv_heads", shape=(k // size if size else None, f"{k} rows of to_k / head_dim"))


def _rotary(m: Measure) -> None:
    """The angle of pair j at position t is t · base^(-2j/R); R channels of each head turn, half of them by default."""
    table = m.inventory.shape("attn_layers.rotary_pos_emb.inv_freq")
    ask = "there is no attn_layers.rotary_pos_emb.inv_freq: the Decoder has another kind of positions, or none"
    rotary = m.set("rotary", shape=(2 * table[0] if table else None, "twice the length of inv_freq"), ask=ask)
    size = m["head_dim"]
    if isinstance(rotary, int) and isinstance(size, int) and rotary > size:
        m.problem(f"{rotary} channels turn in heads of {size}", do="pass --set heads=N with the right number")
    base = (10_000.0, "x-transformers' own, unless rotary_base_rescale_factor f: then 10000 f^(R / (R - 2))")
    m.set("rope_theta", kind=float, default=base)


def _untraced(m: Measure) -> None:
    """Options that only a forward pass shows."""
    ask = "silu where the Decoder has ff_swish=True, gelu by default"
    if m.set("activation", kind=str, ask=ask, choices=("silu", "gelu")) == "gelu":
        m.problem("the gate's activation is GELU", do="vLLM's LlamaForCausalLM has SiLU alone (ff_swish=True)")
    m.set("other_options", kind=str, default=("plain", _NO_TRACE), choices=("plain",))
    if "to_logits.weight" not in m.inventory:
        m.problem(
            "there is no to_logits.weight: with tie_embedding, logits are divided by the root of the width besides",
            do="add to_logits.weight = token_emb.emb.weight * dim**-0.5 to the file (without the factor where "
            "x-transformers is older than its tie_embedding_scale)",
        )


def hf_config(d: Dims) -> dict[str, Any]:
    """LlamaForCausalLM's config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": d["rope_theta"]}
    if d["rotary"] != d["head_dim"]:
        rope["partial_rotary_factor"] = d.integer("rotary") / d.integer("head_dim")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **decoder_config(d, rope),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": True,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="x_transformers",
    title="x-transformers, as a Llama",
    source="lucidrains/x-transformers",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.x_transformers:build",
)
