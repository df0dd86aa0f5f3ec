"""karpathy/nanoGPT: the dict that train.py saves, or its state dict alone."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean, lookup

_BLOCK = "transformer.h.{}."


def detect(inv: Inventory) -> list[str]:
    """nanoGPT's names, learned positions, and c_attn stored [3C, C] (Hugging Face's own GPT-2 has it [C, 3C])."""
    wte, wpe = inv.shape("transformer.wte.weight"), inv.shape("transformer.wpe.weight")
    fused = inv.shape("transformer.h.0.attn.c_attn.weight")
    if wte is None or len(wte) != 2 or wpe is None or fused is None or fused != (3 * wte[1], wte[1]):
        return []
    because = [
        "transformer.wte, transformer.wpe and transformer.h.N.attn.c_attn are nanoGPT's names",
        f"c_attn.weight is {list(fused)}: [3C, C] as nn.Linear stores it, not GPT-2's [C, 3C]",
    ]
    if lookup(inv.extras, "model_args.n_layer") is not None:
        because.append("the file holds model_args with n_layer, n_head, n_embd, as train.py saves them")
    return because


def dims(m: Measure) -> None:
    """Sizes from the shapes, checked against model_args; the rest from model_args or asked for."""
    inv = m.inventory
    vocab, hidden = inv.shape("transformer.wte.weight") or (None, None)
    context = (inv.shape("transformer.wpe.weight") or (None,))[0]
    ffn = (inv.shape("transformer.h.0.mlp.c_fc.weight") or (None,))[0]
    layers = inv.count(_BLOCK + "ln_1.weight")
    m.set("layers", file=("model_args.n_layer",), shape=(layers, "blocks transformer.h.0 … with a ln_1"))
    m.set("hidden", file=("model_args.n_embd",), shape=(hidden, "columns of transformer.wte.weight"))
    m.set("vocab", file=("model_args.vocab_size",), shape=(vocab, "rows of transformer.wte.weight"))
    m.set("context", file=("model_args.block_size",), shape=(context, "rows of transformer.wpe.weight"))
    m.set("ffn", shape=(ffn, "rows of transformer.h.0.mlp.c_fc.weight"))
    bias = "transformer.h.0.attn.c_attn.bias" in inv
    why = f"transformer.h.0.attn.c_attn.bias is {'there' if bias else 'not there'}"
    m.set("bias", kind=boolean, file=("model_args.bias",), shape=(bias, why))
    heads = m.set("heads", file=("model_args.n_head",), ask="q, k and v are square, so no shape tells")
    if isinstance(heads, int) and isinstance(hidden, int) and (heads < 1 or hidden % heads):
        m.problem(f"{heads} heads do not divide the width {hidden}", do="pass --set n_head=N with the right number")
    m.set("norm_eps", kind=float, default=(1e-5, "hard-wired in nanoGPT's model.py (and nn.LayerNorm's default)"))
    _activation(m)


def _activation(m: Measure) -> None:
    """The GELU form is not in the file: nanoGPT changed from the tanh form to the exact one in June 2023."""
    args = lookup(m.inventory.extras, "model_args")
    default = None
    if isinstance(args, dict):
        if "bias" in args:
            default = (
                "gelu",
                "exact GELU: nanoGPT since June 2023 (older: --set activation=gelu_new)",
            )
        else:
            default = ("gelu_new", "model_args has no 'bias', so it is older than January 2023: the tanh GELU")
    ask = "gelu is the exact form (nanoGPT since June 2023), gelu_new the tanh form (before that, and minGPT)"
    m.set("activation", kind=str, default=default, ask=ask, choices=("gelu", "gelu_new"))


def hf_config(d: Dims) -> dict[str, Any]:
    """GPT2LMHeadModel's config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": d["vocab"],
        "n_positions": d["context"],
        "n_embd": d["hidden"],
        "n_layer": d["layers"],
        "n_head": d["heads"],
        "n_inner": d["ffn"],
        "activation_function": d["activation"],
        "layer_norm_epsilon": d["norm_eps"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="nanogpt",
    title="nanoGPT",
    source="karpathy/nanoGPT",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.nanogpt:build",
)
