"""What config.json of MdlDecoderForCausalLM may say: every choice by name, and the combinations that can't be.

The fields that vLLM itself reads have Hugging Face's names (``hidden_size``, ``num_key_value_heads`` …) and lie at the
top; what only this class knows lies in tables (``norm``, ``positions``, ``attention``, ``mlp``, ``moe``, ``residual``,
``recurrence``).
The eager twin (archs/eager/decoder.py) and the served class (archs/served/decoder.py) are built from the same record.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .recurrence import Recurrence
from .tables import Activation, NormKind, Positive, Table


class Norm(NormKind):
    """The norms of the residual stream, and where they stand.

    ``place``: ``pre`` x + f(N(x)); ``post`` N(x + f(x)) (the first transformers); ``output`` x + N(f(x)) (OLMo 2);
    ``sandwich`` x + N(f(N(x))) (Gemma 2). ``embedding``: one behind the embedding (BLOOM, nanochat); ``final``: one
    before the head.
    """

    place: Literal["pre", "post", "output", "sandwich"] = "pre"
    final: bool = True
    embedding: bool = False


class RopeScaling(Table):
    """How rotations are slowed down for a longer context. Field names are those of Hugging Face's rope_parameters."""

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        needs = {
            "linear": (),
            "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow"),
        }[self.rope_type]
        for name in (
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        ):
            if (getattr(self, name) is not None) != (name in needs):
                raise ValueError(f"{name}: rope_type {self.rope_type} {'needs it' if name in needs else 'has none'}")
        return self


class Positions(Table):
    """How a token knows where it stands.

    ``rope``: rotary, of ``rotary_dim`` channels of each head (all if null), ``style`` half (channels j and j + d/2 are
    a pair) or interleaved (2j and 2j + 1). ``learned``: a table of max_position_embeddings rows, added to the
    embedding. ``alibi``: a slope for each head. ``layers``: the only ones that rotate (NoPE elsewhere);
    ``sliding_theta`` is the base in layers with a window, unscaled (Gemma 3).
    """

    kind: Literal["rope", "learned", "alibi", "none"]
    theta: Annotated[float, Field(gt=0)] | None = None
    style: Literal["half", "interleaved"] = "half"
    rotary_dim: Positive | None = None
    scaling: RopeScaling | None = None
    sliding_theta: Annotated[float, Field(gt=0)] | None = None
    layers: list[int] | None = None

    @model_validator(mode="after")
    def _belongs(self) -> Positions:
        if (self.kind == "rope") != (self.theta is not None):
            raise ValueError("theta: rope needs it, and nothing else has one")
        if self.kind != "rope" and (self.rotary_dim or self.scaling or self.sliding_theta or self.layers is not None):
            raise ValueError(f"kind {self.kind} has no rotary_dim, scaling, sliding_theta or layers: rope has")
        if self.rotary_dim and self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}: channels are turned in pairs")
        return self


class QkNorm(NormKind):
    """A norm on queries and keys: of each head, or over all of them at once (OLMo 2); before or after the rotation."""

    over: Literal["head", "all"] = "head"
    after_rotary: bool = False


class ValueEmbedding(Table):
    """Tables of token embeddings that are added to the values of some layers (nanochat).

    v of head k += ``scale`` · sigmoid(gate_k · x[:channels]) · table[token] of head k, where x is what q, k, v are
    computed from.
    """

    layers: list[int]
    channels: Positive
    scale: float


class Attention(Table):
    """Causal attention. ``scale`` multiplies the scores (head_dim^-0.5 if null); ``softcap`` limits them by tanh.

    ``window``: how many keys one sees in ``sliding_layers`` (all layers if null), its own included. ``gate``: the
    output is multiplied by sigmoid of a projection of x, one for each head or one for each channel.
    ``value_residual``: from the second layer on v = l0 · v + l1 · v of the first layer, with two learned numbers per
    layer (ResFormer, arXiv 2410.17897).
    """

    bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    softcap: Annotated[float, Field(gt=0)] | None = None
    window: Positive | None = None
    sliding_layers: list[int] | None = None
    qk_norm: QkNorm | None = None
    gate: Literal["head", "channel"] | None = None
    value_residual: bool = False
    value_embedding: ValueEmbedding | None = None


