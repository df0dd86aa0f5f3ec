"""litgpt (Lightning-AI): lit_model.pth beside model_config.yaml, for the models of its one GPT class that vLLM has.

A tensor's presence or size settles what it can; the rest are fields of litgpt's Config (litgpt/config.py), which
model_config.yaml holds. Which class they describe is decided in :mod:`.classes.litgpt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from .base import Arch, Inventory, Measure, Value, boolean
from .classes.litgpt import choose, flags, hf_config

_H = "transformer.h.0"
_MISSING = "litgpt writes it to model_config.yaml, which does not lie beside the weights: put it there"
_SCALINGS = ("none", "linear", "llama3")
_DECIDE = (
    *("heads", "name", "norm", "mlp", "parallel_residual", "shared_attention_norm", "gelu_approximate", "rotary"),
    *("scale_embeddings", "logit_softcap", "attention_softcap", "attention_scalar", "sliding_window"),
    *("rope_local_theta", "rope_condense_ratio"),
)


def detect(inv: Inventory) -> list[str]:
    """litgpt's names: transformer.h.N.attn.qkv, or attn.attn before 0.5.5, beside transformer.wte and lm_head."""
    fused = next((k for k in ("qkv", "attn") if f"{_H}.attn.{k}.weight" in inv), "")
    if not fused or not all(f"{n}.weight" in inv for n in ("transformer.wte", "lm_head", f"{_H}.attn.proj")):
        return []
    because = [f"transformer.wte, transformer.h.N.attn.{fused} and transformer.h.N.attn.proj are litgpt's names"]
    if fused == "attn":
        because.append("attn.attn is its name for q, k, v before release 0.5.5, stored group by group")
    if _config(inv) is not None:
        because.append("model_config.yaml with litgpt's fields lies beside the weights")
    return because


def _config(inv: Inventory) -> Mapping[str, Any] | None:
    config = inv.extras.get("model_config")
    return cast("dict[str, Any]", config) if isinstance(config, dict) else None


def dims(m: Measure) -> None:
    """Every size and field, the rotary positions, the target class, and the flags that the mapping asks for."""
    _sizes(m)
    _structure(m)
    _attention(m)
    _rotary(m)
    if any(m[name] is None for name in _DECIDE):
        return  # asked for already
    choose(m, _config(m.inventory) or {})
    for name, value in flags(m).items():
        m.accept(name, value, f"what litgpt.yaml does for {m['target']}")


def _field(
    m: Measure,
    name: str,
    key: str,
    default: Value,
    kind: Callable[[str], Value] = int,
    shape: tuple[Value, str] | None = None,
    choices: tuple[Value, ...] = (),
) -> Value:
    """One field of model_config.yaml. A null means ``default``, and so does a key that its release did not have yet."""
    config, file = _config(m.inventory), (f"model_config.{key}",)
    if config is None:
        return m.set(name, kind=kind, file=file, shape=shape, ask=_MISSING, choices=choices)
    if key in config and config[key] is None and shape is None:
        m.accept(name, default, f"model_config.{key} is null", also=(key,), config=True)
        return m[name]
    reason = (default, f"model_config.yaml has no {key}: the default of litgpt's Config")
    return m.set(name, kind=kind, file=file, shape=shape, default=reason, choices=choices)


def _raw(m: Measure, key: str) -> tuple[Value, str]:
    """A list or a table of model_config.yaml as it stands, and where it is from; None for a null or none at all."""
    config = _config(m.inventory) or {}
    because = f"model_config.{key}" if key in config else f"no {key} in model_config.yaml, as litgpt's Config has none"
    return config.get(key), because


def _sizes(m: Measure) -> None:
    inv = m.inventory
    vocab, hidden = inv.shape("transformer.wte.weight") or (None, None)
    layers = inv.count("transformer.h.{}.attn.proj.weight")
    m.set("vocab", file=("model_config.padded_vocab_size",), shape=(vocab, "rows of transformer.wte"))
    m.set("hidden", file=("model_config.n_embd",), shape=(hidden, "columns of transformer.wte"))
    m.set("layers", file=("model_config.n_layer",), shape=(layers, "blocks transformer.h.0 … with an attn.proj"))
    _field(m, "context", "block_size", 4096)
    _field(m, "norm_eps", "norm_eps", 1e-5, float)
    heads = _field(m, "heads", "n_head", 32)
    if isinstance(heads, int):
        _head_sizes(m, heads)
    else:
        m.unsettled("head_dim", "head_size")
        m.unsettled("kv_heads", "n_query_groups")


