"""transformers' own class as the reference, loaded by transformers' own loader from the checkpoint's raw tensors.

The classes compute norms, softmax and rotary tables in float32 whatever the weights' type. For the float64 run that is
lifted: the exact logits are to be exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...errors import input_error
from ..base import Dims
from ..decoder.reading import checked, is_composed
from ..huggingface import hf_config
from ..targets import transformers_class


def build(dims: Dims) -> nn.Module:
    """The module for one checkpoint, without weights until ``load_state_dict``; our own class's twin for that one."""
    return of_config(hf_config(dims))


def of_config(config: Mapping[str, Any]) -> nn.Module:
    """What computes what the class of a config.json does, on that class's own names: transformers', or our twin."""
    if is_composed(config):
        from .decoder import assemble

        return assemble(checked(config))
    return HuggingFace(config)


class HuggingFace(nn.Module):
    """``forward(ids [B, T]) -> logits [B, T, V]`` in the precision of its parameters."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.cls = transformers_class(str(config["architectures"][0]))
        plain = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
        self.config = self.cls.config_class(**plain)
        self.model: nn.Module | None = None
        self.title = f"transformers' {self.cls.__name__}"

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load through ``from_pretrained``, which knows how stored names become those in memory.

        Raises MdlError (INPUT) if a tensor is missing, unexpected or of another shape.
        """
        del strict, assign  # always the former; whose memory it is does not matter here
        dtype = next((tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()), torch.float32)
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # what it would report is raised below
        with torch.device("cpu"):
            self.model, info = self.cls.from_pretrained(
                None,
                config=self.config,
                state_dict=dict(state_dict),
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",  # the grouped kernel takes no float64
                output_loading_info=True,
            )
        wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
        if wrong:
            what = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in wrong.items())
            raise input_error(f"transformers does not load this checkpoint whole: {what}", self.cls.__name__)
        return None

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The saved ones. Rotary frequencies keep their precision when the weights lose theirs, as when served."""
        kept = {
            id(buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        yield from ((name, buffer) for name, buffer in super().named_buffers(*args, **kwargs) if id(buffer) in kept)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """All positions at once, no cache."""
        assert self.model is not None, "load_state_dict comes first"  # noqa: S101 - a mistake of the caller
        exact = next(self.model.parameters()).dtype == torch.float64
        with self.exactly() if exact else nullcontext():
            return self.model(ids, use_cache=False).logits

    def exactly(self) -> Lifted:
        """What has to be around a float64 run of one of its modules."""
        return Lifted()


class Lifted(TorchFunctionMode):
    """Within it, what code casts to float32 by name is cast to float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: _wider(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*(_wider(a) for a in args), **kwargs)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
