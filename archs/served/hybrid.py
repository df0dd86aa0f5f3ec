"""MdlHybridForCausalLM: the composable decoder where some layers have a recurrence, or all.

A class of its own, since vLLM asks the class, before any config, whether it has to keep states for requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers.mamba.mamba_utils import get_conv_copy_spec, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from ...errors import input_error
from ..decoder.recurrence import Recurrence
from ..decoder.schema import Decoder, decoder_of
from .decoder import MdlDecoderForCausalLM
from .decoder_recurrent import state_shapes, state_types

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum


def _recurrence(vllm_config: VllmConfig) -> Recurrence:
    return _of(decoder_of(vllm_config.model_config.hf_config.to_dict()))


def _of(d: Decoder) -> Recurrence:
    if d.recurrence is None:
        raise input_error("config.json has no recurrence", "config.json: architectures", "write MdlDecoderForCausalLM")
    return d.recurrence


class MdlHybridForCausalLM(MdlDecoderForCausalLM, HasInnerState, IsHybrid):
    """:class:`MdlDecoderForCausalLM`, with what vLLM needs to know of states before there is a model."""

    @classmethod
    def get_mamba_state_shape_from_config(  # pyright: ignore[reportIncompatibleMethodOverride]  # of any count
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """The shapes of one request's states, on one rank."""
        return state_shapes(_recurrence(vllm_config), vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Their types."""
        return state_types(_recurrence(vllm_config), vllm_config)

    def get_mamba_state_copy_func(  # pyright: ignore[reportIncompatibleMethodOverride]  # vLLM asks the model
        self,
    ) -> tuple[MambaStateCopyFunc, ...]:
        """How each is copied to the next block, as prefix caching does at the end of one: whole."""
        found = _of(self.d)
        if found.kind == "mamba2":
            return get_conv_copy_spec, get_temporal_copy_spec
        return (get_temporal_copy_spec,) * len(state_shapes(found, 1))

    def get_mamba_state_copy_funcs(  # pyright: ignore[reportIncompatibleMethodOverride]  # the same
        self, mamba_types: set[MambaAttentionBackendEnum]
    ) -> dict[MambaAttentionBackendEnum, tuple[MambaStateCopyFunc, ...]]:
        """The same by kind of state, of which there is one."""
        return dict.fromkeys(mamba_types, self.get_mamba_state_copy_func())
