"""How mdl recognises a checkpoint of this decoder, measures it, and describes it to vLLM.

`mdl new` drafted it; its questions are answered, and what model.py hard-wires stands in hf_config.
"""

from typing import Any

from mdl.archs.base import Arch, Dims, Inventory, Measure, boolean
from mdl.archs.decoder.reading import config_of


def detect(inv: Inventory) -> list[str]:
    """The evidence, in sentences; an empty list for "not this family"."""
    known = ("embed.weight", "blocks.0.behind1.weight", "blocks.0.attn.valve.weight")
    if all(name in inv for name in known):
        return ["it has " + ", ".join(known)]
    return []


def dims(m: Measure) -> None:
    """Settle every size and constant. What shapes say can't be overruled; what nothing says is asked for."""
    inv = m.inventory
    vocab, width = inv.shape("embed.weight") or (None, None)
    head = (inv.shape("blocks.0.attn.q_norm.gain") or (None,))[0]
    queries = (inv.shape("blocks.0.attn.proj.weight") or (None, None))[1]
    fused = (inv.shape("blocks.0.attn.qkv.weight") or (None,))[0]
    m.set("layers", shape=(inv.count("blocks.{}.norm1.weight"), "blocks.N that have a norm1"), file=("cfg.depth",))
    m.set("hidden", shape=(width, "columns of embed.weight"), file=("cfg.width",))
    m.set("vocab", shape=(vocab, "rows of embed.weight"), file=("cfg.vocab",))
    inner = (inv.shape("blocks.0.ff.up.weight") or (None,))[0]
    m.set("ffn", shape=(inner, "rows of ff.up"), file=("cfg.inner",))
    m.set("head_dim", shape=(head, "rows of attn.q_norm"), file=("cfg.head_size",))
    heads = queries // head if queries and head else None
    keys = (fused - queries) // (2 * head) if fused and queries and head else None
    m.set("heads", shape=(heads, "columns of attn.proj / head_dim"), file=("cfg.n_head",))
    m.set("kv_heads", shape=(keys, "half the rows of attn.qkv behind the queries / head_dim"), file=("cfg.kv_groups",))
    m.set("rotated", file=("cfg.rotated",), ask="how many channels of a head are rotated leaves no trace in shapes")
    m.set("rope_theta", kind=float, file=("cfg.base",), ask="the base of the rotary angles")
    m.set("context", file=("cfg.context",), ask="the longest sequence that the model was trained for")
    pairs = ("interleaved", "rotate() of model.py turns 2j and 2j+1")
    m.set("rotary_style", kind=str, default=pairs, choices=("half", "interleaved"))
    m.set("qk_norm_after_rotary", kind=boolean, default=(True, "model.py norms what rotate() gives"))


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of mdl's composable decoder, which docs/decoder.md explains."""
    return config_of(
        {
            "vocab_size": d["vocab"],
            "hidden_size": d["hidden"],
            "intermediate_size": d["ffn"],
            "num_hidden_layers": d["layers"],
            "num_attention_heads": d["heads"],
            "num_key_value_heads": d["kv_heads"],
            "head_dim": d["head_dim"],
            "max_position_embeddings": d["context"],
            "tie_word_embeddings": d["tied"],
            "norm": {"kind": "layer", "eps": 1e-5, "bias": True, "place": "sandwich"},  # nn.LayerNorm's default eps
            "positions": {
                "kind": "rope",
                "theta": d["rope_theta"],
                "style": d["rotary_style"],
                "rotary_dim": d["rotated"],
            },
            "attention": {
                "qk_norm": {"kind": "rms", "eps": 1e-6, "over": "head", "after_rotary": d["qk_norm_after_rotary"]},
                "gate": "head",
            },
            "mlp": {"gated": False, "activation": "relu2", "bias": True, "out_bias": True},
            "logit_softcap": 30.0,
        }
    )


ARCH = Arch(
    name="kiln",
    title="Kiln",
    source="our own train.py",
    target="MdlDecoderForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="",
    reference="model.py:build",
)
