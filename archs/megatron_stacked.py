"""Megatron-LM's torch_dist folders in the form in which all layers of one matrix are one tensor, [L, …].

Older releases of megatron-core save it so wherever all layers are alike. Sizes, class and config.json are those of
:mod:`.megatron`.
"""

from __future__ import annotations

from .base import Arch, Inventory
from .classes.megatron import hf_config
from .megatron import core_names, dims, has_experts, where


def detect(inv: Inventory) -> list[str]:
    """megatron-core's names without a layer's number, on tensors that have one dimension more."""
    shape = inv.shape("decoder.layers.self_attention.linear_qkv.weight")
    if not core_names(inv) or shape is None or len(shape) != 3 or has_experts(inv):
        return []
    names = "decoder.layers.self_attention.linear_qkv and linear_proj are megatron-core's names"
    return [names, f"each holds all {shape[0]} layers, as torch_dist stacks them", *where(inv)]


ARCH = Arch(
    name="megatron_stacked",
    title="Megatron-LM, layers stacked",
    source="NVIDIA/Megatron-LM, megatron-core (torch_dist)",
    target="the class that its arguments describe",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.megatron_stacked:build",
)
