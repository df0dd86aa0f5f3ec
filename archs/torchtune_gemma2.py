"""torchtune's Gemma 2 under its own names.

What torchtune computes is not Gemma 2: its tanh limits the last hidden state instead of the logits, and the two limits
are the other way round. No class that vLLM serves computes that. So what is served, and what the built-in forward
computes, is Gemma 2 as Google released it; every dim that this touches says so.
"""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure
from .torchtune import native_names, native_sizes
from .torchtune_gemma import hf_config as gemma_config

_WHY = "torchtune's gemma2_2b, 9b and 27b builders"
_LARGEST = (4608, 46)


def detect(inv: Inventory) -> list[str]:
    """torchtune's names with the norms behind attention and MLP that only its Gemma 2 has."""
    needed = ("norm.rms_norm.scale", "layers.0.sa_scale.scale", "layers.0.mlp_scale.scale")
    if not native_names(inv, last="norm.rms_norm.scale") or not all(name in inv for name in needed):
        return []
    return [
        "layers.N.attn.q_proj, sa_norm.scale and mlp.w1 are torchtune's names",
        "sa_scale, mlp_scale and norm.rms_norm are there, which only torchtune's Gemma 2 has",
    ]


def dims(m: Measure) -> None:
    """Sizes from shapes; what the builders hard-wire is said as such, and so is where torchtune is not Gemma 2."""
    native_sizes(m)
    m.set("norm_eps", kind=float, default=(1e-6, _WHY))
    m.set("rope_theta", kind=float, default=(10_000.0, _WHY))
    m.set("rope_scaling", kind=str, default=("none", "torchtune's Gemma 2 has none"), choices=("none",))
    m.set("activation", kind=str, default=("gelu_pytorch_tanh", "fixed in torchtune's gemma_mlp"))
    m.set("context", default=(8192, f"max_seq_len of {_WHY}"))
    m.set("sliding_window", default=(4096, f"{_WHY}, in every other layer from the first"))
    _scalar(m)
    _caps(m)


def _scalar(m: Measure) -> None:
    """What takes the place of head_dim under the root that divides the scores."""
    if (m["hidden"], m["layers"]) == _LARGEST:
        m.set("attention_scalar", default=(144, "query_pre_attn_scalar of torchtune's gemma2_27b"))
    elif m["head_dim"] is None:
        m.unsettled("attention_scalar")
    else:
        m.set("attention_scalar", default=(m["head_dim"], "head_dim, as in torchtune's gemma2_2b and gemma2_9b"))


def _caps(m: Measure) -> None:
    both = "torchtune's builders have 30 for the scores and 50 at the end, so its own logits differ"
    m.set("attention_softcap", kind=float, default=(50.0, f"Google's Gemma 2; {both}"))
    m.set("logit_softcap", kind=float, default=(30.0, f"Google's Gemma 2; {both}"))
    place = (
        "Google's Gemma 2, and the only place that vLLM's class has for it; torchtune limits the last hidden state "
        "instead, so its own logits differ, and those of weights that it trained long do so most"
    )
    m.set("softcap_of", kind=str, default=("logits", place), choices=("logits",))
    m.deviation(
        "served as Google's Gemma 2: torchtune's own logits differ, for it limits the last hidden state by 50 where "
        "Gemma 2 limits the logits by 30, and attention scores by 30 where Gemma 2 has 50"
    )


def hf_config(d: Dims) -> dict[str, Any]:
    """Gemma2ForCausalLM's config.json."""
    windowed = ["sliding_attention", "full_attention"]
    return {
        **gemma_config(d),
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": d["attention_scalar"],
        "attn_logit_softcapping": d["attention_softcap"],
        "final_logit_softcapping": d["logit_softcap"],
        "sliding_window": d["sliding_window"],
        "layer_types": [windowed[i % 2] for i in range(d.integer("layers"))],
    }


ARCH = Arch(
    name="torchtune_gemma2",
    title="torchtune Gemma 2",
    source="meta-pytorch/torchtune",
    target="Gemma2ForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torchtune_gemma2:build",
)
