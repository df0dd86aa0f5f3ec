"""The tensors of a composable decoder: names and shapes, as its safetensors hold them.

The eager twin's ``state_dict`` and the served class's loader have the same names; tests hold all three together.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...mappings.tensors import Shape, Target
from .schema import Decoder, Moe, NormKind

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
    yield from _attention(d, i, f"{at}.self_attn")
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
