"""DBRX with a loader that finds the experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.model_executor.models.dbrx import DbrxForCausalLM

if TYPE_CHECKING:
    from torch import Tensor

_STORED, _HELD = ".experts.mlp.", ".experts.routed_experts.mlp."


class MdlDbrxForCausalLM(DbrxForCausalLM):
    """vLLM's own DBRX; only its loader is told where vLLM 0.32 keeps the experts.

    That one (DbrxModel.load_weights) looks for ``blocks.0.ffn.experts.w13_weight``, which since the experts became a
    module of their own is ``blocks.0.ffn.experts.routed_experts.w13_weight``, and ends in a KeyError.
    """

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, the experts' stacks by the name of the module that holds them."""
        moved = any(".experts.routed_experts." in name for name, _ in self.named_parameters())
        return super().load_weights((name.replace(_STORED, _HELD) if moved else name, w) for name, w in weights)
