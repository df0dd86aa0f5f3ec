"""The composable decoder in plain PyTorch: the eager twin of archs/served/decoder.py, on the names of its layouts.

Built from the same record of config.json (archs/decoder/schema.py, where every formula's source stands).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..decoder.schema import Decoder
from ..decoder.tensors import norms_of
from .bloom import slopes
from .decoder_parts import Attention, Experts, Mlp, Norm, Table
from .decoder_recurrent import mixer_of
from .parts import Embedding, Linear, length_of, softcap
from .rotary import Rotary, Scaling, Yarn, rotary_table


def assemble(d: Decoder) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V] at all positions.
    """
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return ForCausalLM(d).eval()


def rotary_of(d: Decoder, layer: int) -> Rotary | None:
    """What turns this layer's queries and keys; None where nothing does."""
    p = d.positions
    if not d.rotates(layer) or p.theta is None:
        return None
    size = d.rotated
    if p.sliding_theta is not None and d.turns_apart(layer):
        return Rotary(size, p.sliding_theta)
    s = p.scaling
    if s is None:
        return Rotary(size, p.theta)
    if s.rope_type == "linear":
        return Rotary(size, p.theta, factor=s.factor)
    original = s.original_max_position_embeddings or 0
    if s.rope_type == "yarn":
        return Rotary(size, p.theta, yarn=Yarn(s.factor, s.beta_fast or 0.0, s.beta_slow or 0.0, original))
    return Rotary(size, p.theta, Scaling(s.factor, s.low_freq_factor or 0.0, s.high_freq_factor or 0.0, original))


class ForCausalLM(nn.Module):
    """The stream, and the head."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        self.d = d
        self.model = Model(d)
        self.lm_head = Head(d)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        logits = self.lm_head(self.model(ids), self.model.embed_tokens.weight)[..., : self.d.vocab_size]
        return softcap(logits, self.d.logit_softcap or 0.0) * self.d.logit_multiplier


class Head(nn.Module):
    """The output projection: by a weight of its own, or by the embedding's."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        self.weight = None if d.tie_word_embeddings else nn.Parameter(torch.empty(d.rows, d.hidden_size))
        self.bias = nn.Parameter(torch.empty(d.rows)) if d.head_bias else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Hidden states [B, T, C] to logits [B, T, rows]."""
        return nn.functional.linear(x, embedding if self.weight is None else self.weight, self.bias)


class LookBack(nn.Module):
    """x_t + scale · sigmoid(gate · the first channels of x_t) · x_(t-1); the first position stays as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.gate = Linear(channels, 1, bias=False)
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        gates = self.scale * torch.sigmoid(self.gate(x[:, 1:, : self.channels]))
        return torch.cat((x[:, :1], x[:, 1:] + gates * x[:, :-1]), dim=1)


class Model(nn.Module):
    """Everything between token ids and the head."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        self.d, res = d, d.residual
        self.embed_tokens = Embedding(d.rows, d.hidden_size)
        if d.positions.kind == "learned":
            self.embed_positions = Embedding(d.max_position_embeddings, d.hidden_size)
        self.embed_norm = Norm(d.norm, d.hidden_size) if d.norm.embedding else None
        self.look_back = LookBack(res.look_back) if res.look_back else None
        if res.lambdas:
            self.residual_lambdas = nn.Parameter(torch.empty(d.num_hidden_layers))
            self.embed_lambdas = nn.Parameter(torch.empty(d.num_hidden_layers))
        if res.take_back is not None:
            self.take_back_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict()
        for i in d.attention.value_embedding.layers if d.attention.value_embedding else ():
            self.value_embeds[str(i)] = Embedding(d.rows, d.num_key_value_heads * d.head_dim)
        self.layers = nn.ModuleList(Layer(d, i) for i in range(d.num_hidden_layers))
        self.norm = Norm(d.norm, d.hidden_size) if d.norm.final else None

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to hidden states [B, T, C]."""
        d, res = self.d, self.d.residual
        length = length_of(ids, d.max_position_embeddings)
        x = begin = self._embedded(ids, length)
        alibi = self._alibi(length, x)
        first: Tensor | None = None
        middle: Tensor | None = None
        for i, layer in enumerate(self.layers):
            if res.lambdas:
                x = self.residual_lambdas[i] * x + self.embed_lambdas[i] * begin
            rotary = rotary_of(d, i)
            table = rotary_table(rotary, length) if rotary else None
            embedded = self.value_embeds[str(i)](ids) if d.value_embedded(i) else None
            x, v = layer(x, table, alibi, embedded, first)
            first = v if first is None else first
            middle = x if i == res.take_back else middle
        if middle is not None:
            x = x - self.take_back_lambda * middle
        return x if self.norm is None else self.norm(x)

    def _embedded(self, ids: Tensor, length: int) -> Tensor:
        x = self.embed_tokens(ids) * self.d.embedding_multiplier
        if self.d.positions.kind == "learned":
            x = x + self.embed_positions(torch.arange(length, device=ids.device))
        x = x if self.embed_norm is None else self.embed_norm(x)
        return x if self.look_back is None else self.look_back(x)

    def _alibi(self, length: int, x: Tensor) -> Tensor | None:
        if self.d.positions.kind != "alibi":
            return None
        positions = torch.arange(length, dtype=x.dtype, device=x.device)
        return slopes(self.d.num_attention_heads).to(x)[:, None, None] * positions


class Layer(nn.Module):
    """Attention, or a recurrence in its place, and MLP, joined to the stream as the config says."""

    def __init__(self, d: Decoder, layer: int) -> None:
        super().__init__()
        self.d = d
        for name in norms_of(d):
            self.add_module(name, Norm(d.norm, d.hidden_size))
        if d.recurrent(layer):
            self.mixer = mixer_of(d)
        else:
            self.self_attn = Attention(d, layer)
        m = d.mlp
        dense = {"gated": m.gated, "bias": m.bias, "out_bias": m.out_bias}
        self.mlp = (
            Experts(d, d.moe)
            if d.moe and d.routed(layer)
            else Mlp(d.hidden_size, d.intermediate_size, m.activation, **dense)
        )

    def forward(
        self, x: Tensor, table: Table | None, alibi: Tensor | None, embedded: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, C] to the same shape, and this layer's values; see :class:`Attention`."""
        more = (table, alibi, embedded, first)
        by = self.d.residual.multiplier
        place = self.d.norm.place
        if self.d.residual.parallel:
            attended, v = self._attended(self._norm("attn_norm", x), *more)
            beside = self._norm("attn_norm" if self.d.residual.one_norm else "mlp_norm", x)
            return x + by * (attended + self.mlp(beside)), v
        if place == "post":
            attended, v = self._attended(x, *more)
            x = self._norm("attn_norm", x + attended)
            return self._norm("mlp_norm", x + self.mlp(x)), v
        attended, v = self._attended(self._norm("attn_norm", x), *more)
        x = x + by * self._norm("attn_out_norm", attended)
        return x + by * self._norm("mlp_out_norm", self.mlp(self._norm("mlp_norm", x))), v

    def _attended(self, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        """What attention puts out, or the recurrence in its place, which has no values to hand on."""
        return (self.mixer(x), x) if "mixer" in self._modules else self.self_attn(x, *more)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The norm of that name, or x itself where this layer has none."""
        return self.get_submodule(name)(x) if name in self._modules else x
