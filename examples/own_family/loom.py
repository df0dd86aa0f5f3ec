"""How mdl recognises a checkpoint of this decoder, measures it, and describes it to vLLM."""

from typing import Any

from mdl.archs.base import Arch, Dims, Inventory, Measure


def detect(inv: Inventory) -> list[str]:
    """The evidence, in sentences; an empty list for "not this family"."""
    if "blocks.0.mixer.wqkv.weight" in inv and "blocks.0.ff.gate_up.weight" in inv:
        return ["blocks.N.mixer.wqkv and blocks.N.ff.gate_up are Loom's names"]
    return []


def dims(m: Measure) -> None:
    """Settle every size and constant. What shapes say can't be overruled, so shapes come first."""
    inv = m.inventory
    vocab, width = inv.shape("embed.weight") or (None, None)
    down = inv.shape("blocks.0.ff.down.weight") or (None, None)
    m.set("layers", shape=(inv.count("blocks.{}.norm1.gain"), "blocks.N that have a norm1"), file=("hp.depth",))
    m.set("hidden", shape=(width, "columns of embed.weight"), file=("hp.width",))
    m.set("vocab", shape=(vocab, "rows of embed.weight"), file=("hp.vocab",))
    m.set("ffn", shape=(down[1], "columns of ff.down"), file=("hp.inner",))
    m.set("heads", file=("hp.heads",), ask="q, k and v lie in one matrix, so no shape tells")
    m.set("kv_heads", file=("hp.groups",), ask="q, k and v lie in one matrix, so no shape tells")
    m.set("head_dim", file=("hp.size",), ask="q, k and v lie in one matrix, so no shape tells")
    m.set("context", file=("hp.context",), default=(256, "what train.py has always used"))
    m.set("norm_eps", kind=float, file=("hp.eps",), default=(1e-5, "hard-wired before hp had eps"))
    m.set("rope_theta", kind=float, file=("hp.theta",), default=(10000.0, "hard-wired before hp had theta"))


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of LlamaForCausalLM; the names are transformers' own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": d["context"],
        "rms_norm_eps": d["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": d["rope_theta"]},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="loom",
    title="Loom",
    source="our own train.py",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="loom_eager:build",
)
