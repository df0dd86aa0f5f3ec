"""GPTs that people build of torch's own nn.TransformerEncoderLayer, with learned positions and a causal mask.

The names inside a layer are torch's; those around the layers are each author's own, and are found by their shapes.
Which activation a layer has, and on which side its norms stand, leaves no trace and is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from ..mappings.tensors import Shape
from .base import Arch, Inventory, Measure, Value, boolean
from .nanogpt import head_count, hf_config

_FIRST = ".0.self_attn.in_proj_weight"
_REQUIRED = ("self_attn.out_proj.weight", "linear1.weight", "linear2.weight", "norm1.weight", "norm2.weight")
_HEADS = frozenset(
    {"lm_head", "head", "fc_out", "output", "output_layer", "output_projection", "out_proj", "to_logits", "unembed"}
    | {"unembedding", "logits", "generator", "decoder", "classifier", "fc", "linear", "out", "proj_out"}
)
"""What nobody calls an embedding."""
_SCALED = "multiply the embedding's table by C**0.5, give the head the old one as a weight of its own, and pass \
--set embedding_scale=none"


def detect(inv: Inventory) -> list[str]:
    """One run of nn.TransformerEncoderLayer, and something [V, C] and positions around it."""
    blocks = _blocks(inv)
    if not blocks:
        return []
    return [f"{blocks}.N has in_proj_weight, linear1, linear2, norm1, norm2: torch's nn.TransformerEncoderLayer"]


def _blocks(inv: Inventory) -> str:
    """What the layers are called, or nothing; a decoder's layers attend to an encoder's output too."""
    found = [name.removesuffix(_FIRST) for name in inv.tensors if name.endswith(_FIRST)]
    if len(found) != 1 or not all(f"{found[0]}.0.{part}" in inv for part in _REQUIRED):
        return ""
    return "" if f"{found[0]}.0.multihead_attn.in_proj_weight" in inv else found[0]


def dims(m: Measure) -> None:
    """Names and sizes from the shapes around the layers; the rest is asked for."""
    inv, blocks = m.inventory, _blocks(m.inventory)
    if not blocks:
        m.problem("no run of nn.TransformerEncoderLayer's names (self_attn.in_proj_weight, linear1 …) is here")
        return
    layer = f"{blocks}.0."
    ffn, width = inv.shape(f"{layer}linear1.weight") or (0, 0)
    m.set("blocks", kind=str, shape=(blocks, "in front of N.self_attn.in_proj_weight"))
    m.set("layers", shape=(inv.count(blocks + ".{}.norm1.weight"), f"{blocks}.0 … with a norm1"))
    m.set("hidden", shape=(width, "columns of linear1.weight"))
    m.set("ffn", shape=(ffn, "rows of linear1.weight"))
    bias = f"{layer}self_attn.in_proj_bias" in inv
    m.set("bias", kind=boolean, shape=(bias, f"there is {'an' if bias else 'no'} in_proj_bias"))
    _around(m, blocks, width)
    head_count(m, file=(), more="; it is nhead of the layer")
    m.set("norm_eps", kind=float, default=(1e-5, "the layer's own layer_norm_eps"))
    _untraced(m)


def _around(m: Measure, blocks: str, width: int) -> None:
    """The tensors that are not a layer's: embedding, positions, head, last norm, mask."""
    inv = m.inventory
    rest = {name: inv.shape(name) or () for name in inv.tensors if not name.startswith(f"{blocks}.")}
    tables = [name for name, shape in rest.items() if len(shape) == 2 and shape[1] == width and shape[0] > 1]
    heads = [name for name in tables if name.removesuffix("weight") + "bias" in rest]
    for name in heads:
        m.problem(
            f"{name.removesuffix('weight')}bias: the head has a bias, which GPT2LMHeadModel has no place for",
            do="train the head with bias=False for a while and convert that",
        )
    positions = _positions(m, rest, tables, width)
    others = [name for name in tables if name != positions]
    embedding = _embedding(m, others)
    head = next((name for name in others if name != embedding), "lm_head.weight")
    m.set("head", kind=str, default=(head, f"the other of {', '.join(others)}" if len(others) > 1 else "there is none"))
    if embedding is None:
        m.unsettled("vocab")
    else:
        vocab = (rest.get(str(embedding)) or (None,))[0]
        m.set("vocab", shape=(vocab, f"rows of {embedding}"), ask=f"there is no tensor {embedding}")
    _last_norm(m, rest, width)
    masks = [name for name, shape in rest.items() if _square(shape, m["context"]) and name not in (*tables, positions)]
    m.set("masked", kind=boolean, shape=(len(masks) == 1, f"square: {', '.join(masks) or 'none'}"))
    m.set("mask", kind=str, default=(masks[0] if masks else "", "a buffer as large as the context on both sides"))


