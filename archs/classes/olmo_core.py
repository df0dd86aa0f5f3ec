"""What the model section of OLMo-core's config.json says of each layer, and which class that describes.

A layer's block may differ from the others' (``block_overrides``), as where OLMo 3 stretches the rotation of its full
layers only; the classes allow that for windows and rotation alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from msgspec import Struct, field

from ..base import Dims, Inventory, Measure, Value

Table = Mapping[Any, Any]
_NORMS = ("rms", "fused_rms", "cute_rms", "qwen_rms")
_MODEL = {"embed_scale": (None, 1, 1.0), "embedding_norm": (None,), "block_pattern": (None,), "name": (None, "default")}
_BLOCK = {"attention_residual_alpha": (None, 1, 1.0), "feed_forward_residual_alpha": (None, 1, 1.0)}
_ATTENTION = {
    "name": (None, "default"),
    "gate": (None,),
    "clip_qkv": (None,),
    "scalable_softmax": (None, False),
    "attention_sinks": (None, False),
    "qk_norm_per_head_gains": (None, False),
}
_ROPE = {"name": (None, "default"), "no_global_rope": (None, False), "partial_rotary_factor": (None, 1, 1.0)}
_FORWARD = {"name": (None, "default"), "activation": (None, "silu")}
"""Fields that the classes have no place for, and the values that mean "without"."""
NO_SCALING: dict[str, Any] = {"rope_type": "default"}


class Described(Struct):
    """The layers as config.json describes them; ``problems`` are what no class has."""

    blocks: list[Table] = field(default_factory=list[Table])
    windows: list[int] = field(default_factory=list[int])
    ropes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    eps: set[float] = field(default_factory=set[float])
    problems: list[str] = field(default_factory=list[str])


def model_of(inv: Inventory) -> Table:
    """The model section of config.json, or all of it where it is the model's alone; empty without one."""
    config = _table(inv.extras.get("config"))
    model = _table(config.get("model")) or config
    return model if "d_model" in model else {}


def _table(value: object) -> Table:
    return cast("Table", value) if isinstance(value, Mapping) else {}


def attention_of(block: Table) -> Table:
    """The attention of a block, by its name since OLMo-core 2.4, and before."""
    return _table(block.get("sequence_mixer")) or _table(block.get("attention"))


def describe(model: Table, layers: int) -> Described:
    """Every layer's block, window and rotation, and the problems."""
    found = Described()
    base, overrides = _table(model.get("block")), _table(model.get("block_overrides"))
    _differs(found, "model", model, _MODEL)
    for i in range(layers):
        block = _table(overrides.get(str(i), overrides.get(i))) or base  # JSON has no numbers as keys
        attention = attention_of(block)
        found.blocks.append(block)
        found.windows.append(_window(_table(attention.get("sliding_window")), i, layers))
        found.ropes.append(_rope(found, attention))
        _differs(found, "block", block, _BLOCK)
        _differs(found, "block.sequence_mixer", attention, _ATTENTION)
        _differs(found, "block.feed_forward", _table(block.get("feed_forward")), _FORWARD)
        for place, norm in (("layer_norm", block.get("layer_norm")), ("qk_norm", attention.get("qk_norm"))):
            _norm(found, f"block.{place}", norm)
    _norm(found, "lm_head.layer_norm", _table(model.get("lm_head")).get("layer_norm"))
    if len({str(block.get("name", "default")) for block in found.blocks}) > 1:
        found.problems.append("block_overrides mix blocks of different names")
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _differs(found: Described, place: str, table: Table, without: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in without.items():
        if table.get(key) not in values:
            found.problems.append(f"{place}.{key} is {table[key]!r}")


def _norm(found: Described, place: str, value: object) -> None:
    norm = _table(value)
    if not norm:
        return
    if norm.get("name", "default") not in _NORMS or norm.get("elementwise_affine") is False:
        found.problems.append(f"{place}.name is {norm.get('name', 'default')!r} (no RMSNorm with a weight)")
    eps = norm.get("eps")
    found.eps.add(float(eps) if isinstance(eps, (int, float)) else 1e-5)  # what its classes take for none


def _window(config: Table, layer: int, layers: int) -> int:
    """How many positions a layer sees, itself included; 0 for all. A first layer without a window shifts the cycle."""
    pattern = config.get("pattern")
    first = bool(config.get("force_full_attention_on_first_layer", True))
    last = bool(config.get("force_full_attention_on_last_layer", True))
    if not isinstance(pattern, list) or not pattern or (first and layer == 0) or (last and layer == layers - 1):
        return 0
    pattern = cast("list[Any]", pattern)
    size = pattern[(layer - first) % len(pattern)]
    return size if isinstance(size, int) and size > 0 else 0


def _rope(found: Described, attention: Table) -> dict[str, Any]:
    """The rotation of one layer as transformers spells it."""
    rope = _table(attention.get("rope"))
    if not rope:
        found.problems.append("block.sequence_mixer.rope is null: a model without rotary positions")
    _differs(found, "block.sequence_mixer.rope", rope, _ROPE)
    theta = rope.get("theta", 500_000)
    scaling = _table(rope.get("scaling"))
    made = {"rope_theta": float(theta) if isinstance(theta, (int, float)) else 0.0, **NO_SCALING}
    kind = str(scaling.get("_CLASS_", "")).rpartition(".")[2]
    if scaling.get("attention_rescale_factor", 1) != 1 and kind != "YaRNRoPEScalingConfig":
        found.problems.append(f"rope.scaling.attention_rescale_factor is {scaling['attention_rescale_factor']}")
    if kind == "ABFRoPEScalingConfig":
        return {**made, "rope_theta": float(scaling.get("new_theta", 8_000_000))}
    if kind == "PIRoPEScalingConfig":
        return {**made, "rope_type": "linear", "factor": float(scaling.get("factor", 2))}
    if kind == "StepwiseRoPEScalingConfig":
        return {**made, **_stepwise(scaling)}
    if kind == "YaRNRoPEScalingConfig":
        return {**made, **_yarn(scaling)}
    if scaling:
        found.problems.append(f"rope.scaling is {kind or 'of no class'}")
    return made


def _stepwise(scaling: Table) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": float(scaling.get("factor", 32)),
        "low_freq_factor": 1 / (1 - scaling.get("low_freq_proportion", 0.0)),
        "high_freq_factor": 1 / scaling.get("high_freq_proportion", 0.25),
        "original_max_position_embeddings": int(scaling.get("old_context_len", 8192)),
    }


