"""torchtune's Qwen3 (dense) under its own names."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure
from .llama_meta import hf_config as llama_config
from .torchtune import native_names, native_sizes

_WHY = "all of torchtune's qwen3 builders"


def detect(inv: Inventory) -> list[str]:
    """torchtune's names, with norms of q and k and no biases: of its builders only Qwen3's have them."""
    if not native_names(inv) or "layers.0.attn.q_norm.scale" not in inv or "layers.0.attn.q_proj.bias" in inv:
        return []
    return [
        "layers.N.attn.q_proj, sa_norm.scale and mlp.w1 are torchtune's names",
        "attn.q_norm and attn.k_norm are there, which only torchtune's Qwen3 has",
    ]


def dims(m: Measure) -> None:
    """Sizes from shapes; what the builders agree on is said as such, the rest is asked for."""
    native_sizes(m)
    norm = m.inventory.shape("layers.0.attn.q_norm.scale") or (None,)
    if m["head_dim"] is not None and norm[0] != m["head_dim"]:
        what = f"{m['heads']} heads are of {m['head_dim']} channels by q_proj, but of {norm[0]} by q_norm"
        m.problem(what, do="pass --set heads=N with the right number")
    m.set("norm_eps", kind=float, default=(1e-6, f"{_WHY}; the function they call has 1e-5"))
    m.set("rope_theta", kind=float, default=(1_000_000.0, _WHY))
    m.set("rope_scaling", kind=str, default=("none", "torchtune's Qwen3 has none"), choices=("none",))
    m.set("context", ask="max_seq_len of the builder: 32768 for those named base, 40960 for those named instruct")


def hf_config(d: Dims) -> dict[str, Any]:
    """Qwen3ForCausalLM's config.json."""
    shared = {key: value for key, value in llama_config(d).items() if key != "mlp_bias"}
    return {
        **shared,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": False,
        "sliding_window": None,
    }


ARCH = Arch(
    name="torchtune_qwen3",
    title="torchtune Qwen3",
    source="meta-pytorch/torchtune",
    target="Qwen3ForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torchtune:build_qwen3",
)
