"""How mdl recognises a checkpoint of this mixture, measures it, and describes it to vLLM.

`mdl new` drafted it; its questions are answered, and what model.py hard-wires stands in hf_config.
"""

from typing import Any

from mdl.archs.base import Arch, Dims, Inventory, Measure
from mdl.archs.decoder.reading import config_of


def detect(inv: Inventory) -> list[str]:
    """The evidence, in sentences; an empty list for "not this family"."""
    known = ("tokens.weight", "blocks.0.mlp.gate_up.weight", "blocks.1.moe.balance")
    if all(name in inv for name in known):
        return ["it has " + ", ".join(known)]
    return []


def dims(m: Measure) -> None:
    """Settle every size and constant. What shapes say can't be overruled; what nothing says is asked for."""
    inv = m.inventory

    def size(name: str, axis: int) -> int | None:
        return (inv.shape(name) or (None, None))[axis]

    m.set("layers", shape=(inv.count("blocks.{}.norm1.gain"), "blocks.N that have a norm1"), file=("hp.depth",))
    m.set("hidden", shape=(size("tokens.weight", 1), "columns of tokens.weight"), file=("hp.width",))
    m.set("vocab", shape=(size("tokens.weight", 0), "rows of tokens.weight"), file=("hp.vocab",))
    m.set("ffn", shape=(size("blocks.0.mlp.down.weight", 1), "columns of mlp.down"), file=("hp.inner",))
    m.set("experts", shape=(size("blocks.1.moe.router.weight", 0), "rows of moe.router"), file=("hp.n_experts",))
    inner = size("blocks.1.moe.experts.0.down.weight", 1)
    m.set("expert_ffn", shape=(inner, "columns of an expert's down"), file=("hp.expert_inner",))
    shared = size("blocks.1.moe.shared.down.weight", 1)
    m.set("shared_ffn", shape=(shared, "columns of the shared expert's down"), file=("hp.shared_inner",))
    m.set("head_dim", file=("hp.head_dim",), ask="q is one matrix, so no shape tells how many heads it has")
    for name, matrix, key in (("heads", "wq", "hp.n_heads"), ("kv_heads", "wk", "hp.kv_heads")):
        rows, channels = size(f"blocks.0.attn.{matrix}.weight", 0), m["head_dim"]
        count = rows // channels if rows and isinstance(channels, int) and channels > 0 else None
        m.set(name, shape=(count, f"rows of attn.{matrix} / head_dim"), file=(key,))
    m.set("top_k", file=("hp.top_k",), ask="how many experts a token passes")
    m.set("rope_theta", kind=float, file=("hp.theta",), ask="the base of the rotary angles")
    m.set("context", file=("hp.context",), ask="the longest sequence that the model was trained for")
    m.set("scoring", kind=str, default=("sigmoid", "Mixture of model.py"), choices=("softmax", "sigmoid"))
    m.set("routed_scaling", kind=float, default=(2.5, "Mixture of model.py"))


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
            "norm": {"kind": "rms", "eps": 1e-6, "place": "pre"},
            "positions": {"kind": "rope", "theta": d["rope_theta"], "style": "half"},
            "mlp": {"gated": True, "activation": "silu"},
            "moe": {
                "experts": d["experts"],
                "experts_per_token": d["top_k"],
                "size": d["expert_ffn"],
                "layers": list(range(1, d["layers"])),
                "scoring": d["scoring"],
                "normalised": True,
                "scaling": d["routed_scaling"],
                "selection_bias": True,
                "shared_size": d["shared_ffn"],
            },
        }
    )


ARCH = Arch(
    name="flock",
    title="Flock",
    source="our own train.py",
    target="MdlDecoderForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="",
    reference="model.py:build",
)
