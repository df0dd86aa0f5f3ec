"""OLMo: model.pt beside config.yaml, as its trainer and unshard.py write them, for OLMo 1, OLMo 2 and Llama's shape.

Source of the fields: allenai/OLMo, olmo/config.py, ModelConfig. config.yaml is the run's, with a section ``model``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, Value, boolean
from .llama_meta import decoder_config

_B = "transformer.blocks.0"
_NEEDED = ("transformer.wte.weight", f"{_B}.attn_out.weight", f"{_B}.ff_proj.weight", f"{_B}.ff_out.weight")
_MISSING = "OLMo writes it to config.yaml, which does not lie beside the weights: put it there"
_UNSUPPORTED: dict[str, tuple[Value, str]] = {
    "block_type": ("sequential", "another block, whose matrices have other names"),
    "activation_type": ("swiglu", "another activation than SwiGLU"),
    "alibi": (False, "ALiBi in the place of rotary positions"),
    "scale_logits": (False, "scaled logits"),
    "embedding_layer_norm": (False, "a norm of the embeddings"),
}
"""Field → the value that the classes stand for, which is OLMo's default, and what another one means."""


def detect(inv: Inventory) -> list[str]:
    """OLMo's names: transformer.blocks.N.attn_out and ff_proj, with q, k and v in one matrix or in three."""
    fused = f"{_B}.att_proj.weight" in inv
    if not (fused or f"{_B}.q_proj.weight" in inv) or not all(name in inv for name in _NEEDED):
        return []
    because = [f"transformer.blocks.N.{'att_proj' if fused else 'q_proj'}, attn_out and ff_proj are OLMo's names"]
    if _model(inv):
        because.append("config.yaml beside the weights describes its model")
    return because


def _model(inv: Inventory) -> Mapping[str, Any]:
    """The model section of config.yaml, or all of it where it is the model's alone; empty without one."""
    config = inv.extras.get("config")
    model = config.get("model", config) if isinstance(config, dict) else None
    return cast("dict[str, Any]", model) if isinstance(model, dict) and "d_model" in model else {}


def dims(m: Measure) -> None:
    """Sizes from shapes, checked against config.yaml; what is in neither is asked for."""
    inv = m.inventory
    vocab, hidden = inv.shape("transformer.wte.weight") or (None, None)
    ffn = (inv.shape(f"{_B}.ff_out.weight") or (None, None))[-1]
    blocks = (inv.count("transformer.blocks.{}.attn_out.weight"), "transformer.blocks.0 … with an attn_out")
    m.set("layers", file=_places("n_layers"), shape=blocks)
    m.set("hidden", file=_places("d_model"), shape=(hidden, "columns of transformer.wte"))
    m.set("vocab", file=_places("embedding_size"), shape=(vocab, "rows of transformer.wte"))
    m.set("ffn", shape=(ffn, f"columns of {_B}.ff_out"))
    if (inv.shape(f"{_B}.ff_proj.weight") or (0,))[0] != 2 * (ffn or 0):
        m.problem("ff_proj has not twice the rows that ff_out has columns", do="only SwiGLU is carried over")
    for key, (value, what) in _UNSUPPORTED.items():
        said = _model(inv).get(key, value)
        if said != value:
            m.problem(f"{key} is {said!r} in config.yaml: {what}", do="no class that vLLM serves has a place for it")
    heads = m.set("heads", file=_places("n_heads"), ask="q, k and v lie in one matrix, so no shape tells")
    if isinstance(heads, int) and isinstance(hidden, int):
        _head_sizes(m, heads, hidden)
    else:
        m.unsettled("kv_heads", "n_kv_heads")
    _norms(m)
    _positions(m)
    _choose(m)


def _places(key: str) -> tuple[str, ...]:
    """Where a field may lie: in the run's config, or in a model's alone."""
    return f"config.model.{key}", f"config.{key}"


def _field(m: Measure, name: str, key: str, default: Value, kind: Callable[[str], Value], ask: str = "") -> Value:
    """One field; a key that config.yaml leaves out, as old releases did, has the default of OLMo's ModelConfig."""
    known = (default, f"config.yaml has no {key}: the default of OLMo's ModelConfig") if _model(m.inventory) else None
    return m.set(name, kind=kind, file=_places(key), default=known, ask=f"{_MISSING}{ask}")