def _yarn(scaling: Table) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": float(scaling.get("factor", 8)),
        "beta_fast": float(scaling.get("beta_fast", 32)),
        "beta_slow": float(scaling.get("beta_slow", 1)),
        "original_max_position_embeddings": int(scaling.get("old_context_len", 8192)),
    }


def settle_positions(m: Measure, found: Described, *, known: bool) -> None:
    """Windows, and the rotation of layers that see all positions and of those that see a window."""
    windows = {size for size in found.windows if size}
    if len(windows) > 1:
        m.problem(f"layers have windows of different sizes: {sorted(windows)}", do="Olmo3ForCausalLM has one for all")
    why = "block.sequence_mixer.sliding_window" if known else "no config.json says otherwise"
    m.accept("windows", list(found.windows), why)
    full = [rope for rope, size in zip(found.ropes, found.windows, strict=True) if not size]
    local = [rope for rope, size in zip(found.ropes, found.windows, strict=True) if size]
    usual = (full or local or [dict(NO_SCALING)])[0]
    given = (usual.get("rope_theta"), "block.sequence_mixer.rope.theta") if known else None
    theta = m.set("rope_theta", kind=float, default=given, ask="500000 in OLMo 2 and 3, and not in the weights")
    for name, ropes in (("rope", full or local), ("rope_local", local or full)):
        if any(rope != ropes[0] for rope in ropes):
            m.problem("layers of one kind have different rotations", do="the classes have one for each kind")
        one = ropes[0] if ropes else usual
        one = {**one, "rope_theta": theta} if one.get("rope_theta") == usual.get("rope_theta") else one
        m.accept(name, one, "block.sequence_mixer.rope of these layers")
    if local and any(rope["rope_type"] != "default" for rope in local):
        what = "the rotation of layers with a window is scaled"
        m.problem(what, do="Olmo3ForCausalLM scales the others' only, as OLMo-core's own export does")
    _check_yarn(m)


def _check_yarn(m: Measure) -> None:
    """transformers ends YaRN's ramp at the last channel, OLMo-core at the last pair: the same but for tiny thetas."""
    rope, size = m["rope"], m["head_dim"]
    if not isinstance(rope, dict) or rope.get("rope_type") != "yarn" or not isinstance(size, int):
        return
    rotations = rope["original_max_position_embeddings"] / (rope["beta_slow"] * 2 * math.pi)
    if math.ceil(size * math.log(rotations) / (2 * math.log(rope["rope_theta"]))) > size // 2 - 1:
        m.problem(
            "YaRN with this theta and context ends its ramp beyond the last pair of channels, where vLLM's differs"
        )


def choose(m: Measure) -> None:
    """Settle ``target`` and the flags of the mapping, or report why no class will do."""
    after, normed, whole = m["block"] == "reordered_norm", bool(m["norm_qk"]), bool(m["norm_qk_whole"])
    windows = any(cast("list[int]", m["windows"] or []))
    if after and normed and whole:
        name = "Olmo3" if windows else "Olmo2"
    elif not after and not windows and not (normed and whole):
        name = "Qwen3" if normed else "Llama"
    else:
        name = ""
        places = "after" if after else "before"
        qk = ("q and k normed as a whole" if whole else "q and k normed by head") if normed else "plain q and k"
        m.problem(f"norms {places} each half, {qk}{', windows' if windows else ''}: no class of vLLM's computes that")
    m.accept("target", name, "block.name, the norms of q and k, and the windows")
    m.accept("norms_after", after, "block.name")


def hf_fields(d: Dims) -> dict[str, Any]:
    """What the class of ``target`` has beside the common sizes."""
    name = str(d["target"])
    windows = cast("list[int]", d["windows"] or [])
    fields: dict[str, Any] = {"attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": d["tied"]}
    if name == "Llama":
        fields["mlp_bias"] = False
    if name == "Qwen3":
        fields |= {"use_sliding_window": False, "sliding_window": None}
    if name == "Olmo3":
        fields["sliding_window"] = max(windows)
        fields["layer_types"] = ["sliding_attention" if size else "full_attention" for size in windows]
    return fields


def rope_parameters(d: Dims) -> dict[str, Value]:
    """One rotation, or one for each kind of layer."""
    full, local = cast("dict[str, Value]", d["rope"]), cast("dict[str, Value]", d["rope_local"])
    return {"full_attention": full, "sliding_attention": local} if d["target"] == "Olmo3" else full
