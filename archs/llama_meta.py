"""Meta Llama 1, 2, 3, 3.1, 3.2, 3.3 (text): consolidated.NN.pth with params.json, 1 to 16 model-parallel ranks."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean, lookup

_NOT_META = ("sliding_window", "moe", "head_dim", "hidden_dim", "quantization_args", "lora_args", "moe_args")
_LLAMA32 = {(2048, 16): "1B", (3072, 28): "3B"}


def detect(inv: Inventory) -> list[str]:
    """Meta's names; params.json beside them or several ranks; none of the keys that other users of them write."""
    if not meta_names(inv) or lookup(inv.extras, "model_args") is not None:
        return []
    params = params_of(inv)
    if any(key in params for key in _NOT_META):
        return []
    because = ["tok_embeddings, layers.N.attention.wq and layers.N.feed_forward.w1 are Meta Llama's names"]
    if params:
        because.append("params.json with dim, n_layers, n_heads lies beside the weights")
    if inv.ranks > 1:
        because.append(f"{inv.ranks} consolidated.NN.pth files: model-parallel ranks")
    return because


def meta_names(inv: Inventory) -> bool:
    """Whether the tensors carry the names that Meta's code and llama2.c share, which have no norms of q and k."""
    needed = ("tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight")
    return all(name in inv for name in needed) and "layers.0.attention.q_norm.weight" not in inv


def params_of(inv: Inventory) -> dict[str, Any]:
    """params.json, which some releases wrap in {"model": …}."""
    params = inv.extras.get("params")
    if not isinstance(params, dict):
        return {}
    inner = params.get("model")
    return inner if isinstance(inner, dict) else params


def block_sizes(m: Measure, where: tuple[str, ...]) -> None:
    """Sizes that the shapes of all ranks together tell, checked against the files' words.

    ``where`` are the extras that may hold dim, n_layers, n_heads, n_kv_heads.
    """
    inv, ranks = m.inventory, m.inventory.ranks
    width = (inv.shape("norm.weight") or (None,))[0]
    layers = inv.count("layers.{}.attention_norm.weight")
    m.set("layers", file=_in(where, "n_layers"), shape=(layers, "blocks layers.0 … with an attention_norm"))
    hidden = m.set("hidden", file=_in(where, "dim"), shape=(width, "norm.weight"))
    heads = m.set("heads", file=_in(where, "n_heads"), ask="wq is square, so no shape tells")
    if isinstance(heads, int) and isinstance(hidden, int):
        _head_sizes(m, where, heads, hidden)
    else:
        m.unsettled("head_dim")
        m.unsettled("kv_heads", "n_kv_heads")
    w1 = inv.shape("layers.0.feed_forward.w1.weight")
    m.set("ffn", shape=(w1[0] * ranks if w1 else None, "rows of feed_forward.w1"))


def _head_sizes(m: Measure, where: tuple[str, ...], heads: int, hidden: int) -> None:
    ranks = m.inventory.ranks
    wq, wk = (m.inventory.shape(f"layers.0.attention.{k}.weight") for k in ("wq", "wk"))
    m.unsettled("head_dim")
    m.unsettled("kv_heads", "n_kv_heads")
    if not wq or not wk:
        m.problem(f"layers.0.attention.{'wk' if wq else 'wq'}.weight is missing")
        return
    if heads < 1 or hidden % heads or wq[0] * ranks != hidden:
        m.problem(f"{heads} heads do not fit wq with {wq[0] * ranks} rows", do="pass --set n_heads=N")
        return
    head = hidden // heads
    kv, rest = divmod(wk[0] * ranks, head)
    if rest or not kv or heads % kv:
        what = f"{heads} heads of {head} channels do not fit wk with {wk[0] * ranks} rows"
        m.problem(what, do="pass --set n_heads=N with the right number")
        return
    m.set("head_dim", shape=(head, "dim / n_heads, as Meta's code computes it"))
    m.set("kv_heads", file=_in(where, "n_kv_heads"), shape=(kv, f"{wk[0] * ranks} rows of wk / head_dim {head}"))