def _head_sizes(m: Measure, heads: int, hidden: int) -> None:
    rows = (m.inventory.shape(f"{_B}.att_proj.weight") or (0,))[0]
    head = hidden // heads if heads > 0 else 0
    kv = (rows // head - heads) // 2 if head else 0
    if not rows:
        m.problem("q_proj, k_proj and v_proj are those of block_type llama", do="only block_type sequential is known")
    elif kv < 1 or heads % kv or head * heads != hidden or (heads + 2 * kv) * head != rows:
        what = f"{heads} heads do not fit a width of {hidden} and att_proj with {rows} rows"
        m.problem(what, do="pass --set n_heads=N with the right number")
    m.set("head_dim", shape=(head, f"{hidden} channels / {heads} heads"))
    why = f"{rows} rows of att_proj are (heads + 2 kv_heads) x head_dim"
    m.set("kv_heads", file=_places("n_kv_heads"), shape=(kv, why))


def _norms(m: Measure) -> None:
    """Which norms there are, by their tensors; what they compute, by config.yaml."""
    for name, tensor in (("norm_weights", f"{_B}.attn_norm.weight"), ("norm_qk", f"{_B}.q_norm.weight")):
        there = tensor in m.inventory
        m.set(name, kind=boolean, shape=(there, f"there is {'a' if there else 'no'} {tensor}"))
    if any(name.endswith(".bias") for name in m.inventory.tensors):
        m.problem("there are biases (include_bias or bias_for_layer_norm)", do="no class of OLMo's in vLLM has them")
    _field(m, "norm", "layer_norm_type", "default", str, "; rms for OLMo 2, default for OLMo 1")
    _field(m, "norm_after", "norm_after", False, boolean, "; true for OLMo 2")
    _field(m, "norm_eps", "layer_norm_eps", 1e-5, float, "; 1e-6 for OLMo 2, 1e-5 for OLMo 1")


def _positions(m: Measure) -> None:
    _field(m, "rope", "rope", False, boolean, "; true for OLMo 1 and 2")
    _field(m, "rope_theta", "rope_theta", 10_000.0, float, "; 500000 for OLMo 2, 10000 for OLMo 1")
    _field(m, "context", "max_sequence_length", 1024, int, "; 4096 for OLMo 2, 2048 or 4096 for OLMo 1")
    _field(m, "clip_qkv", "clip_qkv", 0.0, float, "; 8 for OLMo 7B of 2023, 0 for none")
    if m["rope"] is False:
        m.problem("rope is false: learned positions, or none", do="no class of OLMo's in vLLM has them")


def _choose(m: Measure) -> None:
    """Settle ``target`` and the places of norms, or report why no class will do."""
    norm, after, weights, normed = m["norm"], bool(m["norm_after"]), bool(m["norm_weights"]), bool(m["norm_qk"])
    if norm is None or m["norm_after"] is None:
        return
    name = ""
    if norm in ("default", "low_precision") and not (weights or after or normed):
        name = "Olmo"
        if m["norm_eps"] != 1e-5:
            m.problem(f"layer_norm_eps is {m['norm_eps']}, and OlmoForCausalLM has 1e-5 hard-wired")
    elif norm == "rms" and weights and after == normed and not m["clip_qkv"]:
        name = "Olmo2" if after else "Llama"
    else:
        parts = f"layer_norm_type {norm}, {'with' if weights else 'without'} weights, norm_after {str(after).lower()}"
        qk = "normed q and k" if normed else "plain q and k"
        clip = f", clip_qkv {m['clip_qkv']}" if m["clip_qkv"] else ""
        m.problem(f"{parts}, {qk}{clip}: no class of vLLM's computes that", do="if config.yaml is wrong, mend it")
    m.accept("target", name, "layer_norm_type, norm_after, and which norms there are")
    m.accept("norms_before", name == "Llama", f"where {name} has its norms")
    m.accept("norms_after", name == "Olmo2", f"where {name} has its norms")


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class that ``target`` names."""
    name = str(d["target"])
    config: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **decoder_config(d, {"rope_type": "default", "rope_theta": d["rope_theta"]}),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": d["tied"],
    }
    if name == "Olmo":
        del config["rms_norm_eps"]  # its norms have no field
        config["clip_qkv"] = d["clip_qkv"] or None
    return config | ({"mlp_bias": False} if name == "Llama" else {})


ARCH = Arch(
    name="olmo",
    title="OLMo",
    source="allenai/OLMo",
    target="OlmoForCausalLM, Olmo2ForCausalLM, LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.olmo:build",
)
