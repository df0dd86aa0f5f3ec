"""What may stand in the place of attention: recurrences, whose state has one size however long the text is.

One kind for each model, in ``layers`` (all if null), beside attention in the others. States are kept in float32.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .tables import Activation, NormKind, Positive, Table


class Gated(Table):
    """A number for each channel, carried on by a gate: h_t = a_t · h_(t-1) + s_t · i_t · v_t, and o_proj(h) is put out.

    v is ``value_proj`` x, through a causal convolution of each channel over its last ``conv`` positions where there is
    one, then ``value_activation`` (``mingru``: x + 1/2 above 0, sigmoid below, arXiv 2410.01201). Gates are sigmoids of
    projections of x, or of the convolved values (``gates_from: value``, before their activation). ``decay`` says what
    a is, f being what ``decay_proj`` gives: ``forget`` sigmoid(f); ``update`` 1 - sigmoid(f) (minGRU's z);
    ``power`` exp(-``power`` · sigmoid(f) · softplus(decay_rate)) (RG-LRU of Griffin, arXiv 2402.19427, with c = 8).
    With ``decay_floor``, a learned bound l for each channel: l + (1 - l) · a (HGRN, arXiv 2311.04823).
    ``input_gate``: i = sigmoid(input_proj …), else 1. ``input_scale`` is s: ``complement`` 1 - a, ``root``
    sqrt(1 - a²), ``root_after_first`` the same but 1 at the first position (as Griffin was released), ``one``.
    Then ``norm`` over all channels, and the product with ``output_gate`` of ``gate_proj`` x.
    """

    kind: Literal["gated"]
    layers: list[int] | None = None
    width: Positive
    value_activation: Activation | Literal["mingru"] | None = None
    conv: Annotated[int, Field(gt=1)] | None = None
    conv_bias: bool = False
    gates_from: Literal["stream", "value"] = "stream"
    decay: Literal["forget", "update", "power"]
    power: Annotated[float, Field(gt=0)] | None = None
    decay_floor: bool = False
    input_gate: bool = False
    input_scale: Literal["complement", "root", "root_after_first", "one"] = "complement"
    norm: NormKind | None = None
    output_gate: Activation | None = None
    bias: bool = False
    gate_bias: bool = False
    out_bias: bool = False

    @model_validator(mode="after")
    def _can_be(self) -> Gated:
        if (self.decay == "power") != (self.power is not None):
            raise ValueError("power: decay power needs it (Griffin's c is 8), and nothing else has one")
        if self.decay_floor and self.decay == "power":
            raise ValueError("decay_floor: decay power has none")
        if self.conv_bias and self.conv is None:
            raise ValueError("conv_bias: there is no convolution (conv is null)")
        return self


class LinearAttention(Table):
    """A matrix for each head: S_t = diag(g_t) S_(t-1) + k_t v_tᵀ, of which ``scale`` · q_t S_t is put out.

    ``feature`` is applied to q and k (``elu``: elu + 1, arXiv 2006.16236); there is no division by a sum of keys.
    ``decay``: ``fixed`` the head's number of ``rates`` (RetNet, arXiv 2307.08621; lightning attention, 2401.04658: of a
    slope, exp(-slope)); ``head`` and ``channel`` sigmoid(decay_proj x)^(1 / ``temperature``), one for each head or one
    for each channel of its keys (GLA, 2312.06635, with temperature 16). Then ``norm`` of each head or over all, and
    the product with ``output_gate`` of ``gate_proj`` x. ``scale`` is key_size^-0.5 if null.
    """

    kind: Literal["linear_attention"]
    layers: list[int] | None = None
    heads: Positive
    key_size: Positive
    value_size: Positive
    feature: Literal["silu", "relu", "elu"] | None = None
    scale: float | None = None
    decay: Literal["fixed", "head", "channel"]
    rates: list[Annotated[float, Field(gt=0, le=1)]] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    norm: NormKind | None = None
    norm_over: Literal["head", "all"] = "head"
    output_gate: Activation | None = None
    bias: bool = False
    decay_bias: bool = False
    out_bias: bool = False

    @model_validator(mode="after")
    def _can_be(self) -> LinearAttention:
        fixed = self.decay == "fixed"
        if fixed != (self.rates is not None):
            raise ValueError("rates: decay fixed needs them, one for each head, and nothing else has any")
        if self.rates is not None and len(self.rates) != self.heads:
            raise ValueError(f"rates: {len(self.rates)} of them for {self.heads} heads")
        if fixed and (self.decay_bias or self.temperature is not None):
            raise ValueError("decay_bias, temperature: decay fixed has none")
        return self


class Mamba2(Table):
    """Mamba 2's mixer (arXiv 2405.21060), as vLLM has it: the gate before a norm over each group of channels.

    ``chunk`` cuts the sum over the past; it moves nothing but the rounding.
    """

    kind: Literal["mamba2"]
    layers: list[int] | None = None
    heads: Positive
    head_size: Positive
    groups: Positive = 1
    state: Positive
    conv: Annotated[int, Field(gt=1)] = 4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: Annotated[float, Field(gt=0)]
    chunk: Positive = 256

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_size

    @property
    def convolved(self) -> int:
        """Channels of the convolution: the heads', and B and C of every group."""
        return self.inner + 2 * self.groups * self.state

    @model_validator(mode="after")
    def _can_be(self) -> Mamba2:
        if self.heads % self.groups:
            raise ValueError(f"groups: {self.heads} heads can't share {self.groups} groups evenly")
        return self


Recurrence = Annotated[Gated | LinearAttention | Mamba2, Field(discriminator="kind")]
