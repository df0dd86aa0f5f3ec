"""Mistral's own checkpoints: consolidated.00.pth or consolidated.safetensors with params.json, 7B to Nemo and Large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Arch, Dims, Inventory, Measure, Value, lookup
from .llama_meta import decoder_config, meta_names, params_of

_OWN = ("head_dim", "hidden_dim")
"""Keys that mistral-inference demands and Meta's params.json lacks; the tensors' names are the same."""
_ELSEWHERE = {
    "moe": "experts, which are the family mixtral's",
    "vision_encoder": "a model that sees images",
    "quantization": "quantised weights",
    "lora": "weights of an adapter, to be merged first",
    "yarn": "stretched rotary positions, which mistral-inference does not compute",
    "llama_4_scaling": "scaled queries, which mistral-inference does not compute",
}
_THETA = "mistral-inference takes 1000000 where params.json has none, but Mistral 7B v0.1 was trained with 10000"
_CONTEXT = "the length that the model was trained for is in its model card only, such as 32768 for Mistral 7B"


def detect(inv: Inventory) -> list[str]:
    """Meta's names with Mistral's keys in params.json; without any params.json the Llamas are candidates too."""
    if not meta_names(inv) or inv.ranks > 1 or lookup(inv.extras, "model_args") is not None:
        return []
    because = ["tok_embeddings, layers.N.attention.wq and layers.N.feed_forward.w1 are names that Mistral's code uses"]
    if "params" in inv.extras:
        if not all(key in params_of(inv) for key in _OWN):
            return []
        because.append(
            "params.json has head_dim and hidden_dim, which Mistral's code demands and Meta's does not write"
        )
    wq, width = inv.shape("layers.0.attention.wq.weight"), inv.shape("norm.weight")
    if wq and width and wq[0] != width[0]:
        because.append(f"wq has {wq[0]} rows and the width is {width[0]}: head_dim is not dim / n_heads")
    return because


def dims(m: Measure) -> None:
    """Sizes from shapes, checked against params.json; what is in neither is asked for."""
    params = params_of(m.inventory)
    for key, what in _ELSEWHERE.items():
        if params.get(key):
            do = "serve such a folder with vLLM's own --config-format mistral" if key != "moe" else "--arch mixtral"
            m.problem(f"params.json has {key}: {what}", do=do)
    common_sizes(m)
    w1 = m.inventory.shape("layers.0.feed_forward.w1.weight")
    m.set("ffn", file=where("hidden_dim"), shape=(w1[0] if w1 else None, "rows of feed_forward.w1"))
    _window(m, params)


def where(*keys: str) -> tuple[str, ...]:
    """The places in params.json that may hold a value."""
    return tuple(f"params.{key}" for key in keys)


_HEADS = {
    "heads": where("n_heads", "num_attention_heads"),
    "head_dim": where("head_dim"),
    "kv_heads": where("n_kv_heads", "num_key_value_heads"),
}


def common_sizes(m: Measure) -> None:
    """What every model in Mistral's layout has; the first release of Mixtral spells the keys as Hugging Face does."""
    inv = m.inventory
    layers, width = inv.count("layers.{}.attention_norm.weight"), inv.shape("norm.weight") or (None,)
    vocab = inv.shape("tok_embeddings.weight") or (None,)
    blocks = (layers, "blocks layers.0 … with an attention_norm")
    m.set("layers", file=where("n_layers", "num_hidden_layers"), shape=blocks)
    m.set("hidden", file=where("dim", "hidden_size"), shape=(width[0], "norm.weight"))
    m.set("vocab", file=where("vocab_size"), shape=(vocab[0], "rows of tok_embeddings"))
    head_sizes(m, "layers.0.attention.wq.weight", "layers.0.attention.wk.weight", _HEADS)
    m.set("norm_eps", kind=float, file=where("norm_eps", "rms_norm_eps"), ask="it leaves no trace in the shapes")
    m.set("rope_theta", kind=float, file=where("rope_theta"), ask=_THETA)
    m.set("rope_scaling", kind=str, default=("none", "mistral-inference has none"), choices=("none",))
    m.set("context", file=where("max_seq_len", "max_position_embeddings"), ask=_CONTEXT)


def head_sizes(
    m: Measure,
    q: str,
    k: str,
    files: Mapping[str, tuple[str, ...]],
    *,
    shape: tuple[Value, str] | None = None,
    default: tuple[Value, str] | None = None,
    ask: str = "head_dim is free, so no shape tells",
) -> None:
    """heads, head_dim, kv_heads of a model whose head_dim is free: only heads and the rows of q tell it.

    ``q`` and ``k`` name the projections of the first block; ``files`` the places that may hold each value; ``shape``
    and ``default`` tell the number of heads from elsewhere, and ``ask`` says why it is asked for.
    """
    rows, kv_rows = ((m.inventory.shape(name) or (None,))[0] for name in (q, k))
    heads = m.set("heads", file=files.get("heads", ()), shape=shape, default=default, ask=ask)
    for name in ("head_dim", "kv_heads"):
        m.unsettled(name, *(place.rpartition(".")[2] for place in files.get(name, ())))
    if not isinstance(heads, int) or rows is None or kv_rows is None:
        return
    head, rest = divmod(rows, heads) if heads > 0 else (0, 1)
    if rest or not head:
        m.problem(f"{heads} heads do not fit {q} with {rows} rows", do="pass --set heads=N with the right number")
        return
    m.set("head_dim", file=files.get("head_dim", ()), shape=(head, f"{rows} rows of {q} / {heads} heads"))
    kv, rest = divmod(kv_rows, head)
    if rest or not kv or heads % kv:
        what = f"{heads} heads of {head} channels do not fit {k} with {kv_rows} rows"
        m.problem(what, do="pass --set heads=N with the right number")
        return
    m.set("kv_heads", file=files.get("kv_heads", ()), shape=(kv, f"{kv_rows} rows of {k} / head_dim {head}"))


def _window(m: Measure, params: dict[str, Any]) -> None:
    keys = ("sliding_window", "_sliding_window")  # the second is what Mistral writes for vLLM's sake
    if any(isinstance(params.get(key), list) for key in keys):
        m.unsettled("sliding_window")
        m.problem("sliding_window is a list: layers with different windows", do="MistralForCausalLM has one for all")
        return
    default = None
    if params:
        default = (0, "params.json has no sliding_window: every position sees all before it")
    m.set("sliding_window", file=where(*keys), default=default, ask="0 where there is none; Mistral 7B v0.1 has 4096")


def hf_config(d: Dims) -> dict[str, Any]:
    """MistralForCausalLM's config.json."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **common_config(d),
        "sliding_window": d["sliding_window"] or None,
    }


def common_config(d: Dims) -> dict[str, Any]:
    """The fields that MistralForCausalLM and MixtralForCausalLM share."""
    return {
        **decoder_config(d, {"rope_type": "default", "rope_theta": d["rope_theta"]}),
        "attention_dropout": 0.0,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="mistral_inference",
    title="Mistral",
    source="mistralai/mistral-inference",
    target="MistralForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.mistral_inference:build",
)
