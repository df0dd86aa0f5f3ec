"""What every table of the composable decoder's config.json is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Activation = Literal[
    "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"
]
"""By transformers' names (transformers/activations.py): ``gelu`` is the exact form, ``gelu_new`` and
``gelu_pytorch_tanh`` the tanh form, ``gelu_fast`` that form with rounded constants, ``relu2`` the square of ReLU."""


class Table(BaseModel):
    """A part of the config: unknown keys are refused, and nothing is taken for what it is not."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NormKind(Table):
    """A normalisation: RMSNorm or LayerNorm, over the last axis.

    ``weight``: whether it has one (nanochat and OLMo 1 have none); ``unit_offset``: it multiplies by 1 + weight
    (Gemma); ``bias``: LayerNorm only.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: Annotated[float, Field(gt=0)]
    weight: bool = True
    bias: bool = False
    unit_offset: bool = False

    @model_validator(mode="after")
    def _can_be(self) -> NormKind:
        if self.bias and self.kind == "rms":
            raise ValueError("bias: RMSNorm has none (kind: layer has)")
        if not self.weight and (self.bias or self.unit_offset):
            raise ValueError("weight is false: then there is no bias and no unit_offset")
        if self.unit_offset and self.kind == "layer":
            raise ValueError("unit_offset: LayerNorm is served without it; add 1 to the weights in the mapping instead")
        return self