class Mlp(Table):
    """``down(act(gate x) · up x)`` if gated, else ``down(act(up x))``. ``bias`` is that of gate and up."""

    gated: bool
    activation: Activation
    bias: bool = False
    out_bias: bool = False


class Moe(Table):
    """A mixture of experts in place of the MLP, in ``layers`` (all if null). Experts are gated, without biases.

    A token's scores are softmax or sigmoid of its router logits; the ``experts_per_token`` best are taken, by score and
    ``selection_bias`` where there is one (which does not count further); their weights are normalised to a sum of 1 if
    ``normalised``, then multiplied by ``scaling``. ``shared_size``: the inner width of an MLP that all tokens pass, 0
    for none; with ``shared_gate`` it is multiplied by the sigmoid of one more projection (Qwen 2 MoE).
    """

    experts: Positive
    experts_per_token: Positive
    size: Positive
    activation: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    layers: list[int] | None = None
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scaling: float = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    shared_size: Annotated[int, Field(ge=0)] = 0
    shared_gate: bool = False

    @model_validator(mode="after")
    def _can_be(self) -> Moe:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}, of {self.experts} experts")
        if self.shared_gate and not self.shared_size:
            raise ValueError("shared_gate: there is no shared expert (shared_size is 0)")
        return self


class Residual(Table):
    """How the halves of a layer join the stream.

    ``parallel``: x + attention(N(x)) + mlp(N'(x)), N' = N if ``one_norm``. ``multiplier``: each half is multiplied by
    it (Granite). ``lambdas``: before layer i, x = a_i · x + b_i · x0 with learned numbers, x0 the embedding (nanochat).
    ``look_back``: behind the embedding, x_t += c · sigmoid(g · x_t[:look_back]) · x_(t-1) with learned c and g
    (nanochat's smear). ``take_back``: after the last layer, minus a learned number times what layer
    ``take_back`` put out.
    """

    parallel: bool = False
    one_norm: bool = False
    multiplier: float = 1.0
    lambdas: bool = False
    look_back: Positive | None = None
    take_back: Annotated[int, Field(ge=0)] | None = None


class Decoder(Table):
    """One decoder. Sizes as in Hugging Face's configs; see the tables for the rest.

    ``vocab_size`` is how many logits there are; ``embedding_rows`` how many rows the tables have, where training padded
    them. ``logit_softcap`` limits the logits by tanh, ``logit_multiplier`` is applied after it. ``recurrence`` says
    which layers have one in the place of attention; where all have, the sizes of attention's heads stand for nothing.
    """

    vocab_size: Positive
    embedding_rows: Positive | None = None
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    max_position_embeddings: Positive
    tie_word_embeddings: bool
    norm: Norm
    positions: Positions
    attention: Attention = Attention()
    mlp: Mlp
    moe: Moe | None = None
    residual: Residual = Residual()
    recurrence: Recurrence | None = None
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    head_bias: bool = False

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.embedding_rows or self.vocab_size

    def rotates(self, layer: int) -> bool:
        """Whether queries and keys of this layer are rotated."""
        chosen = self.positions.layers
        return self.positions.kind == "rope" and (chosen is None or layer in chosen)

    @property
    def rotated(self) -> int:
        """How many channels of a head turn, in layers that rotate."""
        return self.positions.rotary_dim or self.head_dim

    def turns_apart(self, layer: int) -> bool:
        """Whether this layer turns by ``sliding_theta``, unscaled."""
        return self.positions.sliding_theta is not None and self.window(layer) is not None

    def window(self, layer: int) -> int | None:
        """How many keys one sees in this layer, its own included; None for all before it."""
        chosen = self.attention.sliding_layers
        return self.attention.window if chosen is None or layer in chosen else None

    def recurrent(self, layer: int) -> bool:
        """Whether this layer has a recurrence in place of attention."""
        return self.recurrence is not None and (self.recurrence.layers is None or layer in self.recurrence.layers)

    @property
    def attends(self) -> list[int]:
        """The layers with attention."""
        return [i for i in range(self.num_hidden_layers) if not self.recurrent(i)]

    def routed(self, layer: int) -> bool:
        """Whether this layer has experts in place of an MLP."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    def value_embedded(self, layer: int) -> bool:
        """Whether a table of embeddings is added to this layer's values."""
        return self.attention.value_embedding is not None and layer in self.attention.value_embedding.layers

    @model_validator(mode="after")
    def _fits(self) -> Decoder:
        faults = [*_sizes(self), *_layers(self), *_combinations(self), *_beside_recurrence(self)]
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _sizes(d: Decoder) -> list[str]:
    faults: list[str] = []
    if d.num_attention_heads % d.num_key_value_heads:
        faults.append(f"{d.num_attention_heads} heads can't share {d.num_key_value_heads} key heads evenly")
    if d.rows < d.vocab_size:
        faults.append(f"embedding_rows is {d.rows}, fewer than vocab_size {d.vocab_size}")
    if d.positions.kind == "rope" and (d.rotated > d.head_dim or d.rotated % 2):
        faults.append(f"{d.rotated} channels of a head of {d.head_dim} can't be turned in pairs")
    wide = {"residual.look_back": d.residual.look_back}
    if d.attention.value_embedding:
        wide["attention.value_embedding.channels"] = d.attention.value_embedding.channels
    return faults + [f"{k} is {n}, of {d.hidden_size} channels" for k, n in wide.items() if n and n > d.hidden_size]


