"""torchtune's Gemma (the first generation) under its own names (torchtune_model_N.pt)."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure
from .llama_meta import hf_config as llama_config
from .torchtune import detect as llama_detect
from .torchtune import native_sizes

_WHY = "torchtune's gemma_2b and gemma_7b builders"


def detect(inv: Inventory) -> list[str]:
    """torchtune's names without an output: Gemma is tied always. So is Llama 3.2, hence mdl asks."""
    if "output.weight" in inv or not llama_detect(inv):
        return []
    return [
        "layers.N.attn.q_proj, sa_norm.scale and mlp.w1 are torchtune's names",
        "there is no output.weight: Gemma is tied",
    ]


def dims(m: Measure) -> None:
    """Sizes from shapes; what both builders hard-wire is said as such."""
    native_sizes(m)
    m.set("norm_eps", kind=float, default=(1e-6, _WHY))
    m.set("rope_theta", kind=float, default=(10_000.0, _WHY))
    m.set("rope_scaling", kind=str, default=("none", "torchtune's Gemma has none"), choices=("none",))
    m.set("activation", kind=str, default=("gelu_pytorch_tanh", "fixed in torchtune's gemma_mlp"))
    m.set("context", default=(8192, f"max_seq_len of {_WHY}"))


def hf_config(d: Dims) -> dict[str, Any]:
    """GemmaForCausalLM's config.json."""
    shared = {key: value for key, value in llama_config(d).items() if key != "mlp_bias"}
    activation = d["activation"]
    return {
        **shared,
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": activation,
        "hidden_activation": activation,
    }


ARCH = Arch(
    name="torchtune_gemma",
    title="torchtune Gemma",
    source="meta-pytorch/torchtune",
    target="GemmaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torchtune:build_gemma",
)
