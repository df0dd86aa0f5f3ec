"""karpathy/nanoGPT and build-nanogpt: the dict that their training scripts save, or its state dict alone."""

from __future__ import annotations

from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, boolean, lookup

_BLOCK = "transformer.h.{}."
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def detect(inv: Inventory) -> list[str]:
    """nanoGPT's names, learned positions, and c_attn stored [3C, C]; not minGPT, which has the same names."""
    because = fused_names(inv, "nanoGPT's")
    if not because or of_mingpt(inv):
        return []
    if lookup(inv.extras, "model_args.n_layer") is not None:
        because.append("the file holds model_args with n_layer, n_head, n_embd, as train.py saves them")
    elif _dataclass(inv):
        because.append("the file holds a GPTConfig with block_size, vocab_size, n_layer, as build-nanogpt saves it")
    return because


def fused_names(inv: Inventory, whose: str) -> list[str]:
    """The evidence of the names that nanoGPT and minGPT share, with c_attn as nn.Linear stores it; empty without them.

    Hugging Face's own GPT-2 has c_attn.weight [C, 3C].
    """
    wte, wpe = inv.shape(_EMBEDDING), inv.shape("transformer.wpe.weight")
    fused = inv.shape("transformer.h.0.attn.c_attn.weight")
    if wte is None or len(wte) != 2 or wpe is None or fused is None or fused != (3 * wte[1], wte[1]):
        return []
    return [
        f"transformer.wte, transformer.wpe and transformer.h.N.attn.c_attn are {whose} names",
        f"c_attn.weight is {list(fused)}: [3C, C] as nn.Linear stores it, not GPT-2's [C, 3C]",
    ]


def of_mingpt(inv: Inventory) -> bool:
    """Whether a checkpoint with these names is minGPT's: no hyperparameters in the file, masks, biases, an own head.

    nanoGPT saves model_args and, but for its first two weeks, has one tensor for head and embedding.
    """
    if lookup(inv.extras, "model_args") is not None or _dataclass(inv):
        return False
    head, embedding = inv.tensors.get(_HEAD), inv.tensors.get(_EMBEDDING)
    if not head or not embedding or head[0].storage == embedding[0].storage:
        return False
    return all(f"transformer.h.0.attn.{name}" in inv for name in ("bias", "c_attn.bias"))


def _dataclass(inv: Inventory) -> dict[str, Any]:
    """The fields of the model's GPTConfig, if the file holds that object as ``config``; nanoGPT has settings there.

    Those of train.py are many, and vocab_size is none of them.
    """
    config = inv.extras.get("config")
    fields = cast("dict[str, Any]", config) if isinstance(config, dict) else {}
    return fields if {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"} <= fields.keys() else {}


def dims(m: Measure) -> None:
    """Sizes from the shapes, checked against model_args or GPTConfig; the rest from there or asked for."""
    inv = m.inventory
    where = "config" if _dataclass(inv) and lookup(inv.extras, "model_args") is None else "model_args"
    fused_sizes(m, where)
    bias = "transformer.h.0.attn.c_attn.bias" in inv
    why = f"transformer.h.0.attn.c_attn.bias is {'there' if bias else 'not there'}"
    m.set("bias", kind=boolean, file=(f"{where}.bias",), shape=(bias, why))
    head_count(m, file=(f"{where}.n_head",))
    m.set("norm_eps", kind=float, default=(1e-5, "hard-wired in nanoGPT's model.py (and nn.LayerNorm's default)"))
    _activation(m, where)


def fused_sizes(m: Measure, where: str) -> None:
    """The sizes that the tensors tell, checked against n_layer, n_embd … in the extras under ``where``."""
    inv = m.inventory
    vocab, hidden = inv.shape(_EMBEDDING) or (None, None)
    context = (inv.shape("transformer.wpe.weight") or (None,))[0]
    ffn = (inv.shape("transformer.h.0.mlp.c_fc.weight") or (None,))[0]
    layers = inv.count(_BLOCK + "ln_1.weight")
    m.set("layers", file=(f"{where}.n_layer",), shape=(layers, "blocks transformer.h.0 … with a ln_1"))
    m.set("hidden", file=(f"{where}.n_embd",), shape=(hidden, "columns of transformer.wte.weight"))
    m.set("vocab", file=(f"{where}.vocab_size",), shape=(vocab, "rows of transformer.wte.weight"))
    m.set("context", file=(f"{where}.block_size",), shape=(context, "rows of transformer.wpe.weight"))
    m.set("ffn", shape=(ffn, "rows of transformer.h.0.mlp.c_fc.weight"))


def head_count(m: Measure, *, file: tuple[str, ...], default: tuple[int, str] | None = None, more: str = "") -> None:
    """The number of heads, which has to divide the width. ``more`` continues the question, where it has to be asked."""
    heads = m.set("heads", file=file, default=default, ask=f"q, k and v are square, so no shape tells{more}")
    hidden = m["hidden"]
    if isinstance(heads, int) and isinstance(hidden, int) and (heads < 1 or hidden % heads):
        m.problem(f"{heads} heads do not divide the width {hidden}", do="pass --set n_head=N with the right number")


def _activation(m: Measure, where: str) -> None:
    """The GELU form is not in the file: nanoGPT changed from the tanh form to the exact one in June 2023."""
    args = lookup(m.inventory.extras, where)
    default = None
    if isinstance(args, dict):
        if "bias" in args:
            default = (
                "gelu",
                "exact GELU: nanoGPT since June 2023 (older: --set activation=gelu_new)",
            )
        elif where == "config":
            default = ("gelu_new", "GPTConfig has no 'bias': build-nanogpt, whose train_gpt2.py has the tanh GELU")
        else:
            default = ("gelu_new", "model_args has no 'bias', so it is older than January 2023: the tanh GELU")
    ask = "gelu is the exact form (nanoGPT since June 2023), gelu_new the tanh form (before that, and build-nanogpt)"
    m.set("activation", kind=str, default=default, ask=ask, choices=("gelu", "gelu_new"))


def hf_config(d: Dims) -> dict[str, Any]:
    """GPT2LMHeadModel's config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": d["vocab"],
        **gpt2_sizes(d),
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": d["tied"],
    }


def gpt2_sizes(d: Dims) -> dict[str, Any]:
    """What every config.json of GPT2LMHeadModel says of sizes and of what is computed with them."""
    return {
        "n_positions": d["context"],
        "n_embd": d["hidden"],
        "n_layer": d["layers"],
        "n_head": d["heads"],
        "n_inner": d["ffn"],
        "activation_function": d["activation"],
        "layer_norm_epsilon": d["norm_eps"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


ARCH = Arch(
    name="nanogpt",
    title="nanoGPT",
    source="karpathy/nanoGPT, build-nanogpt",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.nanogpt:build",
)
