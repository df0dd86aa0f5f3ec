"""The catalogue of known conversion mistakes: what each does, what it needs, and where its cause lies.

Sources: bugs found in published converters and their trackers, and everything that vLLM was seen to load without an
error although it is wrong. Each one is written against roles (roles.py), so a new target class gets all that apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from . import changes as c
from .roles import Config, Model, Tensors, roles_of

WINDOW = 32
"""Tokens of the sliding window that one mutation adds: shorter than every long input."""


class Mutation(Struct, frozen=True):
    """One mistake.

    ``applies(config, tensors)`` tells whether a layout can have it; where not, ``needs`` says in words what it lacks.
    ``apply(tensors, config)`` makes it, in place: the caller gives copies. ``module`` is the first module of the
    target class that then computes something else, ``cause`` the config field or the target tensors (a pattern over
    ``{i}``, as mappings write it) that are to blame: what a localisation should name.
    """

    name: str
    description: str
    needs: str
    module: str
    cause: str
    applies: Callable[[Config, Tensors], bool]
    apply: Callable[[Tensors, Config], object]


class _Draft(Struct, frozen=True):
    """A mutation before its class is known: ``where`` and ``cause`` are templates over the class's names."""

    name: str
    description: str
    change: c.Change
    fits: Callable[[Model], bool]
    needs: str
    where: str
    cause: str


def catalogue(config: Mapping[str, Any]) -> tuple[Mutation, ...]:
    """Every mutation, with the names of the config's class. Raises MdlError (INPUT) for a class without roles."""
    names = _names(config)
    return tuple(
        Mutation(
            name=d.name,
            description=d.description,
            needs=d.needs,
            module=d.where.format_map(names),
            cause=d.cause.format_map(names),
            applies=lambda config, tensors, d=d: d.fits(Model(tensors, config)),
            apply=lambda tensors, config, d=d: d.change(Model(tensors, config)),
        )
        for d in DRAFTS
    )


