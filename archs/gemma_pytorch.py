"""google/gemma_pytorch: Gemma 1, 2 and 3 (text) under the names of its model.py, as in gemma-2b-it.ckpt.

No settings lie beside the weights. The tensors tell the generation; their sizes tell which of the published models it
is, and with that what no tensor tells. Other sizes are somebody's own: then it is asked for.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from .base import Arch, Dims, Inventory, Measure, boolean
from .classes.choosing import heads_of_fused
from .llama_meta import decoder_config

_QKV = "model.layers.0.self_attn.qkv_proj.weight"
_EMBEDDERS = {"embedder.weight": "text", "text_token_embedder.weight": "images"}
_CLASSES = {
    1: ("GemmaForCausalLM", "gemma"),
    2: ("Gemma2ForCausalLM", "gemma2"),
    3: ("Gemma3ForCausalLM", "gemma3_text"),
}
_EVERY = {1: 0, 2: 2, 3: 6}
"""By generation: each layer of a number that this divides sees all positions, the others a window."""


class _Preset(Struct, frozen=True):
    """What a function of gemma/config.py hard-wires; ``factor`` by which the rotation of full layers is slowed."""

    name: str
    heads: int
    head_dim: int = 256
    scalar: int = 256
    window: int = 0
    context: int = 8192
    factor: float = 1.0


_PRESETS = {
    (1, 2048, 18): _Preset("2b", 8),
    (1, 3072, 28): _Preset("7b", 16),
    (2, 2304, 26): _Preset("2b-v2", 8, window=4096),
    (2, 3584, 42): _Preset("9b", 16, window=4096),
    (2, 4608, 46): _Preset("27b", 32, 128, 144, window=4096),
    (3, 1152, 26): _Preset("1b", 4, window=512, context=32_768),
    (3, 2560, 34): _Preset("4b", 8, window=1024, context=131_072, factor=8.0),
    (3, 3840, 48): _Preset("12b", 16, window=1024, context=131_072, factor=8.0),
    (3, 5376, 62): _Preset("27b_v3", 32, 128, 168, window=1024, context=131_072, factor=8.0),
}
"""By generation, width and number of layers."""
_OWN = "these are not the sizes of a published model, and gemma_pytorch saves no settings: see the GemmaConfig it had"


def detect(inv: Inventory) -> list[str]:
    """gemma_pytorch's embedder, and q, k and v in one matrix under Hugging Face's names of layers."""
    found = next((name for name in _EMBEDDERS if name in inv), "")
    if not found or _QKV not in inv or "model.layers.0.input_layernorm.weight" not in inv:
        return []
    return [f"{found} and model.layers.N.self_attn.qkv_proj are gemma_pytorch's names"]


def dims(m: Measure) -> None:
    """Sizes from shapes; the rest from the published model that has these sizes, or asked for."""
    inv = m.inventory
    name = next((n for n in _EMBEDDERS if n in inv), "embedder.weight")
    _refuse(m, images=_EMBEDDERS[name] == "images")
    vocab, width = inv.shape(name) or (None, None)
    layers = inv.count("model.layers.{}.input_layernorm.weight")
    blocks = (layers, "blocks model.layers.0 … with an input_layernorm")
    gate = inv.shape("model.layers.0.mlp.gate_proj.weight") or (None,)
    m.set("vocab", file=("config.vocab_size",), shape=(vocab, f"rows of {name}"))
    m.set("hidden", file=("config.hidden_size",), shape=(width, f"columns of {name}"))
    m.set("layers", file=("config.num_hidden_layers",), shape=blocks)
    m.set("ffn", file=("config.intermediate_size",), shape=(gate[0], "rows of mlp.gate_proj"))
    generation = _generation(m)
    preset = _PRESETS.get((generation, width or 0, layers))
    _heads(m, preset)
    _attention(m, generation, preset)
    _rotary(m, generation, preset)
    m.set("norm_eps", kind=float, file=("config.rms_norm_eps",), default=(1e-6, "every GemmaConfig of gemma_pytorch"))
    m.set("activation", kind=str, default=("gelu_pytorch_tanh", "fixed in gemma_pytorch's GemmaMLP"))


def _refuse(m: Measure, *, images: bool) -> None:
    if images:
        do = (
            "for its text part, save the embedder under the name embedder.weight with the tensors under model.*,"
            " without siglip_vision_model, mm_soft_embedding_norm and mm_input_projection; to show it images, serve"
            " Google's release for transformers, which vLLM reads as it is"
        )
        m.problem("text_token_embedder is that of the model that sees images too (Gemma3ForMultimodalLM)", do=do)
    if any(name.endswith(".weight_scaler") for name in m.inventory.tensors):
        do = "save weight * weight_scaler[:, None] as weight, and no weight_scaler; or take the release without -quant"
        m.problem("the matrices are 8-bit integers with a weight_scaler per row (a -quant release)", do=do)


def _generation(m: Measure) -> int:
    """1, 2 or 3, by the norms of a block."""
    block = "model.layers.0."
    around = f"{block}pre_feedforward_layernorm.weight" in m.inventory
    normed = f"{block}self_attn.query_norm.weight" in m.inventory
    m.set("norms_around", kind=boolean, shape=(around, f"there is {'a' if around else 'no'} pre_feedforward_layernorm"))
    m.set("norm_qk", kind=boolean, shape=(normed, f"there is {'a' if normed else 'no'} self_attn.query_norm"))
    if normed and not around:
        m.problem("q and k are normed, but there is no pre_feedforward_layernorm: no generation of Gemma has that")
    generation = 3 if normed else 2 if around else 1
    m.set("generation", shape=(generation, "its norms: around both halves since Gemma 2, of q and k since Gemma 3"))
    return generation


def _heads(m: Measure, preset: _Preset | None) -> None:
    """o_proj has heads x head_dim columns, qkv_proj (heads + 2 kv_heads) x head_dim rows."""
    inv = m.inventory
    rows = (inv.shape(_QKV) or (0,))[0]
    columns = (inv.shape("model.layers.0.self_attn.o_proj.weight") or (0, 0))[-1]
    norm = inv.shape("model.layers.0.self_attn.query_norm.weight")
    known = (columns // norm[0], "columns of o_proj / query_norm") if norm and norm[0] else None
    default = (preset.heads, f"{preset.name}, by its sizes") if preset else None
    heads = m.set("heads", file=("config.num_attention_heads",), shape=known, default=default, ask=_OWN)
    if not isinstance(heads, int):
        m.unsettled("head_dim")
        m.unsettled("kv_heads", "num_key_value_heads")
        return
    head, kv = heads_of_fused(m, heads, rows, columns, ("o_proj", "qkv_proj"))
    m.set("head_dim", shape=(head, f"{columns} columns of o_proj / {heads} heads"))
    why = f"{rows} rows of qkv_proj are (heads + 2 kv_heads) x head_dim"
    m.set("kv_heads", file=("config.num_key_value_heads",), shape=(kv, why))


def _attention(m: Measure, generation: int, preset: _Preset | None) -> None:
    """What Gemma 2 and 3 have of their own; the first generation computes what Llama does."""
    why = f"gemma_pytorch's {preset.name}, by its sizes" if preset else ""
    of_all = f"every config of Gemma {generation} in gemma_pytorch"
    caps = {1: (0.0, 0.0), 2: (50.0, 30.0), 3: (0.0, 0.0)}[generation]
    for name, key, cap in zip(("attention", "logit"), ("attn", "final"), caps, strict=True):
        default = (cap, of_all if cap else f"{of_all}: none")
        m.set(f"{name}_softcap", kind=float, file=(f"config.{key}_logit_softcapping",), default=default)
    known = generation == 1 or preset is not None
    window = (preset.window if preset else 0, why or "Gemma 1 has none")
    m.set("sliding_window", file=("config.sliding_window_size",), default=window if known else None, ask=_OWN)
    scalar = (preset.scalar if preset else m["head_dim"], why or "head_dim, as always in Gemma 1")
    own = f"{_OWN}; head_dim where that has none"
    m.set("attention_scalar", file=("config.query_pre_attn_scalar",), default=scalar if known else None, ask=own)
    every = _EVERY[generation]
    pattern = f"{of_all}: every {every}. layer sees all positions" if every else "Gemma 1 has no windows"
    m.set("full_every", default=(every, pattern))


def _rotary(m: Measure, generation: int, preset: _Preset | None) -> None:
    name = preset.name if preset else ""
    wired = "every config of Gemma 3 in gemma_pytorch" if generation == 3 else "fixed in gemma_pytorch's model.py"
    m.set("rope_theta", kind=float, default=(1_000_000.0 if generation == 3 else 10_000.0, wired))
    if generation == 3:
        m.set("rope_local_theta", kind=float, default=(10_000.0, wired))
        default = (preset.factor, f"gemma_pytorch's {name} has none") if preset else None
        if preset and preset.factor != 1:
            why = f"Gemma 3 {name} was trained with it, although gemma_pytorch's text-only class leaves it out"
            default = (preset.factor, why)
        m.set("rope_factor", kind=float, file=("config.rope_scaling_factor",), default=default, ask=f"{_OWN}; or 1")
    context = (preset.context, f"gemma_pytorch's {name}, by its sizes") if preset else None
    if name == "4b":
        context = (131_072, "what Gemma 3 4b was trained for, although gemma_pytorch's config leaves it at 8192")
    m.set("context", file=("config.max_position_embeddings",), default=context, ask=_OWN)


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class of its generation."""
    generation = d.integer("generation")
    name, model_type = _CLASSES[generation]
    activation = d["activation"]
    return {
        "architectures": [name],
        "model_type": model_type,
        **decoder_config(d, _rope_parameters(d)),
        # Gemma 1 and its successors have different names for one field
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": d["tied"],
        **(_windows(d) if generation > 1 else {}),
    }


def _rope_parameters(d: Dims) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": d["rope_theta"]}
    if d["generation"] != 3:
        return full
    if d["rope_factor"] != 1:
        full |= {"rope_type": "linear", "factor": d["rope_factor"]}
    local = {"rope_type": "default", "rope_theta": d["rope_local_theta"]}
    return {"full_attention": full, "sliding_attention": local}


def _windows(d: Dims) -> dict[str, Any]:
    every = d.integer("full_every")
    full = [every > 0 and (i + 1) % every == 0 for i in range(d.integer("layers"))]
    return {
        "query_pre_attn_scalar": d["attention_scalar"],
        "attn_logit_softcapping": d["attention_softcap"] or None,
        "final_logit_softcapping": d["logit_softcap"] or None,
        "sliding_window": d["sliding_window"],
        "layer_types": ["full_attention" if x else "sliding_attention" for x in full],
    }


ARCH = Arch(
    name="gemma_pytorch",
    title="Gemma",
    source="google/gemma_pytorch",
    target="GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.gemma_pytorch:build",
)
