"""OPT and language models of its shape: metaseq's reshard-model_part-N.pt or restored.pt, fairseq's checkpoints.

Both are decoders of fairseq's: learned positions that begin at row 2, ReLU, norms before or (350M) after the halves of
a block. Their cfg or args lie beside the weights.
"""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean, lookup
from .nanogpt import head_count

_L = "decoder.layers.0."
_EMBEDDING, _POSITIONS = "decoder.embed_tokens.weight", "decoder.embed_positions.weight"
_ACTIVATIONS = {"relu": "relu", "relu_squared": "relu2", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}
"""The trainers' names of activations, by those of transformers; ``gelu`` is another function in each of the two."""
_UNSERVED = {
    "alibi": "slopes on the distance of tokens (ALiBi) in the place of positions",
    "self_attn_doc_sep": "attention within one document",
    "layernorm_embedding": "a norm behind the embedding",
    "scale_attn": "norms inside the blocks",
    "scale_fc": "norms inside the blocks",
    "scale_heads": "a factor on every head",
}
_SCALE = (
    "true for every released OPT, whose embedding is taken as it stands; fairseq's default multiplies it by the root \
of its width (false)"
)


def detect(inv: Inventory) -> list[str]:
    """fairseq's names for a decoder without an encoder; Hugging Face calls the last norm and the class otherwise."""
    needed = (_EMBEDDING, _L + "fc1.weight", _L + "fc2.weight", _L + "self_attn.out_proj.weight")
    if not all(name in inv for name in needed) or _hugging_face(inv):
        return []
    if _L + "encoder_attn.out_proj.weight" in inv or "decoder.final_layer_norm.weight" in inv:
        return []
    because = [
        "decoder.embed_tokens, decoder.layers.N.self_attn.out_proj, fc1 and fc2 are names of fairseq and metaseq"
    ]
    if where := _settings(inv):
        because.append(f"{where} of its trainer lies beside the weights")
    return because


def _hugging_face(inv: Inventory) -> bool:
    return lookup(inv.extras, "config.architectures") is not None and not _settings(inv)


def _settings(inv: Inventory) -> str:
    """Where the trainer's options of the model are: ``cfg.model`` since fairseq 0.10.2, ``args`` before."""
    return next((where for where in ("cfg.model", "args") if isinstance(lookup(inv.extras, where), dict)), "")


def dims(m: Measure) -> None:
    """Sizes from the shapes; heads, activation and the place of the norms from the options."""
    where = _settings(m.inventory) or "cfg.model"
    _sizes(m, where)
    _structure(m, where)
    head_count(m, file=(f"{where}.decoder_attention_heads",), more="; it is decoder_attention_heads of the options")
    m.set("norm_eps", kind=float, default=(1e-5, "fairseq's LayerNorm"))
    _activation(m, where)
    _refuse(m, where)


def _activation(m: Measure, where: str) -> None:
    """metaseq's gelu is the tanh form, fairseq's the exact one (metaseq/modules/activation_functions.py)."""
    name = lookup(m.inventory.extras, f"{where}.activation_fn")
    if name is None:
        said = ("relu", "the default of fairseq's and metaseq's options, and every released OPT's")
    elif name != "gelu":
        said = (_ACTIVATIONS.get(str(name), str(name)), f"{where}.activation_fn: {name}")
    elif m["fused"] or m.inventory.ranks > 1 or lookup(m.inventory.extras, f"{where}.full_megatron_init") is not None:
        said = ("gelu_new", f"{where}.activation_fn: gelu, which in metaseq is the tanh form")
    else:
        said = ("gelu", f"{where}.activation_fn: gelu, which in fairseq is the exact form")
    m.set("activation", kind=str, default=said, choices=("relu", "relu2", "gelu", "gelu_new"))


