"""EleutherAI's GPT-NeoX: global_stepN/ with one file per layer and tensor-parallel rank, and configs/ beside them.

Joining ranks follows what its forward adds (megatron/model/transformer.py): with parallel residuals each rank adds its
own bias of a row-parallel matrix before the ranks are summed, so biases are summed; without, every rank adds the same
one afterwards. Upstream's converter sums in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, Value, boolean
from .classes.choosing import Unsupported, refuse_settings

_FIRST = "sequential.2"
_MISSING = "GPT-NeoX's own settings, the .yml files, do not lie in configs/ beside the weights: put them there"
_UNSUPPORTED: Unsupported = {
    "use_mup": ((None, False), "muP's scales"),
    "sliding_window_width": ((None,), "a sliding window"),
    "use_qk_layernorm": ((None, False), "normed q and k"),
    "moe_num_experts": ((None, 0, 1), "experts"),
    "norm": ((None, "layernorm", "te_layernorm"), "other norms than LayerNorm"),
    "activation": ((None, "gelu"), "other activations than GELU"),
    "pos_emb": ((None, "rotary"), "other positions than rotary ones"),
}
"""Settings that GPTNeoXForCausalLM has nothing for, the values that it has, and what others mean."""
_GLOBAL = {"global", "flash"}


def detect(inv: Inventory) -> list[str]:
    """GPT-NeoX's names, under the number of a module in its pipeline."""
    needed = ("sequential.0.word_embeddings.weight", f"{_FIRST}.attention.query_key_value.weight")
    if not all(name in inv for name in (*needed, f"{_FIRST}.attention.dense.weight")):
        return []
    because = ["word_embeddings, attention.query_key_value and attention.dense are GPT-NeoX's names in a pipeline"]
    if inv.ranks > 1:
        because.append(f"{inv.ranks} tensor-parallel ranks")
    return because + (["its settings lie in configs/ beside the weights"] if _settings(inv) else [])


def _settings(inv: Inventory) -> Mapping[str, Any]:
    found = inv.extras.get("configs")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def dims(m: Measure) -> None:
    """Sizes from shapes and settings; what training set and inference depends on is never guessed without them."""
    _sizes(m)
    _names(m)
    said = _settings(m.inventory)
    refuse_settings(m, "configs", said, _UNSUPPORTED, "which GPTNeoXForCausalLM does not have")
    kinds = _words(said.get("attention_config")) - _GLOBAL
    if kinds:
        m.problem(f"configs.attention_config names {', '.join(sorted(kinds))}: no class of vLLM's has such attention")
    _setting(m, "context", "max_position_embeddings", None)
    _setting(m, "norm_eps", "layernorm_epsilon", 1e-5, float)
    _setting(m, "rope_theta", "rotary_emb_base", 10000.0, float)
    _rotary(m)
    _setting(m, "parallel_residual", "gpt_j_residual", False, boolean)
    if said.get("gpt_j_tied") is True and m["parallel_residual"]:
        m.problem("configs.gpt_j_tied: one norm for attention and MLP, where GPTNeoXForCausalLM has two")
    _activation(m)


def _setting(
    m: Measure,
    name: str,
    key: str,
    default: Value,
    kind: Callable[[str], Value] = int,
    shape: tuple[Value, str] | None = None,
) -> Value:
    """One setting; its default counts where there are settings that do not speak of it."""
    known = (default, f"GPT-NeoX's default: configs/ has no {key}") if _settings(m.inventory) else None
    return m.set(name, kind=kind, file=(f"configs.{key}",), shape=shape, default=known, ask=_MISSING)


def _words(value: Any) -> set[str]:
    """All words in lists within each other: [[["global", "local"], 12]]."""
    if isinstance(value, (list, tuple)):
        return {word for part in cast("list[Any]", value) for word in _words(part)}
    return {value} if isinstance(value, str) and value != "all" else set()


