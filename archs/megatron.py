"""Megatron-LM with megatron-core: model_optim_rng.pt of any tensor- and pipeline-parallel cut, and torch_dist folders.

Layers are decoder.layers.N; ranks and stages are joined before a name is looked at (convert/grid.py). The arguments of
the run lie in the file under ``args`` (megatron/training/arguments.py). Which class they describe is decided in
:mod:`.classes.megatron`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..mappings.tensors import Shape
from .base import Arch, Inventory, Measure, Value, boolean, lookup
from .classes.choosing import heads_of_fused
from .classes.megatron import choose, flags, hf_config, settle

_AT = "decoder.layers"
ASK = "Megatron-LM saves it under args, which this checkpoint lacks"
"""Why something has to be asked for."""
_DECIDE = ("heads", "head_dim", "position", "activation", "rotary_percent", "interleaved", "rope_scaling")


def detect(inv: Inventory) -> list[str]:
    """megatron-core's names, layer by layer, and no experts."""
    if not core_names(inv) or f"{_AT}.0.self_attention.linear_proj.weight" not in inv or has_experts(inv):
        return []
    return ["decoder.layers.N.self_attention.linear_qkv and linear_proj are megatron-core's names", *where(inv)]


def core_names(inv: Inventory) -> bool:
    """Whether there are the tensors outside the layers that all of megatron-core's GPT models have."""
    return all(name in inv for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"))


def has_experts(inv: Inventory) -> bool:
    """Whether any layer has a router."""
    return any(name.endswith(".mlp.router.weight") for name in inv.tensors)


def where(inv: Inventory) -> list[str]:
    """What tells more about the run, in sentences."""
    cut = f"{inv.ranks} tensor-parallel ranks of {inv.parts} runs of layers each"
    said = [cut] if inv.ranks > 1 or inv.parts > 1 else []
    said += [f"{inv.experts} expert-parallel parts of the experts"] if inv.experts > 1 else []
    return said + (["the arguments of the run lie beside the weights"] if arguments(inv) else [])


def arguments(inv: Inventory) -> Mapping[str, Any]:
    """The run's own arguments; empty if the file has none."""
    found = inv.extras.get("args")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def of_layer(inv: Inventory, name: str) -> Shape | None:
    """The shape of a tensor of layer 0 in the first rank, whether layers are stored one by one or stacked."""
    stacked = inv.shape(f"{_AT}.{name}")
    return stacked[1:] if stacked else inv.shape(f"{_AT}.0.{name}")


def dims(m: Measure) -> None:
    """Every size and argument that counts, the target class, and the flags that the mapping asks for."""
    attention_dims(m)
    _mlp(m)
    _activation(m)
    settle(m, arguments(m.inventory), _DECIDE, choose, flags)


def attention_dims(m: Measure) -> None:
    """Everything but the MLPs."""
    _sizes(m)
    _heads(m)
    _structure(m)
    _positions(m)


def arg(*names: str) -> tuple[str, ...]:
    """Where the arguments of the run say it."""
    return tuple(f"args.{name}" for name in names)


def _sizes(m: Measure) -> None:
    inv = m.inventory
    rows, hidden = inv.shape("embedding.word_embeddings.weight") or (0, None)
    proj = "self_attention.linear_proj.weight"
    stacked = inv.shape(f"{_AT}.{proj}")
    layers = stacked[0] if stacked else inv.count(_AT + ".{}." + proj)
    m.set("layers", file=arg("num_layers"), shape=(layers, "layers that have a linear_proj, all stages together"))
    m.set("hidden", file=arg("hidden_size"), shape=(hidden, "columns of word_embeddings"))
    why = (
        "rows of word_embeddings; Megatron-LM pads them, and those behind the tokenizer's last token are never trained"
    )
    m.set("vocab", file=arg("padded_vocab_size"), shape=(rows * inv.ranks or None, why))
    m.set("norm_eps", kind=float, file=arg("norm_epsilon", "layernorm_epsilon"), default=usual(m, 1e-5), ask=ASK)
    table = inv.shape("embedding.position_embeddings.weight") or (None,)
    m.set("context", file=arg("max_position_embeddings"), shape=(table[0], "rows of position_embeddings"), ask=ASK)


def _heads(m: Measure) -> None:
    """H heads of D channels are the columns of linear_proj; q, k, v are (H + 2 K) D rows."""
    inv = m.inventory
    rows = (of_layer(inv, "self_attention.linear_qkv.weight") or (0,))[0] * inv.ranks
    columns = (of_layer(inv, "self_attention.linear_proj.weight") or (0, 0))[-1] * inv.ranks
    normed = of_layer(inv, "self_attention.q_layernorm.weight")
    from_norm = (columns // normed[0] if normed else None, f"{columns} columns of linear_proj / q_layernorm")
    heads = m.set("heads", file=arg("num_attention_heads"), shape=from_norm, ask=f"no shape tells. {ASK}")
    if not isinstance(heads, int):
        m.unsettled("head_dim", "kv_channels")
        m.unsettled("kv_heads", "num_query_groups")
        return
    head, kv = heads_of_fused(m, heads, rows, columns, ("linear_proj", "linear_qkv"))
    m.set("head_dim", file=arg("kv_channels"), shape=(head, f"{columns} columns of linear_proj / heads"))
    grouped = arguments(inv).get("group_query_attention") is True
    why = f"{rows} rows of linear_qkv are (heads + 2 kv_heads) x head_dim"
    m.set("kv_heads", file=arg("num_query_groups") if grouped else (), shape=(kv, why))


def _has(m: Measure, name: str, tensor: str, what: str) -> bool:
    there = of_layer(m.inventory, tensor) is not None
    m.set(name, kind=boolean, shape=(there, f"there is {'a' if there else 'no'} {what}"))
    return there


def _structure(m: Measure) -> None:
    """What tensors there are."""
    inv = m.inventory
    layer = "decoder.final_layernorm.bias" in inv
    why = f"final_layernorm has {'a' if layer else 'no'} bias"
    m.set("norm", kind=str, file=arg("normalization"), shape=("LayerNorm" if layer else "RMSNorm", why))
    _has(m, "fused_norms", "self_attention.linear_qkv.layer_norm_weight", "linear_qkv.layer_norm_weight")
    _has(m, "qkv_bias", "self_attention.linear_qkv.bias", "linear_qkv.bias")
    _has(m, "linear_bias", "self_attention.linear_proj.bias", "linear_proj.bias")
    _has(m, "qk_norm", "self_attention.q_layernorm.weight", "q_layernorm")


def _mlp(m: Measure) -> None:
    inv = m.inventory
    up, down = (of_layer(inv, f"mlp.linear_fc{k}.weight") or (0, 0) for k in (1, 2))
    why = f"linear_fc1 has {up[0] * inv.ranks} rows, linear_fc2 {down[-1] * inv.ranks} columns"
    m.set("ffn", file=arg("ffn_hidden_size"), shape=(down[-1] * inv.ranks or None, "columns of linear_fc2"))
    m.set("gated", kind=boolean, file=arg("swiglu"), shape=(up[0] == 2 * down[-1], why))


def usual(m: Measure, value: Value) -> tuple[Value, str] | None:
    """Megatron's own default, where its arguments are here and don't speak of it; without them it is asked for."""
    return (value, "Megatron's default") if arguments(m.inventory) else None


def _positions(m: Measure) -> None:
    """Rotary positions turn the first share of each head's channels; halves, or neighbouring pairs."""
    learned = "embedding.position_embeddings.weight" in m.inventory
    shape = ("learned_absolute", "there are position_embeddings") if learned else None
    old = arguments(m.inventory).get("use_rotary_position_embeddings") is True
    default = ("rope", "args.use_rotary_position_embeddings") if old else None
    file = () if old else arg("position_embedding_type")
    m.set("position", kind=str, file=file, shape=shape, default=default, ask=f"rope? {ASK}")
    rope = m["position"] == "rope"
    unused = "there are no rotary positions"
    theta, share, pairs = (arg(key) if rope else () for key in ("rotary_base", "rotary_percent", "rotary_interleaved"))
    m.set("rope_theta", kind=float, file=theta, default=usual(m, 10000.0) if rope else (10000.0, unused), ask=ASK)
    m.set("rotary_percent", kind=float, file=share, default=usual(m, 1.0) if rope else (1.0, unused), ask=ASK)
    m.set("interleaved", kind=boolean, file=pairs, default=usual(m, False) if rope else (False, unused), ask=ASK)
    _scaling(m, rope)


def _scaling(m: Measure, rope: bool) -> None:
    said = arguments(m.inventory) if rope else {}
    linear = said.get("rotary_seq_len_interpolation_factor") not in (None, 1)
    kind = "llama3" if said.get("use_rope_scaling") is True else "linear" if linear else "none"
    if kind == "llama3" and linear:
        m.problem("use_rope_scaling and rotary_seq_len_interpolation_factor together: no class of vLLM's has both")
    why = f"args.use_rope_scaling and args.rotary_seq_len_interpolation_factor{'' if said else ', which are not here'}"
    default = (kind, why) if said or not rope else None
    m.set("rope_scaling", kind=str, default=default, ask=ASK, choices=("none", "linear", "llama3"))
    if m["rope_scaling"] == "linear":
        m.set("rope_factor", kind=float, file=arg("rotary_seq_len_interpolation_factor"), ask=ASK)
    if m["rope_scaling"] == "llama3":
        m.set("rope_factor", kind=float, file=arg("rope_scaling_factor"), default=(8.0, "megatron-core's default"))
        fixed = "fixed in megatron-core's RotaryEmbedding"
        m.set("rope_low_freq_factor", kind=float, default=(1.0, fixed))
        m.set("rope_high_freq_factor", kind=float, default=(4.0, fixed))
        m.set("rope_original_context", default=(8192, fixed))


def _activation(m: Measure) -> None:
    """SwiGLU where fc1 is gated; else GELU, whose fused kernel computes the tanh form and whose plain one the exact."""
    said = arguments(m.inventory)
    if m["gated"]:
        m.set("activation", kind=str, default=("silu", "--swiglu is the gated MLP of Megatron-LM"), choices=("silu",))
        return
    tanh = said.get("openai_gelu") is True or said.get("bias_gelu_fusion") is True
    why = "args.bias_gelu_fusion or openai_gelu: the tanh form" if tanh else "neither bias_gelu_fusion nor openai_gelu"
    known = lookup(m.inventory.extras, "args.bias_gelu_fusion") is not None
    default = ("gelu_new" if tanh else "gelu", why) if known else None
    ask = f"gelu (exact), or gelu_new (tanh), which --bias-gelu-fusion, the default, computes. {ASK}"
    m.set("activation", kind=str, default=default, ask=ask, choices=("gelu", "gelu_new"))


ARCH = Arch(
    name="megatron",
    title="Megatron-LM",
    source="NVIDIA/Megatron-LM, megatron-core",
    target="the class that its arguments describe",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.megatron:build",
)