def _embedding(m: Measure, tables: list[str]) -> Value:
    """Which of the tables [V, C] is the embedding. Of two that differ, only a name can tell: never their order."""
    if not tables:
        return m.set("embedding", kind=str, ask="no tensor outside the layers is [V, C]")
    known = None
    named = [name for name in tables if name.removesuffix(".weight").rpartition(".")[2] in _HEADS]
    if len(tables) == 1:
        known = (tables[0], "the one [V, C] outside the layers")
    elif len(tables) == 2 and len({_storage(m.inventory, name) for name in tables}) == 1:
        known = (tables[0], f"{' and '.join(tables)} are one tensor")
    elif len(tables) == 2 and len(named) == 1:
        known = (next(n for n in tables if n not in named), f"of two [V, C], {named[0]} has the name of a head")
    ask = f"which of {', '.join(tables)} is the embedding's? The shapes don't tell it from the head's"
    return m.set("embedding", kind=str, default=known, ask=ask)


def _storage(inv: Inventory, name: str) -> object:
    one = inv.tensors[name][0]
    return one.storage, one.offset, one.shape, one.stride


def _positions(m: Measure, rest: dict[str, Shape], tables: list[str], width: int) -> str:
    """A table [1, T, C] or [T, 1, C] is one of positions; of those [T, C], the one whose rows no other has."""
    deep = [n for n, s in rest.items() if len(s) == 3 and s[2] == width and 1 in s[:2]]
    rows = [rest[name][0] for name in tables]
    alone = [name for name in tables if rows.count(rest[name][0]) == 1]
    found = deep if len(deep) == 1 else alone if len(tables) == 3 and len(alone) == 1 else []
    why = f"{'[1, T, C]' if deep else 'its rows are'} unlike those of embedding and head"
    ask = f"which tensor is the table of positions? 2-D ones are {', '.join(tables) or 'none'}"
    name = m.set("positions", kind=str, default=(found[0], why) if found else None, ask=ask)
    shape = rest.get(str(name), ())
    if name is not None and not shape:
        m.problem(f"there is no tensor {name}", do="pass --set positions=NAME")
    form = "rows" if len(shape) == 2 else "first" if shape[:1] == (1,) else "second"
    m.set("position_form", kind=str, default=(form, f"{name} is {list(shape)}"), choices=("rows", "first", "second"))
    length = None if not shape else shape[1] if form == "first" else shape[0]
    m.set("context", shape=(length, f"the length of {name}"), ask="there is no table of positions")
    return str(name)


def _square(shape: Shape, context: object) -> bool:
    return len(shape) >= 2 and shape[-2:] == (context, context) and all(n == 1 for n in shape[:-2])


def _last_norm(m: Measure, rest: dict[str, Shape], width: int) -> None:
    norms = [name.removesuffix(".weight") for name, s in rest.items() if s == (width,) and name.endswith(".weight")]
    if len(norms) != 1:
        what = (
            f"{len(norms)} norms stand outside the layers ({', '.join(norms) or 'none'}), and GPT-2 has one, the last"
        )
        m.problem(what, do="no class of vLLM's has these blocks without it, or with another")
        return
    m.set("last_norm", kind=str, shape=(norms[0], "the one norm outside the layers"))
    there = f"{norms[0]}.bias" in rest
    m.set("last_bias", kind=boolean, shape=(there, f"there is {'a' if there else 'no'} {norms[0]}.bias"))


def _untraced(m: Measure) -> None:
    """What only the author's code tells."""
    _asked(m, "norm_first", boolean, "norm_first of the layer (torch's default is false)", (True, False))
    if m["norm_first"] is False:
        do = "GPT-2 has its norms before: a model trained with norm_first=True can be converted"
        m.problem("norms stand behind attention and feed-forward (norm_first=False)", do=do)
    forms = ("relu", "gelu", "gelu_new")
    _asked(
        m,
        "activation",
        str,
        "activation of the layer: relu (torch's default) or gelu; gelu_new is the tanh form",
        forms,
    )
    ask = "none, or sqrt where the forward multiplies the embedding by C**0.5, as PyTorch's tutorial does"
    _asked(m, "embedding_scale", str, ask, ("none", "sqrt"))
    if m["embedding_scale"] == "sqrt":
        m.problem("the embedding is multiplied by C**0.5, which GPT-2 can't say", do=_SCALED)


def _asked(m: Measure, name: str, kind: Callable[[str], Value], ask: str, choices: tuple[Value, ...]) -> None:
    m.set(name, kind=kind, ask=ask, choices=choices)


ARCH = Arch(
    name="torch_encoder",
    title="GPT of nn.TransformerEncoderLayer",
    source="torch.nn, with names of one's own around it",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torch_encoder:build",
)
