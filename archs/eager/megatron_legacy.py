"""Megatron-LM's GPTModel of before megatron-core: the same forward, on its names and in its orders of q, k and v.

Source: NVIDIA/Megatron-LM, megatron/model (later megatron/legacy/model), language_model.py and transformer.py; the
orders are those that fix_query_key_value_ordering in megatron/checkpointing.py sorts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..base import Value
from .megatron import GPT, sizes_of
from .parts import taken

_KINDS: dict[type, tuple[str, ...]] = {
    str: ("encoder", "attention", "input_norm", "second_norm", "final_norm", "qkv_order")
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device, from token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes, words = sizes_of(dims), taken(dims, _KINDS)
    with torch.device("meta"):
        return LegacyGPT(GPT(sizes), words, sizes["heads"], sizes["head_dim"]).eval()


class LegacyGPT(nn.Module):
    """Holds the weights under their own names, and lends them to megatron-core's model."""

    def __init__(self, core: GPT, words: Mapping[str, str], heads: int, size: int) -> None:
        super().__init__()
        self.core, self.order, self.heads, self.size = (core,), words["qkv_order"], heads, size
        self.names = {name: legacy_name(name, words) for name, _ in core.named_parameters()}
        for name, one in core.named_parameters():
            *path, leaf = self.names[name].split(".")
            at: nn.Module = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.register_parameter(leaf, nn.Parameter(torch.empty(one.shape)))

    def sorted(self, rows: Tensor) -> Tensor:
        """Rows of q, k and v, [3 H D] or [3 H D, C], in megatron-core's order: q, k and v of each head."""
        if self.order == "groups":
            return rows
        if self.order == "channels":
            return rows.unflatten(0, (self.heads, self.size, 3)).transpose(1, 2).flatten(0, 2)
        return rows.unflatten(0, (3, self.heads, self.size)).transpose(0, 1).flatten(0, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        own = dict(self.named_parameters())
        lent = {name: own[legacy] for name, legacy in self.names.items()}
        lent |= {name: self.sorted(rows) for name, rows in lent.items() if ".linear_qkv." in name}
        return functional_call(self.core[0], lent, (ids,))


def legacy_name(name: str, words: Mapping[str, str]) -> str:
    """The name that a tensor of megatron-core's had before."""
    if not name.startswith("decoder."):
        return f"language_model.{name}"
    modules = {
        "self_attention": words["attention"],
        "linear_qkv": "query_key_value",
        "linear_proj": "dense",
        "linear_fc1": "dense_h_to_4h",
        "linear_fc2": "dense_4h_to_h",
        "input_layernorm": words["input_norm"],
        "pre_mlp_layernorm": words["second_norm"],
        "final_layernorm": words["final_norm"],
    }
    path = ".".join(modules.get(part, part) for part in name.split(".")[1:])
    return f"language_model.{words['encoder']}.{path}"