def _sizes(m: Measure, where: str) -> None:
    inv, ranks = m.inventory, m.inventory.ranks
    rows, width = inv.shape(_EMBEDDING) or (0, None)
    ffn, hidden = inv.shape(_L + "fc1.weight") or (0, None)
    m.set(
        "layers", file=(f"{where}.decoder_layers",), shape=(inv.count("decoder.layers.{}.fc1.weight"), "decoder.layers")
    )
    m.set("hidden", file=(f"{where}.decoder_embed_dim",), shape=(hidden, "columns of fc1.weight"))
    m.set("vocab", shape=(rows * ranks, "rows of decoder.embed_tokens"))
    m.set("embedding", shape=(width, "columns of decoder.embed_tokens"))
    m.set("ffn", file=(f"{where}.decoder_ffn_embed_dim",), shape=(ffn * ranks, "rows of fc1.weight"))
    table = inv.shape(_POSITIONS)
    why = "rows of decoder.embed_positions, less two: positions begin behind the padding id 1"
    m.set("context", shape=(table[0] - 2 if table else None, why), ask="there is no decoder.embed_positions.weight")


def _structure(m: Measure, where: str) -> None:
    inv = m.inventory
    qkv = _L + "self_attn.qkv_proj.weight"
    fused = _has(m, "fused", qkv)
    bias = _has(m, "bias", _L + "fc1.bias")
    m.set("fused_bias", kind=boolean, shape=(fused and bias, "as its weight"))
    m.set("separate_bias", kind=boolean, shape=(bias and not fused, "as its weight"))
    affine = _has(m, "affine", _L + "final_layer_norm.weight")
    _has(m, "projected", "decoder.project_in_dim.weight")
    last = _has(m, "final_norm", "decoder.layer_norm.weight")
    shape = (
        (True, "there is a decoder.layer_norm, which models with norms after the halves do not have") if last else None
    )
    ask = "no norm stands behind the last block, so it may be either: false for OPT 350M"
    before = m.set("norm_before", kind=boolean, file=(f"{where}.decoder_normalize_before",), shape=shape, ask=ask)
    if before and not last and not affine:
        m.problem("norms have no weights here, so it is not known whether one stands behind the last block")
    if "decoder.embed_positions._float_tensor" in inv:
        do = "no class of vLLM's of this shape computes them (XGLM's is gone)"
        m.problem("positions are sinusoidal (decoder.embed_positions._float_tensor)", do=do)


def _has(m: Measure, name: str, tensor: str) -> bool:
    there = tensor in m.inventory
    m.set(name, kind=boolean, shape=(there, f"there is {'a' if there else 'no'} {tensor}"))
    return there


def _refuse(m: Measure, where: str) -> None:
    """Options whose effect OPTForCausalLM does not compute."""
    named = (f"{where}.no_scale_embedding",)
    silent = (False, f"{where} does not say it, and the trainers' own default is false")
    default = silent if isinstance(lookup(m.inventory.extras, where), dict) else None
    scaled = m.set("no_scale_embedding", kind=boolean, file=named, default=default, ask=_SCALE) is False
    if scaled:
        m.problem(
            "the embedding is multiplied by the root of its width (no_scale_embedding is false), not in OPT's class",
            do="multiply embed_tokens.weight by it, keep the old one as decoder.output_projection.weight, and pass "
            "--set no_scale_embedding=true",
        )
    for option, what in _UNSERVED.items():
        value = lookup(m.inventory.extras, f"{where}.{option}")
        if value not in (None, False, -1):
            m.problem(f"{where}.{option} is {value!r}: {what}", do="OPTForCausalLM computes none; no other class does")


def hf_config(d: Dims) -> dict[str, Any]:
    """OPTForCausalLM's config.json."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "word_embed_proj_dim": d["embedding"],
        "ffn_dim": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "max_position_embeddings": d["context"],
        "activation_function": d["activation"],
        "do_layer_norm_before": d["norm_before"],
        "_remove_final_layer_norm": not d["final_norm"],
        "enable_bias": d["bias"],
        "layer_norm_elementwise_affine": d["affine"],
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="opt",
    title="OPT",
    source="facebookresearch/metaseq, fairseq language models",
    target="OPTForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.opt:build",
)
