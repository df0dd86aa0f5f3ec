"""BLOOM with the activation that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from vllm.model_executor.models.bloom import BloomForCausalLM, BloomMLP

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MdlBloomForCausalLM(BloomForCausalLM):
    """vLLM's own BLOOM, but for the tanh form of GELU, where vLLM 0.32 computes the exact one.

    Source of the form: bigscience-workshop/Megatron-DeepSpeed, megatron/model/fused_bias_gelu.py, which transformers'
    class follows. Value by value, so every rank of a tensor-parallel run computes it on its own share.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if isinstance(module, BloomMLP):  # the layers of other pipeline stages are none
                module.gelu_impl = nn.GELU(approximate="tanh")
