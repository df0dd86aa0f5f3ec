"""The mistakes themselves: each function changes a model's tensors or config the way one conversion bug would."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .roles import Model

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[Model], object]
"""What it returns is of no interest."""


# --- building blocks ---------------------------------------------------------------------------------------------


def swap(a: Tensor, b: Tensor) -> None:
    """Exchange the values of two views."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def as_pairs(x: Tensor, heads: int) -> Tensor:
    """Rotary halves [H, 2, D/2] back to neighbouring pairs [H, D/2, 2], along the first dimension of ``x``."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def as_halves(x: Tensor, heads: int) -> Tensor:
    """Neighbouring pairs [H, D/2, 2] to rotary halves [H, 2, D/2], along the first dimension of ``x``."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rope(m: Model) -> dict[str, Any]:
    """Where the config keeps rope_theta: in rope_parameters, or at the top as older releases do."""
    return m.config.get("rope_parameters") or m.config


def each(role: str, change: Callable[[Tensor], Tensor], *, kinds: tuple[str, ...] = ("weight", "bias")) -> Change:
    """In every layer, replace a role's values by a function of them, biases (where there are any) alike."""

    def apply(m: Model) -> None:
        for kind in kinds:
            for i in range(m.layers if m.has(role, kind=kind) else 0):
                view = m.view(role, i, kind)
                view.copy_(change(view.clone()))

    return apply


def once(role: str, change: Callable[[Tensor], object], kind: str = "weight") -> Change:
    """Change a role of one layer in place."""
    return lambda m: change(m.view(role, m.one, kind))


def both(*changes: Change) -> Change:
    """One after another."""

    def apply(m: Model) -> None:
        for change in changes:
            change(m)

    return apply


def option(role: str, change: Callable[[Any], Any]) -> Change:
    """Replace a config value, named by its role, by a function of it."""
    return lambda m: m.set(role, change(m.value(role)))


def entry(name: str, change: Callable[[Any], Any]) -> Change:
    """Replace a config field by a function of its value."""
    return lambda m: m.config.update({name: change(m.config.get(name))})


# --- rotary positions --------------------------------------------------------------------------------------------


def unrotated(*roles: str) -> Change:
    """The permutation forgotten: the channels of every head stay neighbouring pairs."""

    def apply(m: Model) -> None:
        for role in roles:
            count = m.heads if role == "q" else m.kv_heads
            each(role, lambda x, count=count: as_pairs(x, count))(m)

    return apply


