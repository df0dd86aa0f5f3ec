"""megatron-core's GPTModel on weights that are stacked layer by layer: the same blocks, each given its slice."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..base import Value
from .megatron import GPT, Sizes, sizes_of


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device, from token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing, has the wrong type, or describes a model that this family can't be.
    """
    with torch.device("meta"):
        return StackedGPT(sizes_of(dims)).eval()


class StackedGPT(GPT):
    """The whole model."""

    def layers(self, sizes: Sizes) -> nn.Module:
        """The weights of all layers, [L, …] under the name that each has in one block."""
        self.block = (self.one(sizes, 0),)  # in a tuple, so that its parameters are not the model's
        held = nn.Module()
        for name, one in self.block[0].named_parameters():
            *path, leaf = name.split(".")
            at = held
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.register_parameter(leaf, nn.Parameter(torch.empty(sizes["layers"], *one.shape)))
        return held

    def run(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Hidden states [B, T, C] through all layers."""
        held = dict(self.decoder["layers"].named_parameters())
        for k in range(self.sizes["layers"]):
            x = functional_call(self.block[0], {name: stacked[k] for name, stacked in held.items()}, (x, table))
        return x