def dims(m: Measure) -> None:
    """Sizes from shapes and params.json; context and rotary defaults by release, said as such."""
    inv = m.inventory
    where = ("params.model", "params")
    block_sizes(m, where)
    a, b = inv.shape("tok_embeddings.weight") or (0, 0)
    hidden = m["hidden"]
    by_columns = inv.ranks > 1 and b * inv.ranks == hidden
    why = f"a rank's tok_embeddings is {[a, b]}, the width is {hidden}"
    m.set("embedding_by_columns", kind=boolean, shape=(by_columns, why))
    stored = params_of(inv).get("vocab_size", -1)  # Llama 1 and 2 write -1: "ask the tokenizer"
    vocab = (a if by_columns else a * inv.ranks) or None
    m.set("vocab", file=_in(where, "vocab_size") if stored != -1 else (), shape=(vocab, "rows of tok_embeddings"))
    m.set("norm_eps", kind=float, file=_in(where, "norm_eps"), default=(1e-5, "ModelArgs' default in Meta's code"))
    third = (vocab or 0) >= 100_000
    theta = (500_000.0, "Llama 3's default") if third else (10_000.0, "fixed in Llama 1 and 2's code")
    m.set("rope_theta", kind=float, file=_in(where, "rope_theta"), default=theta)
    _scaling(m)
    _context(m, third)


def _scaling(m: Measure) -> None:
    scaled = params_of(m.inventory).get("use_scaled_rope") is True
    why = f"use_scaled_rope is {'true' if scaled else 'not set'} in params.json"
    m.set("rope_scaling", kind=str, default=("llama3" if scaled else "none", why), choices=("none", "llama3"))
    if m["rope_scaling"] != "llama3":
        return
    size = _LLAMA32.get((m["hidden"], m["layers"]))  # type: ignore[arg-type]  # None simply is not in the table
    factor = (8.0, "Meta's code uses 8")
    if size:
        factor = (32.0, f"Llama 3.2 {size} was trained with 32, although Meta's own code has 8 hard-wired")
    m.set("rope_factor", kind=float, file=_in(("params.model", "params"), "rope_scaling_factor"), default=factor)
    m.set("rope_low_freq_factor", kind=float, default=(1.0, "fixed in Meta's code"))
    m.set("rope_high_freq_factor", kind=float, default=(4.0, "fixed in Meta's code"))
    m.set("rope_original_context", default=(8192, "fixed in Meta's code"))


def _context(m: Measure, third: bool) -> None:
    """The context length is an argument of Meta's programs, not part of the checkpoint."""
    if m["rope_scaling"] == "llama3":
        context = (131_072, "Llama 3.1 and later")
    elif third:
        context = (8192, "Llama 3")
    elif m["rope_theta"] == 1_000_000.0:
        context = (16_384, "Code Llama, by its rope_theta of 1e6")
    elif m["norm_eps"] == 1e-6:
        context = (2048, "Llama 1, by its norm_eps of 1e-6")
    else:
        context = (4096, "Llama 2")
    m.set("context", file=_in(("params.model", "params"), "max_seq_len"), default=context)


def _in(where: tuple[str, ...], key: str) -> tuple[str, ...]:
    return tuple(f"{place}.{key}" for place in where)


def hf_config(d: Dims) -> dict[str, Any]:
    """LlamaForCausalLM's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **decoder_config(d, rope_parameters(d)),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": d["tied"],
    }


def rope_parameters(d: Dims) -> dict[str, Any]:
    """What config.json says of rotary positions that are not scaled, or are in the ways "linear" and "llama3"."""
    scaling = d["rope_scaling"]
    rope: dict[str, Any] = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": d["rope_theta"]}
    if scaling != "none":
        rope["factor"] = d["rope_factor"]
    if scaling == "llama3":
        rope |= {key: d[f"rope_{key}"] for key in ("low_freq_factor", "high_freq_factor")}
        rope["original_max_position_embeddings"] = d["rope_original_context"]
    return rope


def decoder_config(d: Dims, rope: dict[str, Any]) -> dict[str, Any]:
    """The sizes that the config.json of every class of Llama's shape holds, with these rope_parameters."""
    return {
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": d["context"],
        "rms_norm_eps": d["norm_eps"],
        "rope_parameters": rope,
    }


ARCH = Arch(
    name="llama_meta",
    title="Meta Llama",
    source="meta-llama/llama, llama3, llama-models",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.llama_meta:build",
)