def _sizes(m: Measure) -> None:
    inv = m.inventory
    layers = 0
    while f"sequential.{layers + 2}.attention.dense.weight" in inv:
        layers += 1
    rows, hidden = inv.shape("sequential.0.word_embeddings.weight") or (0, None)
    m.set("layers", file=("configs.num_layers",), shape=(layers, "modules 2, 3, … with an attention.dense"))
    m.set("hidden", file=("configs.hidden_size",), shape=(hidden, "columns of word_embeddings"))
    why = "rows of word_embeddings; GPT-NeoX pads them: those behind the tokenizer's last token are untrained"
    m.set("vocab", file=("configs.padded_vocab_size",), shape=(rows * inv.ranks or None, why))
    heads = m.set("heads", file=("configs.num_attention_heads",), ask=f"no shape tells. {_MISSING}")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        m.unsettled("head_dim")
        return
    fused = (inv.shape(f"{_FIRST}.attention.query_key_value.weight") or (0,))[0] * inv.ranks
    if heads < 1 or hidden % heads or fused != 3 * hidden:
        what = f"{heads} heads of {hidden} channels do not fit query_key_value with {fused} rows"
        m.problem(
            what, do="it must be three rows for each channel: query heads that share key heads are not carried over"
        )
        return
    m.set("head_dim", shape=(hidden // heads, "hidden / heads"))


def _names(m: Measure) -> None:
    """The MLP's names changed in 2024; the norms must have biases."""
    inv = m.inventory
    new = f"{_FIRST}.mlp.linear1.weight" in inv
    up = "linear1" if new else "dense_h_to_4h"
    m.set("new_names", kind=boolean, shape=(new, f"the first matrix of an MLP is called {up}"))
    rows = (inv.shape(f"{_FIRST}.mlp.{up}.weight") or (0,))[0] * inv.ranks
    m.set("ffn", shape=(rows or None, f"rows of mlp.{up}"), ask="no MLP of a known name is here")
    for name in ("input_layernorm.bias", "attention.dense.bias", f"mlp.{up}.bias"):
        if f"{_FIRST}.{name}" not in inv:
            m.problem(f"there is no {name}: GPTNeoXForCausalLM has biases everywhere", do="no class is known for this")


def _rotary(m: Measure) -> None:
    """The first share of each head's channels turns, as halves. Old releases saved the frequencies, half as many."""
    size, held = m["head_dim"], m.inventory.shape(f"{_FIRST}.attention.rotary_emb.inv_freq")
    shape = None
    if isinstance(size, int) and held and "rotary_pct" not in _settings(m.inventory):
        shape = (2 * held[0] / size, f"rotary_emb.inv_freq has {held[0]} values for heads of {size} channels")
    share = _setting(m, "rotary_pct", "rotary_pct", 1.0, float, shape)
    if isinstance(share, float) and isinstance(size, int) and (int(share * size) < 2 or int(share * size) % 2):
        m.problem(f"rotary_pct {share} of {size} channels are no pairs", do="check num_attention_heads and rotary_pct")


def _activation(m: Measure) -> None:
    said = _settings(m.inventory)
    tanh = said.get("bias_gelu_fusion") is True
    why = (
        "configs.bias_gelu_fusion: training computed the tanh form; the config.json of released Pythias says gelu"
        if tanh
        else "no bias_gelu_fusion in configs/: training computed the exact form"
    )
    default = ("gelu_new" if tanh else "gelu", why) if said else None
    ask = f"gelu (exact), or gelu_new (tanh), if bias-gelu-fusion was set. {_MISSING}"
    m.set("activation", kind=str, default=default, ask=ask, choices=("gelu", "gelu_new"))


def hf_config(d: Dims) -> dict[str, Any]:
    """GPTNeoXForCausalLM's config.json."""
    rope = {"rope_type": "default", "rope_theta": d["rope_theta"], "partial_rotary_factor": d["rotary_pct"]}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "max_position_embeddings": d["context"],
        "rope_parameters": rope,
        "hidden_act": d["activation"],
        "layer_norm_eps": d["norm_eps"],
        "use_parallel_residual": d["parallel_residual"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="gpt_neox",
    title="GPT-NeoX, Pythia",
    source="EleutherAI/gpt-neox",
    target="GPTNeoXForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.gpt_neox:build",
)
