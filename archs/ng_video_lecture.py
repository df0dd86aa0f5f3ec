"""karpathy/ng-video-lecture ("Let's build GPT"): gpt.py's state dict, with a module for every head.

The lecture's own head has a bias, for which no class that vLLM serves a GPT-2 by has a place; such checkpoints are
recognised and refused with the ways out. Those whose head has none become GPT-2.
"""

from __future__ import annotations

from .base import Arch, Inventory, Measure
from .nanogpt import hf_config

_HEADS = "blocks.0.sa.heads.{}.key.weight"


def detect(inv: Inventory) -> list[str]:
    """The lecture's names: tables of tokens and positions, a module for every head, ffwd.net."""
    needed = ("token_embedding_table.weight", "position_embedding_table.weight", "blocks.0.ffwd.net.2.weight")
    if not all(name in inv for name in (*needed, _HEADS.format(0))):
        return []
    return [
        "token_embedding_table and position_embedding_table are the names of the lecture's gpt.py",
        f"blocks.N.sa.heads.H: {inv.count(_HEADS)} heads, each with key, query and value of its own",
    ]


def dims(m: Measure) -> None:
    """Sizes from the shapes, heads among them; the scale of attention leaves no trace and is asked for."""
    inv = m.inventory
    vocab, hidden = inv.shape("token_embedding_table.weight") or (None, None)
    context = (inv.shape("position_embedding_table.weight") or (None,))[0]
    ffn = (inv.shape("blocks.0.ffwd.net.0.weight") or (None,))[0]
    heads, size = inv.count(_HEADS), (inv.shape(_HEADS.format(0)) or (0,))[0]
    m.set("layers", shape=(inv.count("blocks.{}.ln1.weight"), "blocks.0 … with a ln1"))
    m.set("hidden", shape=(hidden, "columns of token_embedding_table.weight"))
    m.set("vocab", shape=(vocab, "rows of token_embedding_table.weight"))
    m.set("context", shape=(context, "rows of position_embedding_table.weight"))
    m.set("ffn", shape=(ffn, "rows of blocks.0.ffwd.net.0.weight"))
    m.set("heads", shape=(heads, "blocks.0.sa.heads.0 … with a key"))
    m.set("norm_eps", kind=float, default=(1e-5, "nn.LayerNorm's default, which gpt.py takes"))
    m.set("activation", kind=str, default=("relu", "nn.ReLU() of gpt.py"), choices=("relu", "gelu", "gelu_new"))
    if heads * size != hidden:
        what = f"{heads} heads of {size} channels do not make up the width {hidden}"
        m.problem(what, do="GPT-2 has no such attention: train with a width that the number of heads divides")
    _scale(m)
    _head_bias(m)


def _scale(m: Measure) -> None:
    """q·k is multiplied by head_size^-0.5 since the lecture's correction, by n_embd^-0.5 before it."""
    ask = "head_size for head_size**-0.5 (gpt.py since 988848a), n_embd for C**-0.5 (before): see wei = in your Head"
    if m.set("attention_scale", kind=str, ask=ask, choices=("head_size", "n_embd")) == "n_embd":
        m.problem(
            "attention is scaled by n_embd**-0.5, which GPT-2 can't say",
            do="multiply every query.weight by n_head**-0.5 instead, and pass --set attention_scale=head_size",
        )


def _head_bias(m: Measure) -> None:
    """The lecture's lm_head is an nn.Linear with its bias."""
    if "lm_head.bias" in m.inventory:
        m.problem(
            "lm_head.bias: the head has a bias, which vLLM's GPT2LMHeadModel and OPTForCausalLM have no place for",
            do="train the head with bias=False for a while and convert that; or write an OPT folder with lm_head.bias "
            'and architectures ["TransformersForCausalLM"] by hand: vLLM\'s Transformers backend adds the bias',
        )


ARCH = Arch(
    name="ng_video_lecture",
    title="Let's build GPT, head without bias",
    source="karpathy/ng-video-lecture",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.ng_video_lecture:build",
)