def _layers(d: Decoder) -> list[str]:
    lists = {"positions.layers": d.positions.layers, "attention.sliding_layers": d.attention.sliding_layers}
    lists["moe.layers"] = d.moe.layers if d.moe else None
    lists["recurrence.layers"] = d.recurrence.layers if d.recurrence else None
    embedded = d.attention.value_embedding
    lists["attention.value_embedding.layers"] = embedded.layers if embedded else None
    lists["residual.take_back"] = [d.residual.take_back] if d.residual.take_back is not None else None
    faults: list[str] = []
    for name, layers in lists.items():
        if layers is not None and (
            sorted(set(layers)) != layers or any(not 0 <= i < d.num_hidden_layers for i in layers)
        ):
            faults.append(f"{name} is {layers}: layers are 0 to {d.num_hidden_layers - 1}, in order, each once")
    return faults


def _combinations(d: Decoder) -> list[str]:
    """What the served class can't do, each with the way out."""
    faults: list[str] = []
    place, parallel = d.norm.place, d.residual.parallel
    if parallel and place != "pre":
        faults.append(f"residual.parallel with norm.place {place}: only pre is served")
    if d.residual.one_norm and not parallel:
        faults.append("residual.one_norm: only halves side by side (residual.parallel) can share a norm")
    if place == "post" and d.residual.multiplier != 1.0:
        faults.append("residual.multiplier with norm.place post: multiply o_proj and down_proj in the mapping (scale)")
    if d.attention.sliding_layers is not None and d.attention.window is None:
        faults.append("attention.sliding_layers without attention.window: how many keys do they see?")
    if d.positions.sliding_theta is not None and d.attention.window is None:
        faults.append("positions.sliding_theta without attention.window: no layer has a window")
    if d.residual.look_back and d.hidden_size % d.head_dim:
        faults.append(f"residual.look_back: hidden_size {d.hidden_size} is no multiple of head_dim {d.head_dim}")
    return faults


def _beside_recurrence(d: Decoder) -> list[str]:
    """What only attention has, said of layers that have none."""
    if d.recurrence is None:
        return []
    lists = {"positions.layers": d.positions.layers, "attention.sliding_layers": d.attention.sliding_layers}
    embedded = d.attention.value_embedding
    lists["attention.value_embedding.layers"] = embedded.layers if embedded else None
    faults = [
        f"{name} names layer {i}, which has a recurrence and no attention"
        for name, layers in lists.items()
        for i in layers or ()
        if d.recurrent(i)
    ]
    if d.recurrence.layers == []:
        faults.append("recurrence.layers is []: leave the table out where all layers have attention")
    if d.attention.value_residual:
        faults.append("attention.value_residual with recurrence: only layers with attention have values")
    if not d.attends and d.positions.kind in ("rope", "alibi"):
        faults.append(f"positions.kind {d.positions.kind}: no layer has attention to turn or slope; say none")
    if not d.attends and d.attention != Attention():
        faults.append("attention: no layer has any (recurrence.layers is null or names all); leave that table out")
    return faults


def decoder_of(config: dict[str, Any]) -> Decoder:
    """The record of a config.json, or of the attributes of a transformers config; other keys are left aside.

    Raises pydantic's ValidationError, a ValueError, with everything that is wrong.
    """
    return Decoder.model_validate({name: config[name] for name in Decoder.model_fields if name in config})
