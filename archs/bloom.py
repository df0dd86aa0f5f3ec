"""BLOOM as Megatron-DeepSpeed trained it: global_stepN/ with one file per layer and tensor-parallel rank.

The arguments of the run lie under ``args`` in mp_rank_00_model_states.pt beside them (megatron/arguments.py). After a
row-parallel matrix the ranks are summed first, and each then adds its own copy of the bias (megatron/mpu/layers.py), so
copies that drifted apart are averaged, as are those of the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, Value, boolean
from .classes.choosing import Unsupported, refuse_settings

_WORDS, _FIRST = "sequential.1.word_embeddings", "sequential.3"
_MISSING = "Megatron-DeepSpeed saves it under args in mp_rank_00_model_states.pt, which belongs beside the layer files"
_POSITIONS = {1: "rotary", 2: "absolute", 3: "alibi"}
"""megatron/enums.py, PositionEmbeddingType."""
_UNSUPPORTED: Unsupported = {
    "glu_activation": ((None,), "a gated MLP"),
    "num_experts": ((None, 1, [1]), "experts"),
}
_EPS = 1e-5


def detect(inv: Inventory) -> list[str]:
    """Megatron-DeepSpeed's names, by the numbers of modules in its pipeline: the embedding is 1, blocks start at 3."""
    needed = (f"{_WORDS}.weight", f"{_FIRST}.self_attention.query_key_value.weight")
    if not all(name in inv for name in (*needed, f"{_FIRST}.self_attention.dense.weight")):
        return []
    because = ["word_embeddings in module 1 of a pipeline and self_attention from 3 on are Megatron-DeepSpeed's names"]
    if inv.ranks > 1:
        because.append(f"{inv.ranks} tensor-parallel ranks")
    return because + (["the arguments of the run lie beside the weights"] if _arguments(inv) else [])


def _arguments(inv: Inventory) -> Mapping[str, Any]:
    found = inv.extras.get("args")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def dims(m: Measure) -> None:
    """Sizes from shapes, the rest from the arguments of the run; what neither says is asked for."""
    _sizes(m)
    said = _arguments(m.inventory)
    refuse_settings(m, "args", said, _UNSUPPORTED, "which BloomForCausalLM does not have")
    kind = said.get("position_embedding_type")
    known = (_POSITIONS.get(kind, str(kind)), "args.position_embedding_type") if kind is not None else None
    m.set("position", kind=str, default=known, ask=_MISSING, choices=("alibi",))
    m.set("context", file=("args.seq_length", "args.max_position_embeddings"), ask=_MISSING)
    eps = _setting(m, "norm_eps", "layernorm_epsilon", _EPS, float)
    if eps not in (_EPS, None):
        what = f"layernorm_epsilon is {eps}, but the norm behind the embedding always has {_EPS} (mpu/layers.py)"
        m.problem(what, do="BloomForCausalLM has one value for all: no class is known for this")
    _setting(m, "post_norm_residual", "apply_residual_connection_post_layernorm", False, boolean)
    _activation(m, said)


def _setting(m: Measure, name: str, key: str, default: Value, kind: Callable[[str], Value]) -> Value:
    """One argument; Megatron's default counts where there are arguments that do not speak of it."""
    known = (default, f"Megatron's default: args has no {key}") if _arguments(m.inventory) else None
    return m.set(name, kind=kind, file=(f"args.{key}",), default=known, ask=_MISSING)


def _sizes(m: Measure) -> None:
    inv = m.inventory
    layers = 0
    while f"sequential.{layers + 3}.self_attention.dense.weight" in inv:
        layers += 1
    rows, hidden = inv.shape(f"{_WORDS}.weight") or (0, None)
    m.set("layers", file=("args.num_layers",), shape=(layers, "modules 3, 4, … with a self_attention.dense"))
    m.set("hidden", file=("args.hidden_size",), shape=(hidden, "columns of word_embeddings"))
    why = "rows of word_embeddings; Megatron pads them: those behind the tokenizer's last token are untrained"
    m.set("vocab", file=("args.padded_vocab_size",), shape=(rows * inv.ranks or None, why))
    _structure(m)
    heads = m.set("heads", file=("args.num_attention_heads",), ask=f"no shape tells. {_MISSING}")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        m.unsettled("head_dim")
        return
    fused = (inv.shape(f"{_FIRST}.self_attention.query_key_value.weight") or (0,))[0] * inv.ranks
    if heads < 1 or hidden % heads or heads % inv.ranks or fused != 3 * hidden:
        what = f"{heads} heads of {hidden} channels do not fit query_key_value with {fused} rows in {inv.ranks} ranks"
        m.problem(what, do="pass --set num_attention_heads=N with the right number")
        return
    m.set("head_dim", shape=(hidden // heads, "hidden / heads"))


def _structure(m: Measure) -> None:
    """BloomForCausalLM has a norm behind the embedding, no table of positions, biases, and MLPs of four times the
    width."""
    inv, hidden = m.inventory, m["hidden"]
    for name in (f"{_WORDS}.norm.weight", f"{_FIRST}.input_layernorm.bias", f"{_FIRST}.self_attention.dense.bias"):
        if name not in inv:
            m.problem(f"there is no {name}: this GPT of Megatron-DeepSpeed is no BLOOM", do="no class is known for it")
    rows = (inv.shape(f"{_FIRST}.mlp.dense_h_to_4h.weight") or (0,))[0] * inv.ranks
    if isinstance(hidden, int) and rows != 4 * hidden:
        m.problem(
            f"mlp.dense_h_to_4h has {rows} rows, and BloomForCausalLM 4 x {hidden}", do="no class is known for it"
        )


def _activation(m: Measure, said: Mapping[str, Any]) -> None:
    """Which GELU: megatron/model/transformer.py, ParallelMLP."""
    tanh = said.get("bias_gelu_fusion") is True or said.get("openai_gelu") is True
    why = f"args.{'bias_gelu_fusion or openai_gelu: the tanh' if tanh else 'bias_gelu_fusion is off: the exact'} form"
    default = ("gelu_new" if tanh else "gelu", why) if "bias_gelu_fusion" in said else None
    ask = f"gelu_new (tanh), as BLOOM itself, or gelu (exact), if --no-bias-gelu-fusion was given. {_MISSING}"
    m.set("activation", kind=str, default=default, ask=ask, choices=("gelu_new", "gelu"))


def hf_config(d: Dims) -> dict[str, Any]:
    """BloomForCausalLM's config.json. vLLM's class of that name has the exact GELU; ours has the other."""
    return {
        "architectures": ["MdlBloomForCausalLM" if d["activation"] == "gelu_new" else "BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "n_layer": d["layers"],
        "n_head": d["heads"],
        "seq_length": d["context"],
        "layer_norm_epsilon": d["norm_eps"],
        "apply_residual_connection_post_layernorm": d["post_norm_residual"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="bloom",
    title="BLOOM",
    source="bigscience-workshop/Megatron-DeepSpeed",
    target="MdlBloomForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.bloom:build",
    served="mdl.archs.served.bloom:MdlBloomForCausalLM",
)
