"""Hugging Face layouts: what save_pretrained wrote, under the names of the class that its config.json names.

Nothing is renamed. What conversion adds is safetensors in the place of pickles, one copy of what is tied, a chosen
type, a config.json that says everything, and the proof.
"""

from __future__ import annotations

from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, Value, lookup
from .targets import resolved

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "tok_embeddings"})
_NAMES: dict[str, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
"""What the classes call the sizes that mdl itself needs to know."""
_OPTIONAL = {"kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",)}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LEFT_OUT = frozenset({"torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"})
_OWN = frozenset({*_NAMES, "kv_heads", "tied"})
_OURS = {
    "BloomForCausalLM": ("MdlBloomForCausalLM", "vLLM's own computes the exact GELU, and BLOOM the tanh form"),
    "DbrxForCausalLM": ("MdlDbrxForCausalLM", "vLLM's own looks for the experts where it no longer keeps them"),
}
"""Classes that vLLM's of the same name does not compute: ours that does, and why it is needed."""


def detect(inv: Inventory) -> list[str]:
    """A config.json that names one class, beside tensors with an embedding by a name that such classes use."""
    config = _config(inv)
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(cast("list[Any]", classes)) != 1 or "model_type" not in config:
        return []
    if not any(name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS for name in inv.tensors):
        return []
    return [f"config.json beside the weights says architectures: [{classes[0]}], model_type: {config['model_type']}"]


def dims(m: Measure) -> None:
    """Every field of config.json as it stands, and the sizes that mdl needs, read from it or its class's defaults."""
    config = _config(m.inventory)
    if not config.get("architectures"):
        do = "put the config.json of this model beside the weights, or pass the --arch of the code that wrote them"
        m.problem("no config.json with architectures: [CLASS] lies beside the weights", do=do)
        return
    _refuse(m, config)
    for key, value in config.items():
        if key not in _LEFT_OUT:
            m.accept(key, value, f"config.json: {key}", config=True)
    ours, why = _OURS.get(str(config["architectures"][0]), ("", ""))
    if ours:
        m.accept("architectures", [ours], f"config.json: {config['architectures'][0]}, by a class of mdl's: {why}")
    theta = lookup(config, "attn_config.rope_theta")
    if theta is not None and "rope_parameters" not in config:  # DBRX; vLLM reads it there, transformers 5 elsewhere
        rope = {"rope_type": "default", "rope_theta": float(theta)}
        m.accept("rope_parameters", rope, f"config.json: attn_config.rope_theta is {theta}")
    own = [key for key in config if key in _OWN]
    if own:
        m.problem(f"config.json has the field {own[0]}, a name that mdl uses itself", do="rename it")
    plain = {key: m[key] for key in config if key not in _LEFT_OUT}
    full = resolved(plain)
    for name, keys in {**_NAMES, **_OPTIONAL}.items():
        key = next((k for k in keys if isinstance(full.get(k), int)), None)
        if key is not None and not (name == key and key in plain):
            m.accept(name, full[key], f"config.json: {key}" if key in plain else f"{key}, by default of the class")
        elif key is None and name in _NAMES:
            m.problem(f"config.json gives no {keys[0]}", do=f"pass --set {keys[0]}=VALUE")
    tied = "tie_word_embeddings"
    m.accept("tied", bool(full.get(tied)), f"{tied}: {full.get(tied)}" + ("" if tied in plain else ", by default"))


def _refuse(m: Measure, config: dict[str, Any]) -> None:
    """What this family can't carry over, by name."""
    if config.get("quantization_config"):
        what = f"the weights are quantised ({config['quantization_config'].get('quant_method', 'unknown')})"
        m.problem(what, do="vLLM reads most of these as they are; mdl verifies unquantised weights")
    name = str(config["architectures"][0])
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        m.problem(f"{name} is not a class that generates text", do="give the model with its language-model head")
    if "vision_config" in config or "audio_config" in config or config.get("is_encoder_decoder"):
        m.problem("this is not a text-only decoder", do="mdl converts decoders that map token ids to logits")


def _config(inv: Inventory) -> dict[str, Any]:
    config = inv.extras.get("config")
    return cast("dict[str, Any]", config) if isinstance(config, dict) and "architectures" in config else {}


def hf_config(d: Dims) -> dict[str, Any]:
    """The source's own config.json, and the fields that vLLM must not have to guess."""
    config: dict[str, Value] = {
        key: value for key, value in d.items() if key not in _OWN and (key not in _IDS or value is not None)
    }
    return {**config, "vocab_size": d["vocab"], "tie_word_embeddings": d["tied"]}


ARCH = Arch(
    name="huggingface",
    title="Hugging Face",
    source="save_pretrained",
    target="the class in config.json",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.huggingface:build",
)
