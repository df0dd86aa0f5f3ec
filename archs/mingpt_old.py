"""karpathy/minGPT before June 2022, and the many projects that grew out of it: a bare state dict, q, k, v apart."""

from __future__ import annotations

from .base import Arch, Inventory, Measure
from .nanogpt import head_count, hf_config


def detect(inv: Inventory) -> list[str]:
    """Early minGPT's names, with positions in a parameter of its own, [1, T, C]."""
    embedding, positions = inv.shape("tok_emb.weight"), inv.shape("pos_emb")
    parts = [inv.shape(f"blocks.0.attn.{part}.weight") for part in ("query", "key", "value", "proj")]
    if embedding is None or positions is None or len(positions) != 3 or "blocks.0.mlp.2.weight" not in inv:
        return []
    if any(shape != (embedding[1], embedding[1]) for shape in parts):
        return []
    return [
        "tok_emb, blocks.N.attn.query, key, value, proj and blocks.N.mlp.0, .2 are early minGPT's names",
        f"pos_emb is a parameter {list(positions)}, not the weight of an embedding",
    ]


def dims(m: Measure) -> None:
    """Sizes from the shapes; the file holds no hyperparameters, so the number of heads is asked for."""
    inv = m.inventory
    vocab, hidden = inv.shape("tok_emb.weight") or (None, None)
    positions = inv.shape("pos_emb") or ()
    context = positions[1] if len(positions) == 3 else None
    ffn = (inv.shape("blocks.0.mlp.0.weight") or (None,))[0]
    m.set("layers", shape=(inv.count("blocks.{}.ln1.weight"), "blocks.0 … with a ln1"))
    m.set("hidden", shape=(hidden, "columns of tok_emb.weight"))
    m.set("vocab", shape=(vocab, "rows of tok_emb.weight"))
    m.set("context", shape=(context, "the middle of pos_emb [1, T, C]"))
    m.set("ffn", shape=(ffn, "rows of blocks.0.mlp.0.weight"))
    head_count(m, file=(), more="; it is n_head of the GPTConfig in the training script")
    m.set("norm_eps", kind=float, default=(1e-5, "nn.LayerNorm's default, which minGPT's model.py takes"))
    gelu = ("gelu", "nn.GELU() of minGPT's model.py: the exact form, in every version with these names")
    m.set("activation", kind=str, default=gelu, choices=("gelu", "gelu_new"))


ARCH = Arch(
    name="mingpt_old",
    title="minGPT, early",
    source="karpathy/minGPT before June 2022",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.mingpt_old:build",
)
