"""How mdl recognises a checkpoint of this decoder, measures it, and describes it to vLLM."""

from typing import Any

from mdl.archs.base import Arch, Dims, Inventory, Measure
from mdl.archs.decoder.reading import config_of


def detect(inv: Inventory) -> list[str]:
    """The evidence, in sentences; an empty list for "not this family"."""
    if "blocks.0.drift.into.weight" in inv and "blocks.0.drift.tilt" in inv:
        return ["blocks.N.drift.into and blocks.N.drift.tilt are Tide's names"]
    return []


def dims(m: Measure) -> None:
    """Settle every size and constant. What shapes say can't be overruled, so shapes come first."""
    inv = m.inventory
    vocab, width = inv.shape("embed.weight") or (None, None)
    channels, taps = inv.shape("blocks.0.drift.taps") or (None, None)
    inner = (inv.shape("blocks.0.ff.up.weight") or (None,))[0]
    layers = inv.count("blocks.{}.norm1.gain")
    looks = [i for i in range(layers) if f"blocks.{i}.glance.wqkv.weight" in inv]
    every = looks[0] + 1 if looks else 0
    if not every or looks != list(range(every - 1, layers, every)) or layers % every:
        m.problem(f"of {layers} blocks, {looks} have a glance", do="Tide has one in every so many, the last included")
        return
    m.set("layers", shape=(layers, "blocks.N that have a norm1"), file=("hp.depth",))
    m.set("every", shape=(every, f"blocks.{every - 1} is the first with a glance"), file=("hp.every",))
    m.set("spans", shape=(layers // every, "layers / every"))
    m.set("drifts", shape=(every - 1, "of each span, all but one"))
    m.set("hidden", shape=(width, "columns of embed.weight"), file=("hp.width",))
    m.set("vocab", shape=(vocab, "rows of embed.weight"), file=("hp.vocab",))
    m.set("ffn", shape=(inner, "rows of ff.up"), file=("hp.inner",))
    m.set("channels", shape=(channels, "rows of drift.taps"), file=("hp.channels",))
    m.set("taps", shape=(taps, "columns of drift.taps"), file=("hp.taps",))
    m.set("heads", file=("hp.heads",), ask="q, k and v lie in one matrix, so no shape tells")
    m.set("context", file=("hp.context",), default=(256, "what train.py has always used"))
    m.set("norm_eps", kind=float, file=("hp.eps",), default=(1e-5, "hard-wired before hp had eps"))


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of mdl's composable decoder, which docs/decoder.md explains."""
    norm = {"kind": "rms", "eps": d["norm_eps"]}
    return config_of(
        {
            "vocab_size": d["vocab"],
            "hidden_size": d["hidden"],
            "intermediate_size": d["ffn"],
            "num_hidden_layers": d["layers"],
            "num_attention_heads": d["heads"],
            "num_key_value_heads": d["heads"],
            "head_dim": d["hidden"] // d["heads"],
            "max_position_embeddings": d["context"],
            "tie_word_embeddings": d["tied"],
            "norm": {**norm, "place": "pre"},
            "positions": {"kind": "none"},
            "mlp": {"gated": False, "activation": "relu2"},
            "recurrence": {
                "kind": "gated",
                "layers": [i for i in range(d["layers"]) if (i + 1) % d["every"]],
                "width": d["channels"],
                "conv": d["taps"],
                "decay": "update",  # level + leak (value - level) = (1 - leak) level + leak value
                "input_scale": "complement",
                "gate_bias": True,
                "norm": norm,
                "output_gate": "silu",
            },
        }
    )


ARCH = Arch(
    name="tide",
    title="Tide",
    source="our own train.py",
    target="MdlHybridForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="tide_eager:build",
)
