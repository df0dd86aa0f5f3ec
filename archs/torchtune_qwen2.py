"""torchtune's Qwen2 and Qwen2.5 under its own names (torchtune_model_N.pt)."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure
from .llama_meta import hf_config as llama_config
from .torchtune import native_names, native_sizes

_BIASES = tuple(f"layers.0.attn.{name}_proj.bias" for name in "qkv")
_LLAMA_ONLY = ("attention_bias", "mlp_bias", "head_dim")


def detect(inv: Inventory) -> list[str]:
    """torchtune's names, with biases of q, k and v: of its builders only Qwen2's have them."""
    if not native_names(inv) or not all(name in inv for name in _BIASES) or "layers.0.attn.q_norm.scale" in inv:
        return []
    return [
        "layers.N.attn.q_proj, sa_norm.scale and mlp.w1 are torchtune's names",
        "attn.q_proj, k_proj and v_proj have biases, which only torchtune's Qwen2 has",
    ]


def dims(m: Measure) -> None:
    """Sizes from shapes; what the builders agree on is said as such, the rest is asked for."""
    native_sizes(m)
    hidden, heads, head = m["hidden"], m["heads"], m["head_dim"]
    if isinstance(heads, int) and isinstance(head, int) and heads * head != hidden:
        m.problem(f"{heads} heads of {head} channels are not the width {hidden}", do="pass --set heads=N")
    eps = "1e-6 in torchtune's qwen2 builders and most of qwen2_5, 1e-5 in its 14b_base, 32b_base and 72b_base"
    m.set("norm_eps", kind=float, ask=eps)
    m.set("rope_theta", kind=float, default=(1_000_000.0, "all of torchtune's qwen2 and qwen2_5 builders"))
    m.set("rope_scaling", kind=str, default=("none", "torchtune's Qwen2 has none"), choices=("none",))
    m.set("context", ask="max_seq_len of the builder: 32768, or 131072 for some of qwen2_5")


def hf_config(d: Dims) -> dict[str, Any]:
    """Qwen2ForCausalLM's config.json."""
    shared = {key: value for key, value in llama_config(d).items() if key not in _LLAMA_ONLY}
    return {
        **shared,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": None,
    }


ARCH = Arch(
    name="torchtune_qwen2",
    title="torchtune Qwen2",
    source="meta-pytorch/torchtune",
    target="Qwen2ForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torchtune:build_qwen2",
)
