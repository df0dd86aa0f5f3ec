"""The tensors of a composable decoder: names and shapes, as its safetensors hold them.

The eager twin's ``state_dict`` and the served class's loader have the same names; tests hold all three together.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...mappings.tensors import Shape, Target
from .recurrence import Gated, LinearAttention, Mamba2
from .schema import Decoder, Moe
from .tables import NormKind

TIES = {"lm_head.weight": "model.embed_tokens.weight"}


def target_of(d: Decoder) -> Target:
    """Every tensor once; a tied head is left out and named as tied."""
    return Target(dict(_whole(d)), TIES if d.tie_word_embeddings else {})


def _whole(d: Decoder) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (d.rows, d.hidden_size)
    if d.positions.kind == "learned":
        yield "model.embed_positions.weight", (d.max_position_embeddings, d.hidden_size)
    if d.norm.embedding:
        yield from norm_of("model.embed_norm", d.norm, d.hidden_size)
    yield from _around(d)
    for i in range(d.num_hidden_layers):
        yield from _layer(d, i)
    if d.norm.final:
        yield from norm_of("model.norm", d.norm, d.hidden_size)
    if not d.tie_word_embeddings:
        yield "lm_head.weight", (d.rows, d.hidden_size)
    if d.head_bias:
        yield "lm_head.bias", (d.rows,)


def _around(d: Decoder) -> Iterator[tuple[str, Shape]]:
    """What is learned of the stream as a whole, and the tables of token embeddings for values."""
    res, embedded = d.residual, d.attention.value_embedding
    if res.look_back:
        yield "model.look_back.gate.weight", (1, res.look_back)
        yield "model.look_back.scale", (1,)
    if res.lambdas:
        yield "model.residual_lambdas", (d.num_hidden_layers,)
        yield "model.embed_lambdas", (d.num_hidden_layers,)
    if res.take_back is not None:
        yield "model.take_back_lambda", (1,)
    for i in embedded.layers if embedded else ():
        yield f"model.value_embeds.{i}.weight", (d.rows, d.num_key_value_heads * d.head_dim)


def norm_of(name: str, norm: NormKind, size: int) -> Iterator[tuple[str, Shape]]:
    """What a norm of this kind has."""
    if norm.weight:
        yield f"{name}.weight", (size,)
    if norm.bias:
        yield f"{name}.bias", (size,)


def norms_of(d: Decoder) -> tuple[str, ...]:
    """The norms of one layer: in front of a half (``attn_norm``) or, in place post, behind its sum; and behind what the
    half puts out (``attn_out_norm``)."""
    before, behind = ("attn_norm", "mlp_norm"), ("attn_out_norm", "mlp_out_norm")
    if d.residual.one_norm:
        return before[:1]
    return {"pre": before, "post": before, "output": behind, "sandwich": before + behind}[d.norm.place]


def _layer(d: Decoder, i: int) -> Iterator[tuple[str, Shape]]:
    at = f"model.layers.{i}"
    for name in norms_of(d):
        yield from norm_of(f"{at}.{name}", d.norm, d.hidden_size)
    yield from _mixer(d, f"{at}.mixer") if d.recurrent(i) else _attention(d, i, f"{at}.self_attn")
    yield from _experts(d, d.moe, f"{at}.mlp") if d.moe and d.routed(i) else _mlp(d, f"{at}.mlp")


def _attention(d: Decoder, i: int, at: str) -> Iterator[tuple[str, Shape]]:
    a, hidden = d.attention, d.hidden_size
    rows = {"q": d.num_attention_heads * d.head_dim, "k": d.num_key_value_heads * d.head_dim}
    for name in ("q", "k", "v"):
        size = rows["k" if name == "v" else name]
        yield f"{at}.{name}_proj.weight", (size, hidden)
        if a.bias:
            yield f"{at}.{name}_proj.bias", (size,)
    yield f"{at}.o_proj.weight", (hidden, rows["q"])
    if a.out_bias:
        yield f"{at}.o_proj.bias", (hidden,)
    if a.qk_norm:
        for name in ("q", "k"):
            size = d.head_dim if a.qk_norm.over == "head" else rows[name]
            yield from norm_of(f"{at}.{name}_norm", a.qk_norm, size)
    if a.gate:
        yield f"{at}.gate_proj.weight", (d.num_attention_heads if a.gate == "head" else rows["q"], hidden)
    if a.value_residual and i:
        yield f"{at}.value_lambdas", (2,)
    if a.value_embedding and d.value_embedded(i):
        yield f"{at}.value_gate.weight", (d.num_key_value_heads, a.value_embedding.channels)


def _mixer(d: Decoder, at: str) -> Iterator[tuple[str, Shape]]:
    """A recurrence's."""
    match d.recurrence:
        case Gated() as r:
            yield from _gated(r, d.hidden_size, at)
        case LinearAttention() as r:
            yield from _linear_attention(r, d.hidden_size, at)
        case Mamba2() as r:
            yield from _mamba2(r, d.hidden_size, at)
        case None:
            pass


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _gated(r: Gated, hidden: int, at: str) -> Iterator[tuple[str, Shape]]:
    seen = hidden if r.gates_from == "stream" else r.width
    yield from _linear(f"{at}.value_proj", r.width, hidden, r.bias)
    if r.conv:
        yield f"{at}.conv.weight", (r.width, 1, r.conv)
    if r.conv_bias:
        yield f"{at}.conv.bias", (r.width,)
    yield from _linear(f"{at}.decay_proj", r.width, seen, r.gate_bias)
    if r.decay == "power":
        yield f"{at}.decay_rate", (r.width,)
    if r.decay_floor:
        yield f"{at}.decay_floor", (r.width,)
    if r.input_gate:
        yield from _linear(f"{at}.input_proj", r.width, seen, r.gate_bias)
    if r.norm:
        yield from norm_of(f"{at}.norm", r.norm, r.width)
    if r.output_gate:
        yield from _linear(f"{at}.gate_proj", r.width, hidden, r.bias)
    yield from _linear(f"{at}.o_proj", hidden, r.width, r.out_bias)


