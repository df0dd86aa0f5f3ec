"""Mistral's forward pass on the names of its own checkpoints: Meta Llama's, in a sliding window where there is one.

Source: mistralai/mistral-inference, transformer_layers.py and cache.py: with a window W a position sees the last W
positions, itself included (``make_local_attention(W)``). Rotary positions lie on neighbouring pairs of channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace
from torch import nn

from ..base import Value
from .llama_meta import assemble, sizes_of
from .parts import take


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing or describes a model that this family can't be.
    """
    return assemble(replace(sizes_of(dims), window=take(dims, "sliding_window", int)))