def rotated_for_half_the_heads(m: Model) -> None:
    """Permuted as if heads were half as many and twice as wide."""
    for role, count in (("q", m.heads), ("k", m.kv_heads)):
        each(role, lambda x, count=count: as_halves(as_pairs(x, count), count // 2))(m)


def theta(change: Callable[[float], float]) -> Change:
    """Another base of the rotary frequencies."""

    def apply(m: Model) -> None:
        rope(m)["rope_theta"] = change(rope(m)["rope_theta"])

    return apply


def scaling(**values: Any) -> Change:
    """Only these rotary settings, besides the base."""
    return lambda m: m.config.update(rope_parameters={"rope_theta": rope(m)["rope_theta"], **values})


# --- attention ---------------------------------------------------------------------------------------------------


def swap_heads(role: str, a: int, b: int) -> Change:
    """Exchange two heads of one layer; a negative number counts from the end."""

    def apply(m: Model) -> None:
        for kind in ("weight", "bias"):
            if m.has(role, kind=kind):
                heads = m.view(role, m.one, kind).unflatten(0, (-1, m.head_dim))
                swap(heads[a], heads[b])

    return apply


def stride_groups(m: Model) -> None:
    """Query heads taken as strided over the key heads, in q and o alike: each meets another head's keys."""
    shape = (m.kv_heads, -1, m.head_dim)

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(0, shape).transpose(0, 1).flatten(0, 2)

    each("q", rows)(m)
    each("o", lambda x: rows(x.T).T, kinds=("weight",))(m)


def halve_heads(m: Model) -> None:
    """The config says half as many heads, each twice as wide: every shape stays."""
    wide = 2 * m.head_dim
    for role in ("heads", "kv_heads"):
        if m.value(role) is not None:
            m.set(role, m.value(role) // 2)
    if m.value("head_dim") is not None:
        m.set("head_dim", wide)


def swap_parts(a: str, b: str, *, everywhere: bool = True) -> Change:
    """Two projections of the same shape exchanged, in every layer or in one."""

    def apply(m: Model) -> None:
        for i in range(m.layers) if everywhere else [m.one]:
            for kind in ("weight", "bias"):
                if m.has(a, b, kind=kind):
                    swap(m.view(a, i, kind), m.view(b, i, kind))

    return apply


def split_by_head(m: Model) -> None:
    """A fused projection [Q K V] taken apart as if it were stored head by head, [q k v] each."""
    for i in range(m.layers):
        for kind in ("weight", "bias"):
            if m.has("q", kind=kind):
                parts = [m.view(role, i, kind) for role in ("q", "k", "v")]
                mixed = cat([p.clone() for p in parts], 0).unflatten(0, (m.heads, 3, -1))
                for part, k in zip(parts, range(3), strict=True):
                    part.copy_(mixed[:, k].flatten(0, 1))


def add_bias(m: Model) -> None:
    """A bias that the class does not have, and that vLLM ignores without a word."""
    role = next(role for role in ("o", "down", "head") if not m.has(role, kind="bias"))
    rows = m.view("embedding" if role == "head" else role, m.one).shape[0]
    m.tensors[m.name(role, m.one, "bias")] = m.tensors[m.name("embedding")].new_full((rows,), 3.0)


def drop(role: str, kind: str, *, everywhere: bool = False) -> Change:
    """A tensor left out, in every layer or in one."""

    def apply(m: Model) -> None:
        for i in range(m.layers) if everywhere else [m.one]:
            m.tensors.pop(m.name(role, i, kind), None)

    return apply


# --- layers, embedding, head -------------------------------------------------------------------------------------


def reorder_layers(order: Callable[[int], list[int]]) -> Change:
    """Layer i gets the tensors of layer ``order(layers)[i]``."""

    def apply(m: Model) -> None:
        was = {name: tensor.clone() for name, tensor in m.tensors.items()}
        for to, source in enumerate(order(m.layers)):
            for name in m.of_layer(to):
                m.tensors[m.prefix(to) + name] = was[m.prefix(source) + name]

    return apply


def drop_last_layer(m: Model) -> None:
    """The last layer gone, and a config that agrees."""
    last = m.layers - 1
    for name in m.of_layer(last):
        del m.tensors[m.prefix(last) + name]
    m.set("layers", last)
    if m.config.get("layer_types"):
        m.config["layer_types"] = m.config["layer_types"][:last]


def tie_head(m: Model) -> None:
    """The head left out, and the embedding used in its place."""
    del m.tensors[m.name("head")]
    m.config["tie_word_embeddings"] = True


def untie_head(m: Model) -> None:
    """A head of its own: a copy of the embedding from some steps ago."""
    m.tensors[m.name("head")] = m.view("embedding") * 0.99
    m.config["tie_word_embeddings"] = False


def shift_rows(*roles: str) -> Change:
    """Every row one place further on."""

    def apply(m: Model) -> None:
        for role in roles:
            if m.has(role):
                m.view(role).copy_(m.view(role).roll(1, 0))

    return apply


def swap_rows(m: Model) -> None:
    """Two rows of the embedding exchanged."""
    table = m.view("embedding")
    swap(table[3], table[-3])


def fill_final_norm(m: Model) -> None:
    """The final norm left as it was before training."""
    m.view("final_norm").fill_(1)


def offset_norms(m: Model) -> None:
    """One added to the weight of every norm, as to zero-centred norms that were converted twice."""
    for norm in m.norms():
        norm.add_(1)


def swap_norms(m: Model) -> None:
    """The first two norms of one layer exchanged."""
    first, second = (m.tensors[f"{m.prefix(m.one)}{norm}.weight"] for norm in m.roles.norms[:2])
    swap(first, second)


# --- rank files, types, experts ----------------------------------------------------------------------------------


def reverse_ranks(axis: int) -> Callable[[Tensor], Tensor]:
    """Two rank files joined in the wrong order."""
    return lambda x: cat(list(x.chunk(2, axis))[::-1], axis)


def join_across(x: Tensor) -> Tensor:
    """Two rank files [N, N/2] joined along rows instead of columns, and read as [N, N] all the same."""
    return cat(list(x.chunk(2, 1)), 0).reshape(x.shape)


def round_weights(*, stored: bool) -> Change:
    """Every weight rounded to bfloat16; ``stored`` in that type too, while config.json says what it said."""

    def apply(m: Model) -> None:
        for name, tensor in m.tensors.items():
            rounded = tensor.bfloat16()
            m.tensors[name] = rounded if stored else rounded.to(tensor.dtype)

    return apply


def swap_experts(m: Model) -> None:
    """Two experts of one layer exchanged; the router still sends tokens to the old places."""
    for role in ("expert_gate", "expert_up", "expert_down"):
        swap(m.view(role, m.one, expert=0), m.view(role, m.one, expert=1))


def cat(parts: list[Tensor], axis: int) -> Tensor:
    """torch.cat, imported when it is needed."""
    import torch

    return torch.cat(parts, axis)