class _Names(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return f"no {key} here"


def _names(config: Mapping[str, Any]) -> _Names:
    roles = roles_of(config)
    layers = int(config[roles.fields["layers"]])
    first, one = (roles.layer.format(i=i) for i in (0, min(1, layers - 1)))
    parts = {role: f"{roles.layer}.{part.path}" for role, part in roles.parts.items()}
    own = {"layer": roles.layer, "norm1": roles.norms[0], "norm2": roles.norms[1]}
    places = {"first": first, "one": one, "last": roles.layer.format(i=layers - 1)}
    fields = {f"{role}_field": name for role, name in roles.fields.items()}
    return _Names({**roles.top, **parts, **own, **places, **fields, "attention": roles.attention, "mlp": roles.mlp})


# --- what a layout must have -------------------------------------------------------------------------------------


def _has(*roles: str, kind: str = "weight") -> Callable[[Model], bool]:
    return lambda m: m.has(*roles, kind=kind)


def _rotary(m: Model) -> bool:
    return m.has("q", "k") and c.rope(m).get("rope_theta") is not None


def _scaled(m: Model) -> bool:
    return _rotary(m) and c.rope(m).get("rope_type", "default") != "default"


def _even_heads(m: Model) -> bool:
    return m.heads % 2 == 0 and m.kv_heads % 2 == 0


def _field(name: str) -> Callable[[Model], bool]:
    return lambda m: m.config.get(name) is not None


def _square(role: str) -> Callable[[Model], bool]:
    return lambda m: m.has(role) and len(set(m.view(role).shape)) == 1


def _all(*conditions: Callable[[Model], bool]) -> Callable[[Model], bool]:
    return lambda m: all(condition(m) for condition in conditions)


def _gelu(m: Model) -> bool:
    return m.value("activation") in _OTHER_GELU


def _grouped(m: Model) -> bool:
    return m.has("q", "o") and 1 < m.kv_heads < m.heads


def _tied(m: Model) -> bool:
    return bool(m.config.get("tie_word_embeddings")) and not m.has("head")


def _single_precision(m: Model) -> bool:
    return str(m.tensors[m.name("embedding")].dtype) == "torch.float32"


def _layers(at_least: int) -> Callable[[Model], bool]:
    return lambda m: m.layers >= at_least


def _extra_bias(m: Model) -> bool:
    return not m.has("o", "down", "head", kind="bias")


def _own_keys(m: Model) -> bool:
    return m.has("k") and not m.fused("k")


def _fused(m: Model) -> bool:
    return m.has("q") and m.fused("q")


_OTHER_GELU = {"gelu": "gelu_new", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
_ROTARY = "rotary positions"
_BIASES = "biases on q, k and v"
_ATTENTION, _MLP = "{first}.{attention}", "{first}.{mlp}"
_ONE_ATTENTION, _ONE_MLP = "{one}.{attention}", "{one}.{mlp}"


def _zero(role: str) -> c.Change:
    return c.each(role, lambda x: x.zero_(), kinds=("bias",))


def _drop_biases(m: Model) -> None:
    for role in ("q", "k", "v"):
        c.drop(role, "bias", everywhere=True)(m)


def _string_sorted(layers: int) -> list[int]:
    return sorted(range(layers), key=str)


def _one_two(layers: int) -> list[int]:
    return [0, 2, 1, *range(3, layers)]


def _by_three_halves(x: Any) -> None:
    x[5].mul_(1.5)


def _by_scale(m: Model) -> None:
    c.each("q", lambda x: x * (m.head_dim / (m.head_dim + 2)) ** 0.5)(m)


# fmt: off
DRAFTS: tuple[_Draft, ...] = (
    # name, what is wrong, how it is made, where it can be, what it needs in words, first module, cause
    _Draft("rope-unpermuted", "rotary permutation of q and k forgotten", c.unrotated("q", "k"),
           _rotary, _ROTARY, _ATTENTION, "{q}.weight"),
    _Draft("rope-unpermuted-q", "rotary permutation of q forgotten", c.unrotated("q"),
           _rotary, _ROTARY, _ATTENTION, "{q}.weight"),
    _Draft("rope-unpermuted-k", "rotary permutation of k forgotten", c.unrotated("k"),
           _rotary, _ROTARY, _ATTENTION, "{k}.weight"),
    _Draft("rope-heads", "rotary permutation for half as many heads", c.rotated_for_half_the_heads,
           _all(_rotary, _even_heads), _ROTARY + ", even head counts", _ATTENTION, "{q}.weight"),
    _Draft("rope-theta", "rope_theta of another release (5e5, or 1e4 for it)",
           c.theta(lambda x: 1e4 if x == 5e5 else 5e5), _rotary, _ROTARY, _ATTENTION, "rope_theta"),
    _Draft("rope-theta-tenth", "rope_theta 10 % too large", c.theta(lambda x: 1.1 * x),
           _rotary, _ROTARY, _ATTENTION, "rope_theta"),
    _Draft("rope-scaling-dropped", "rotary scaling left out", c.scaling(rope_type="default"),
           _scaled, "rotary scaling", _ATTENTION, "rope_parameters"),
    _Draft("rope-scaling-factor", "rotary scaling factor four times too large (32 for 8)",
           lambda m: c.rope(m).update(factor=4 * c.rope(m)["factor"]),
           lambda m: _scaled(m) and "factor" in c.rope(m), "rotary scaling", _ATTENTION, "factor"),
    _Draft("rope-scaling-added", "linear rotary scaling x 4 where there is none",
           c.scaling(rope_type="linear", factor=4.0),
           lambda m: _rotary(m) and not _scaled(m), "plain rotary positions", _ATTENTION, "rope_parameters"),
    _Draft("eps-tenth", "norm epsilon ten times too small", c.option("eps", lambda x: x / 10),
           lambda m: bool(m.value("eps")), "a norm epsilon", "{first}.{norm1}", "{eps_field}"),
    _Draft("eps-hundredfold", "norm epsilon a hundred times too large", c.option("eps", lambda x: x * 100),
           lambda m: bool(m.value("eps")), "a norm epsilon", "{first}.{norm1}", "{eps_field}"),
    _Draft("activation", "the other GELU (tanh form for exact, or the reverse)",
           c.option("activation", lambda x: _OTHER_GELU[x]),
           _gelu, "a GELU: with SwiGLU vLLM takes no other activation", _MLP, "{activation_field}"),
    _Draft("activation-scaled", "activation 0.1 % too large", c.each("down", lambda x: x * 1.001, kinds=("weight",)),
           _has("down"), "a plain MLP", _MLP, "{down}.weight"),
    _Draft("gate-up", "gate and up swapped", c.swap_parts("gate", "up"),
           _has("gate", "up"), "a gated MLP", _MLP, "{gate}.weight"),
    _Draft("gate-up-one", "gate and up swapped in one layer", c.swap_parts("gate", "up", everywhere=False),
           _has("gate", "up"), "a gated MLP", _ONE_MLP, "{gate}.weight"),
    _Draft("o-missing", "o projection of one layer left out", c.drop("o", "weight"),
           _has("o"), "an o projection", _ONE_ATTENTION, "{o}.weight"),
    _Draft("k-missing", "k projection of one layer left out", c.drop("k", "weight"),
           _own_keys, "a k projection of its own", _ONE_ATTENTION, "{k}.weight"),
    _Draft("qkv-biases-dropped", "biases of q, k and v left out", _drop_biases,
           _has("q", kind="bias"), _BIASES, _ATTENTION, "{q}.bias"),
    _Draft("qkv-biases-zeroed", "biases of q, k and v written as zeros", c.both(_zero("q"), _zero("k"), _zero("v")),
           _has("q", kind="bias"), _BIASES, _ATTENTION, "{q}.bias"),
    _Draft("q-bias-zeroed", "bias of q written as zeros", _zero("q"),
           _has("q", kind="bias"), _BIASES, _ATTENTION, "{q}.bias"),
    _Draft("k-bias-zeroed", "bias of k written as zeros", _zero("k"),
           _all(_rotary, _has("k", kind="bias")),
           "a bias on k and rotary positions (softmax does not see it otherwise)", _ATTENTION, "{k}.bias"),
    _Draft("v-bias-zeroed", "bias of v written as zeros", _zero("v"),
           _has("v", kind="bias"), _BIASES, _ATTENTION, "{v}.bias"),
    _Draft("o-biases-zeroed", "biases of o written as zeros", _zero("o"),
           _has("o", kind="bias"), "a bias on o", _ATTENTION, "{o}.bias"),
    _Draft("o-bias-dropped", "bias of o left out in one layer", c.drop("o", "bias"),
           _has("o", kind="bias"), "a bias on o", _ONE_ATTENTION, "{o}.bias"),
    _Draft("extra-bias", "a bias that the class lacks and vLLM ignores", c.add_bias,
           _extra_bias, "a projection without bias", "", "a bias of no rule"),
    _Draft("kv-heads", "two key and value heads of one layer swapped",
           c.both(c.swap_heads("k", 0, 1), c.swap_heads("v", 0, 1)),
           lambda m: m.has("k", "v") and m.kv_heads > 1, "two key heads", _ONE_ATTENTION, "{k}.weight"),
    _Draft("q-heads", "two query heads of one layer swapped", c.swap_heads("q", 0, -1),
           lambda m: m.has("q") and m.heads > 1, "two query heads", _ONE_ATTENTION, "{q}.weight"),
    _Draft("q-groups", "grouped query heads taken as strided", c.stride_groups,
           _grouped, "grouped query heads", _ATTENTION, "{q}.weight"),
    _Draft("q-row", "one row of q x 1.5", c.once("q", _by_three_halves),
           _has("q"), "a q projection", _ONE_ATTENTION, "{q}.weight"),
    _Draft("attention-scale", "scores divided by sqrt(D + 2) for sqrt(D)", _by_scale,
           _has("q"), "a q projection", _ATTENTION, "{q}.weight"),
    _Draft("attention-scale-by-layer", "scores divided by the layer's number too",
           c.entry("scale_attn_by_inverse_layer_idx", lambda _: True),
           lambda m: "scale_attn_by_inverse_layer_idx" in m.config, "a class with that option",
           _ONE_ATTENTION, "scale_attn_by_inverse_layer_idx"),
    _Draft("head-count", "half as many heads, each twice as wide", c.halve_heads,
           _even_heads, "even head counts", _ATTENTION, "{heads_field}"),
    _Draft("k-v", "k and v swapped", c.swap_parts("k", "v"), _has("k", "v"), "k and v", _ATTENTION, "{k}.weight"),
    _Draft("qkv-by-head", "fused q, k, v taken apart head by head", c.split_by_head,
           _fused, "a fused projection", _ATTENTION, "{q}.weight"),
    _Draft("qk-norms", "norms of q and k swapped", c.swap_parts("q_norm", "k_norm"),
           _has("q_norm", "k_norm"), "norms of q and k", _ATTENTION, "{q_norm}.weight"),
    _Draft("transposed", "one square matrix (o) left transposed",
           c.once("o", lambda x: x.copy_(x.T.clone())),
           _square("o"), "a square o projection", _ONE_ATTENTION, "{o}.weight"),
    _Draft("down-row", "one row of down written as zeros", c.once("down", lambda x: x[7].zero_()),
           _has("down"), "a plain MLP", _ONE_MLP, "{down}.weight"),
    _Draft("layers-swapped", "layers 1 and 2 swapped", c.reorder_layers(_one_two),
           _layers(3), "three layers", "{one}", "{layer}"),
    _Draft("layers-sorted", "layers in the order of their names: 0, 1, 10, 2", c.reorder_layers(_string_sorted),
           _layers(11), "eleven layers", "{layer}", "{layer}"),
    _Draft("layer-truncated", "the last layer gone, config.json agreeing", c.drop_last_layer,
           _layers(2), "two layers", "{last}", "{layers_field}"),
    _Draft("final-norm", "final norm left at one", c.fill_final_norm,
           _has("final_norm"), "a final norm", "{final_norm}", "{final_norm}.weight"),
    _Draft("norms-offset", "one added to every norm weight", c.offset_norms,
           _has("final_norm"), "norms with weights", "{first}.{norm1}", "{layer}.{norm1}.weight"),
    _Draft("norms-swapped", "the two norms of one layer swapped", c.swap_norms,
           _has("final_norm"), "two norms per layer", "{one}.{norm1}", "{layer}.{norm1}.weight"),
    _Draft("head-tied", "head tied by mistake", c.tie_head,
           lambda m: m.has("head"), "a head of its own", "{head}", "tie_word_embeddings"),
    _Draft("head-stale", "tied head untied to an older copy", c.untie_head,
           _tied, "a tied head", "{head}", "tie_word_embeddings"),
    _Draft("embedding-row", "one embedding row written as zeros", lambda m: m.view("embedding")[11].zero_(),
           _has("embedding"), "an embedding", "{embedding}", "{embedding}.weight"),
    _Draft("embedding-rows", "two embedding rows swapped", c.swap_rows,
           _has("embedding"), "an embedding", "{embedding}", "{embedding}.weight"),
    _Draft("vocabulary-shift", "every row of the vocabulary shifted by one", c.shift_rows("embedding", "head"),
           _has("embedding"), "an embedding", "{embedding}", "{embedding}.weight"),
    _Draft("position-shift", "position table shifted by one", c.shift_rows("positions"),
           _has("positions"), "a position table", "{positions}", "{positions}.weight"),
    _Draft("rank-order", "rank files of o joined in the wrong order",
           c.each("o", c.reverse_ranks(1), kinds=("weight",)), _has("o"), "an o projection", _ATTENTION, "{o}.weight"),
    _Draft("rank-order-embedding", "column parts of the embedding joined in the wrong order",
           lambda m: m.view("embedding").copy_(c.reverse_ranks(1)(m.view("embedding").clone())),
           _has("embedding"), "an embedding", "{embedding}", "{embedding}.weight"),
    _Draft("rank-axis", "rank files of a square matrix (o) joined along the other axis",
           c.once("o", lambda x: x.copy_(c.join_across(x.clone()))),
           _square("o"), "a square o projection", _ONE_ATTENTION, "{o}.weight"),
    _Draft("dtype-rounded", "weights rounded to bfloat16, stored as float32", c.round_weights(stored=False),
           _single_precision, "float32 weights", "{embedding}", "dtype"),
    _Draft("dtype-stored", "weights stored as bfloat16 while config.json says float32", c.round_weights(stored=True),
           _single_precision, "float32 weights", "{embedding}", "dtype"),
    _Draft("window-added", f"a sliding window of {WINDOW} tokens where there is none",
           c.entry("sliding_window", lambda _: WINDOW),
           lambda m: m.config.get("sliding_window") is None, "full attention", _ATTENTION, "sliding_window"),
    _Draft("window-longer", "sliding window one token too long", c.entry("sliding_window", lambda x: x + 1),
           _field("sliding_window"), "a sliding window", _ATTENTION, "sliding_window"),
    _Draft("window-shorter", "sliding window one token too short", c.entry("sliding_window", lambda x: x - 1),
           _field("sliding_window"), "a sliding window", _ATTENTION, "sliding_window"),
    _Draft("softcap-logits", "cap on the logits left out", c.entry("final_logit_softcapping", lambda _: None),
           _field("final_logit_softcapping"), "a cap on the logits", "{head}", "final_logit_softcapping"),
    _Draft("softcap-attention", "cap on the attention scores left out",
           c.entry("attn_logit_softcapping", lambda _: None),
           _field("attn_logit_softcapping"), "a cap on the scores", _ATTENTION, "attn_logit_softcapping"),
    _Draft("experts", "two experts of one layer swapped", c.swap_experts,
           _has("expert_gate", "expert_up", "expert_down"), "experts", _ONE_MLP, "{expert_gate}.weight"),
    _Draft("experts-top-k", "one expert too few per token", c.option("top_k", lambda x: x - 1),
           lambda m: int(m.value("top_k") or 0) > 1, "two experts per token", _MLP, "{top_k_field}"),
)
# fmt: on