def _head_sizes(m: Measure, heads: int) -> None:
    """H heads of D channels are the columns of attn.proj; q, k, v are (H + 2 K) D rows."""
    fused = "qkv" if f"{_H}.attn.qkv.weight" in m.inventory else "attn"
    rows = (m.inventory.shape(f"{_H}.attn.{fused}.weight") or (0,))[0]
    columns = (m.inventory.shape(f"{_H}.attn.proj.weight") or (0, 0))[-1]
    head = columns // heads if heads > 0 else 0
    kv = (rows // head - heads) // 2 if head else 0
    if kv < 1 or heads % kv or head * heads != columns or (heads + 2 * kv) * head != rows:
        what = f"{heads} heads do not fit attn.proj with {columns} columns and attn.{fused} with {rows} rows"
        m.problem(what, do="pass --set n_head=N with the right number")
    m.set("head_dim", file=("model_config.head_size",), shape=(head, f"{columns} columns of attn.proj / heads"))
    why = f"{rows} rows of attn.{fused} are (heads + 2 kv_heads) x head_dim"
    m.set("kv_heads", file=("model_config.n_query_groups",), shape=(kv, why))


def _has(m: Measure, name: str, tensor: str, key: str | None = None) -> bool:
    """A structure that a tensor's presence tells, which the field of model_config.yaml may not contradict."""
    there = tensor in m.inventory
    why = f"there is {'a' if there else 'no'} {tensor}"
    m.set(name, kind=boolean, file=(f"model_config.{key}",) if key else (), shape=(there, why))
    return there


def _structure(m: Measure) -> None:
    """Norms, residuals and what stands before and after the blocks."""
    inv = m.inventory
    _field(m, "name", "name", "", str)
    norm = "LayerNorm" if "transformer.ln_f.bias" in inv else "RMSNorm" if "transformer.ln_f.weight" in inv else None
    m.set("norm", kind=str, file=("model_config.norm_class_name",), shape=(norm, "transformer.ln_f"), ask=_MISSING)
    _mlp(m)
    _has(m, "bias", f"{_H}.attn.proj.bias", "bias")
    _has(m, "lm_head_bias", "lm_head.bias", "lm_head_bias")
    for name in ("post_attention_norm", "post_mlp_norm"):
        _has(m, name, f"{_H}.{name}.weight", name)
    _field(m, "parallel_residual", "parallel_residual", True, boolean)
    _field(m, "shared_attention_norm", "shared_attention_norm", False, boolean)
    _has(m, "norm_1", f"{_H}.norm_1.weight", "norm_1")
    # a block that shares its first norm has no second one, whatever the field says
    _has(m, "norm_2", f"{_H}.norm_2.weight", None if m["shared_attention_norm"] else "norm_2")
    _field(m, "scale_embeddings", "scale_embeddings", False, boolean)
    _field(m, "logit_softcap", "final_logit_softcapping", 0.0, float)


def _mlp(m: Measure) -> None:
    """Its names tell all kinds but Llama's and Gemma's apart, and its shapes the width."""
    inv, key = m.inventory, "intermediate_size"
    ups = {"fc": "GptNeoxMLP", "fc_1": None, "experts.0.fc_1": "LLaMAMoE"}
    up = next((up for up in ups if f"{_H}.mlp.{up}.weight" in inv), "fc")
    choices = () if ups[up] else ("LLaMAMLP", "GemmaMLP")
    _field(m, "mlp", "mlp_class_name", "GptNeoxMLP", str, (ups[up], f"the name {_H}.mlp.{up}"), choices)
    m.set("experts", shape=(inv.count(_H + ".mlp.experts.{}.fc_1.weight"), f"{_H}.mlp.experts.0 …"))
    if m["experts"]:
        _field(m, "experts_per_token", "n_expert_per_token", 0)
        key = "moe_intermediate_size" if (_config(inv) or {}).get("moe_intermediate_size") else key
    rows = (inv.shape(f"{_H}.mlp.{up}.weight") or (None,))[0]
    m.set("ffn", file=(f"model_config.{key}",), shape=(rows, f"rows of {_H}.mlp.{up}"))
    _field(m, "gelu_approximate", "gelu_approximate", "none", str, choices=("none", "tanh"))


def _attention(m: Measure) -> None:
    inv = m.inventory
    groups = f"{_H}.attn.attn.weight" in inv
    why = f"q, k, v are called attn.{'attn' if groups else 'qkv'}"
    m.set("grouped_rows", kind=boolean, shape=(groups, why))
    _has(m, "qkv_bias", f"{_H}.attn.{'attn' if groups else 'qkv'}.bias")
    if _has(m, "norm_qk", f"{_H}.attn.norm_q.weight", "norm_qk"):
        _field(m, "norm_qk_type", "norm_qk_type", "default", str, choices=("default", "olmo2"))
    _field(m, "attention_scalar", "attention_scores_scalar", m["head_dim"])
    _field(m, "attention_softcap", "attention_logit_softcapping", 0.0, float)
    window = _field(m, "sliding_window", "sliding_window_size", 0)
    given, because = _raw(m, "sliding_window_indices")
    layers = _indices(given, m["layers"], bool(window))
    m.accept("sliding_layers", layers, because, also=("sliding_window_indices",), config=True)


def _indices(given: Value, layers: Value, there: bool) -> Value:
    """One 0 or 1 per layer: all of them where litgpt is given no list, none where there is nothing to choose."""
    count = layers if isinstance(layers, int) else 0
    if not there:
        return [0] * count
    return [int(bool(x)) for x in given[:count]] if isinstance(given, list) else [1] * count


def _rotary(m: Measure) -> None:
    """The angle of channel pair j at position t: t / condense · base^(-2j/R), R channels of each head, two halves."""
    _field(m, "rope_theta", "rope_base", 10000.0, float)
    share = _field(m, "rotary_percentage", "rotary_percentage", 0.25, float)
    size = m["head_dim"]
    if isinstance(share, float) and isinstance(size, int):
        m.accept("rotary", int(share * size), "rotary_percentage x head_dim, rounded down as litgpt does")
    local = _field(m, "rope_local_theta", "rope_local_base_freq", 0.0, float)
    given, because = _raw(m, "rope_indices")
    layers = _indices(given, m["layers"], bool(local))
    m.accept("rope_local_layers", layers, because, also=("rope_indices",), config=True)
    condense = _field(m, "rope_condense_ratio", "rope_condense_ratio", 1.0, float)
    given, because = _raw(m, "rope_adjustments")
    table = given if isinstance(given, dict) else {}
    if {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & table.keys():
        _refuse_yarn(m)
    if table and condense != 1:
        m.problem(f"rope_condense_ratio {condense} and rope_adjustments together: no class of vLLM's has both")
    kind = "linear" if "factor" in table or condense != 1 else "none"
    kind = "llama3" if {"low_freq_factor", "high_freq_factor"} & table.keys() else kind
    if _config(m.inventory) is None:
        m.set("rope_scaling", kind=str, ask=_MISSING, choices=_SCALINGS)
    else:
        m.accept("rope_scaling", kind, because if table else "model_config.rope_condense_ratio")
        if m["rope_scaling"] not in _SCALINGS:
            m.problem(f"rope_scaling is {m['rope_scaling']}", do=f"it must be one of: {', '.join(_SCALINGS)}")
    _scaled(m, "rope_adjustments.factor" if table else "rope_condense_ratio")


def _scaled(m: Measure, factor: str) -> None:
    if m["rope_scaling"] in ("linear", "llama3"):
        m.set("rope_factor", kind=float, file=(f"model_config.{factor}",), ask="litgpt needs it as well")
    if m["rope_scaling"] == "llama3":
        for key in ("rope_low_freq_factor", "rope_high_freq_factor"):
            file = f"model_config.rope_adjustments.{key.removeprefix('rope_')}"
            m.set(key, kind=float, file=(file,), ask="litgpt needs it as well")
        file = "model_config.rope_adjustments.original_max_seq_len"
        m.set("rope_original_context", file=(file,), ask="litgpt needs it as well")


def _refuse_yarn(m: Measure) -> None:
    """Measured on litgpt 0.5.13 against the paper's ramp (arXiv:2309.00071) in transformers."""
    what = "rope_adjustments are YaRN's, whose ramp is the wrong way round in litgpt: it stretches the fast rotations"
    m.problem(f"{what} and keeps the slow ones, and vLLM's YaRN does the opposite", do="no vLLM class computes that")


ARCH = Arch(
    name="litgpt",
    title="litgpt",
    source="Lightning-AI/litgpt",
    target="the class that model_config.yaml describes",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.litgpt:build",
)
