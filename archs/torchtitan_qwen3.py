"""torchtitan's Qwen3 (dense) under each of the names that it had; the folders are those of its Llama 3."""

from __future__ import annotations

from .base import Arch, Inventory, Measure
from .torchtitan import CONTEXT, SEQ_LEN, block_heads, block_names, block_sizes
from .torchtune_qwen3 import hf_config

_ATT = "layers.0.attention."


def detect(inv: Inventory) -> list[str]:
    """torchtitan's names, with norms of q and k."""
    projections = (f"{_ATT}{name}.weight" for name in ("wq", "qkv_linear.wq", "qkv_linear.wqkv"))
    if not block_names(inv) or f"{_ATT}q_norm.weight" not in inv or not any(name in inv for name in projections):
        return []
    return [
        "layers.N.attention.wo, feed_forward.w1 and ffn_norm are torchtitan's names",
        "attention.q_norm and k_norm are there, as in its Qwen3",
    ]


def dims(m: Measure) -> None:
    """Sizes from shapes, the heads among them, for q_norm has the size of one; the rest is what all flavors have."""
    inv = m.inventory
    block_sizes(m)
    wo, norm = inv.shape(f"{_ATT}wo.weight") or (0, 0), inv.shape(f"{_ATT}q_norm.weight") or (1,)
    block_heads(m, (wo[1] // norm[0], f"{wo[1]} columns of wo / {norm[0]} channels of q_norm"), "")
    m.set("norm_eps", kind=float, default=(1e-6, "all of torchtitan's Qwen3 flavors"))
    m.set("rope_theta", kind=float, default=(1_000_000.0, "all of torchtitan's dense Qwen3 flavors"))
    m.set("rope_scaling", kind=str, default=("none", "no flavor of torchtitan's Qwen3 has one"), choices=("none",))
    m.set("context", file=SEQ_LEN, ask=CONTEXT)


ARCH = Arch(
    name="torchtitan_qwen3",
    title="torchtitan Qwen3",
    source="pytorch/torchtitan",
    target="Qwen3ForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torchtitan:build_qwen3",
)
