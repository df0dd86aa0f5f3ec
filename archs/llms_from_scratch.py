"""rasbt/LLMs-from-scratch, chapters 4 to 7: GPTModel's state dict, bare or as ``model_state_dict``."""

from __future__ import annotations

from .base import Arch, Inventory, Measure, boolean
from .nanogpt import head_count, hf_config

_ATT = "trf_blocks.0.att."


def detect(inv: Inventory) -> list[str]:
    """The book's names for GPTModel: W_query, scale and shift, and a table of positions, which its Llamas lack."""
    needed = ("tok_emb.weight", "pos_emb.weight", "trf_blocks.0.norm1.scale", "final_norm.shift", "out_head.weight")
    if not all(name in inv for name in (*needed, _ATT + "W_query.weight", "trf_blocks.0.ff.layers.2.weight")):
        return []
    return [
        "trf_blocks.N.att.W_query, W_key, W_value and ff.layers.0, .2 are the names of the book's GPTModel",
        "norms have scale and shift, as its own LayerNorm has them",
    ]


def dims(m: Measure) -> None:
    """Sizes from the shapes; the file holds no hyperparameters, so the number of heads is asked for."""
    inv = m.inventory
    vocab, hidden = inv.shape("tok_emb.weight") or (None, None)
    context = (inv.shape("pos_emb.weight") or (None,))[0]
    ffn = (inv.shape("trf_blocks.0.ff.layers.0.weight") or (None,))[0]
    m.set("layers", shape=(inv.count("trf_blocks.{}.norm1.scale"), "trf_blocks.0 … with a norm1"))
    m.set("hidden", shape=(hidden, "columns of tok_emb.weight"))
    m.set("vocab", shape=(vocab, "rows of tok_emb.weight"))
    m.set("context", shape=(context, "rows of pos_emb.weight"))
    m.set("ffn", shape=(ffn, "rows of trf_blocks.0.ff.layers.0.weight"))
    bias = _ATT + "W_query.bias" in inv
    why = f"{_ATT}W_query.bias is {'there' if bias else 'not there'}"
    m.set("qkv_bias", kind=boolean, shape=(bias, why))
    more = "; it is n_heads of the cfg that GPTModel was built with (in the book 12, 16, 20 or 25)"
    head_count(m, file=(), more=more)
    m.set("norm_eps", kind=float, default=(1e-5, "hard-wired in the book's LayerNorm"))
    gelu = ("gelu_new", "the book's GELU is the tanh form")
    m.set("activation", kind=str, default=gelu, choices=("gelu_new", "gelu"))
    _generates(m)


def _generates(m: Measure) -> None:
    """Chapter 6 puts a classifier in the head's place."""
    head = m.inventory.shape("out_head.weight")
    if head is not None and head[0] != m["vocab"]:
        what = f"out_head has {head[0]} rows for a vocabulary of {m['vocab']}: chapter 6's classifier"
        m.problem(
            what,
            do="convert a checkpoint from before the head was replaced: a classifier generates no text",
        )


ARCH = Arch(
    name="llms_from_scratch",
    title="LLMs-from-scratch GPTModel",
    source="rasbt/LLMs-from-scratch",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.llms_from_scratch:build",
)
