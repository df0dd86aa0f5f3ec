"""Mixtral in Mistral's own layout: experts one by one (mistral-inference) or stacked (the release of December 2023)."""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean
from .llama_meta import params_of
from .mistral_inference import common_config, common_sizes, where

_NEEDED = ("tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight")
_SINGLE = ("layers.0.feed_forward.gate.weight", "layers.0.feed_forward.experts.0.w1.weight")
_STACKED = ("layers.0.block_sparse_moe.gate.weight", "layers.0.block_sparse_moe.w1")


def detect(inv: Inventory) -> list[str]:
    """Meta's names for attention, and a router beside experts in place of the feed-forward."""
    if not all(name in inv for name in _NEEDED):
        return []
    if all(name in inv for name in _SINGLE):
        return ["layers.N.feed_forward.gate and feed_forward.experts.E.w1 are mistral-inference's names of experts"]
    if all(name in inv for name in _STACKED):
        return ["layers.N.block_sparse_moe.w1 holds all experts below one another, as Mixtral's first release does"]
    return []


def dims(m: Measure) -> None:
    """Sizes from shapes, checked against params.json; what is in neither is asked for."""
    inv = m.inventory
    stacked = _STACKED[1] in inv
    m.set("stacked", kind=boolean, shape=(stacked, f"there is {'a' if stacked else 'no'} block_sparse_moe.w1"))
    common_sizes(m)
    gate = inv.shape((_STACKED if stacked else _SINGLE)[0]) or (None,)
    counts, chosen = (
        where("moe.num_experts", "num_local_experts"),
        where("moe.num_experts_per_tok", "num_experts_per_tok"),
    )
    experts = m.set("experts", file=counts, shape=(gate[0], "rows of the router"))
    m.set("experts_per_token", file=chosen, ask="no shape tells; Mixtral 8x7B and 8x22B were trained with 2")
    rows = (inv.shape((_STACKED if stacked else _SINGLE)[1]) or (None,))[0]
    _ffn(m, rows, experts if stacked and isinstance(experts, int) else 1)
    _window(m)


def _ffn(m: Measure, rows: int | None, matrices: int) -> None:
    if rows is not None and (matrices < 1 or rows % matrices):
        m.problem(f"block_sparse_moe.w1 with {rows} rows does not hold {matrices} experts")
        rows = None
    shape = (rows // matrices if rows is not None else None, "rows of an expert's w1")
    m.set("ffn", file=where("hidden_dim", "intermediate_size"), shape=shape)


def _window(m: Measure) -> None:
    """vLLM's MixtralForCausalLM has no window, so one can't be passed on."""
    params = params_of(m.inventory)
    said = params.get("sliding_window") or params.get("_sliding_window")
    default = (str(said) if said else "none", f"params.json {'has one' if said else 'has none'}")
    m.set("sliding_window", kind=str, default=default)
    if m["sliding_window"] != "none":
        do = "pass --set sliding_window=none for Mixtral 8x7B, which was trained without"
        m.problem(f"sliding_window is {m['sliding_window']}, and vLLM's MixtralForCausalLM sees all positions", do=do)


def hf_config(d: Dims) -> dict[str, Any]:
    """MixtralForCausalLM's config.json."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **common_config(d),
        "sliding_window": None,
        "num_local_experts": d["experts"],
        "num_experts_per_tok": d["experts_per_token"],
    }


ARCH = Arch(
    name="mixtral",
    title="Mixtral",
    source="mistralai/mistral-inference",
    target="MixtralForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.mixtral:build",
)