def _linear_attention(r: LinearAttention, hidden: int, at: str) -> Iterator[tuple[str, Shape]]:
    keys, values = r.heads * r.key_size, r.heads * r.value_size
    for name, rows in (("q", keys), ("k", keys), ("v", values)):
        yield from _linear(f"{at}.{name}_proj", rows, hidden, r.bias)
    if r.decay != "fixed":
        yield from _linear(f"{at}.decay_proj", r.heads if r.decay == "head" else keys, hidden, r.decay_bias)
    if r.norm:
        yield from norm_of(f"{at}.norm", r.norm, r.value_size if r.norm_over == "head" else values)
    if r.output_gate:
        yield from _linear(f"{at}.gate_proj", values, hidden, r.bias)
    yield from _linear(f"{at}.o_proj", hidden, values, r.out_bias)


def _mamba2(r: Mamba2, hidden: int, at: str) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{at}.in_proj", r.inner + r.convolved + r.heads, hidden, r.bias)
    yield f"{at}.conv1d.weight", (r.convolved, 1, r.conv)
    if r.conv_bias:
        yield f"{at}.conv1d.bias", (r.convolved,)
    for name in ("dt_bias", "A_log", "D"):
        yield f"{at}.{name}", (r.heads,)
    yield f"{at}.norm.weight", (r.inner,)
    yield from _linear(f"{at}.out_proj", hidden, r.inner, r.bias)


def _mlp(d: Decoder, at: str) -> Iterator[tuple[str, Shape]]:
    inner, hidden = d.intermediate_size, d.hidden_size
    for name in ("gate_proj", "up_proj") if d.mlp.gated else ("up_proj",):
        yield f"{at}.{name}.weight", (inner, hidden)
        if d.mlp.bias:
            yield f"{at}.{name}.bias", (inner,)
    yield f"{at}.down_proj.weight", (hidden, inner)
    if d.mlp.out_bias:
        yield f"{at}.down_proj.bias", (hidden,)


def _experts(d: Decoder, moe: Moe, at: str) -> Iterator[tuple[str, Shape]]:
    hidden = d.hidden_size
    yield f"{at}.router.weight", (moe.experts, hidden)
    if moe.router_bias:
        yield f"{at}.router.bias", (moe.experts,)
    if moe.selection_bias:
        yield f"{at}.selection_bias", (moe.experts,)
    inner = {f"{at}.experts.{e}": moe.size for e in range(moe.experts)}
    if moe.shared_size:
        inner[f"{at}.shared_expert"] = moe.shared_size
    for name, size in inner.items():
        yield f"{name}.gate_proj.weight", (size, hidden)
        yield f"{name}.up_proj.weight", (size, hidden)
        yield f"{name}.down_proj.weight", (hidden, size)
    if moe.shared_gate:
        yield f"{at}.shared_expert_gate.weight", (1, hidden)
