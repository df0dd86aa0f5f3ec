"""What each tensor is: by its name and its shape together. One of the two alone makes a suggestion, not a decision."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from .names import BIAS, Group, Names, words

INTO = ("q", "k", "v", "qkv", "attn_gate", "gate", "up", "gate_up", "router", "shared_gate")
"""Matrices [out, width] as nn.Linear stores them; stored as [width, out] they are turned."""
OUT_OF = ("o", "down")
"""Matrices [width, in]."""
MATRICES = (*INTO, *OUT_OF)
ATTENTION = ("q", "k", "v", "qkv", "o", "attn_gate", "q_norm", "k_norm")
"""Of attention alone."""
MLP = ("gate", "up", "gate_up", "down", "router", "selection_bias", "shared_gate")
"""Of the MLP alone, experts or not."""
NORMS = ("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm", "final_norm", "embed_norm")
"""Norms over the width."""


class Role(Struct, frozen=True):
    """What a group is taken for. ``name`` is empty where nothing is known; ``where`` is "", ``expert`` or ``shared``;
    ``because`` is the evidence in words; ``doubts`` are the other things that it could be, if it is not certain."""

    group: Group
    name: str = ""
    where: str = ""
    because: str = ""
    turned: bool = False
    doubts: tuple[str, ...] = ()
    drop: str = ""

    @property
    def kind(self) -> str:
        """``weight`` or ``bias``."""
        return self.group.kind

    @property
    def key(self) -> str:
        """The role in one word: ``q.weight``, ``expert.up.weight``."""
        return ".".join(filter(None, [self.where, self.name, self.kind]))

    @property
    def certain(self) -> bool:
        """Whether name and shape agree on one thing."""
        return bool((self.name and not self.doubts) or self.drop)


class Sizes(Struct, frozen=True):
    """The two sizes that everything is measured by, and how many experts there are."""

    width: int
    vocab: int
    experts: int


def sizes_of(names: Names) -> Sizes:
    """The width is the size that most tensors of a layer have; the vocabulary is the other side of the embedding."""
    count: Counter[int] = Counter()
    for group in names.groups:
        if group.layers:
            count.update(set(group.shape))
    tables = [g for g in names.groups if not g.layers and len(g.shape) == 2]
    named = [g for g in tables if _words_of(g, "outside", "embed")]
    best = [size for size, times in count.items() if times == max(count.values())]
    width = next((n for g in named or tables for n in g.shape if n in best), best[0] if best else 0)
    other = [n for g in named or tables for n in g.shape if n != width and width in g.shape]
    return Sizes(width, max(other, default=width), names.experts)


def _words_of(group: Group, place: str, role: str) -> bool:
    return bool(group.parts) and group.parts[-1] in words()[place][role]


def buffer_of(group: Group) -> Role | None:
    """A table that a module keeps beside its weights."""
    last, shape = group.pattern.rpartition(".")[2].lower(), group.shape
    known: dict[str, list[str]] = words()["buffers"]
    square = len(shape) >= 2 and shape[-1] == shape[-2] and all(n == 1 for n in shape[:-2])
    if last in known["mask"] and square and (len(shape) > 2 or last != "bias"):
        return Role(group, because=f"{last} is square: one entry per pair of positions", drop="causal mask, no weight")
    if last in known["angles"]:
        return Role(
            group, because=f"{last}: a table of rotary angles", drop="rotary angles; made again from rope_theta"
        )
    return None


def role_of(group: Group, sizes: Sizes) -> Role:
    place = "inside" if group.layers else "outside"
    where = _where(group)
    fits = [role for role in words()[place] if _fits(role, group, sizes, where)]
    named = [role for role in fits if _words_of(group, place, role)] or _by_context(group, fits)
    chosen = _by_half(group, named)
    if len(chosen) == 1:
        said = f"name {group.parts[-1]}" + (f" in {group.parts[-2]}" if len(group.parts) > 1 else "")
        return Role(group, chosen[0], where, f"{said}, shape {list(group.shape)}")
    return Role(
        group,
        "",
        where,
        f"shape {list(group.shape)}",
        doubts=tuple(chosen or _other_half_out(group, fits)) or ("nothing known",),
    )


def _where(group: Group) -> str:
    around: dict[str, list[str]] = words()["around"]
    if any(part in around["shared"] for part in group.parts[:-1]):
        return "shared"
    return "expert" if any(part in around["experts"] for part in group.parts[:-1]) else ""


def _half(group: Group) -> str:
    """Which half of a block the name says: ``attention``, ``mlp`` or nothing."""
    around: dict[str, list[str]] = words()["around"]
    halves = [half for half in ("attention", "mlp") if any(part in around[half] for part in group.parts)]
    return halves[0] if len(halves) == 1 else ""


def _by_half(group: Group, named: list[str]) -> list[str]:
    """Of several roles of one name (``proj``, ``gate``), those of the half of the block that it stands in."""
    if len(named) < 2:
        return named
    half = _half(group)
    return [r for r in named if not half or (r in ATTENTION) is (half == "attention")]


def _other_half_out(group: Group, fits: list[str]) -> list[str]:
    """What a tensor without a known name could be: nothing of the half of the block that it does not stand in."""
    other = {"attention": MLP, "mlp": ATTENTION}.get(_half(group), ())
    return [role for role in fits if role not in other]


def _by_context(group: Group, fits: list[str]) -> list[str]:
    """Numbered modules (``mlp.0``, ``mlp.2`` of an nn.Sequential): the half's name and the shape's sense."""
    if not group.layers or _half(group) != "mlp" or group.parts[-1] not in words()["around"]["mlp"]:
        return []
    found = {"up", "down"} & set(fits)
    return sorted(found) if len(found) == 1 else []


def _fits(role: str, group: Group, s: Sizes, where: str) -> bool:
    """Whether a tensor of this shape can be that; a bias goes with the matrix of its name."""
    shape, width = group.shape, s.width
    if role in NORMS:
        return shape == (width,) and not where
    if role in ("q_norm", "k_norm"):
        return len(shape) == 1
    if role in ("embed", "positions"):
        return len(shape) == 2 and shape[1] == width and (role != "embed" or shape[0] == s.vocab)
    if role == "head":
        return shape in ((s.vocab, width), (s.vocab,)) and (len(shape) == 1) is (group.kind == BIAS)
    if role in ("router", "selection_bias"):
        one = shape == (s.experts,) and (role == "selection_bias" or group.kind == BIAS)
        return (
            not where and s.experts > 0 and (one or (role == "router" and sorted(shape) == sorted((s.experts, width))))
        )
    if role == "shared_gate":
        return shape in ((1, width), (1,))
    if role == "attn_gate" and (_half(group) != "attention" or group.kind == BIAS):
        return False
    if where and role not in ("gate", "up", "gate_up", "down"):
        return False
    return _is_matrix(role, group, s)


def _is_matrix(role: str, group: Group, s: Sizes) -> bool:
    shape = group.shape
    if group.kind == BIAS:
        return len(shape) == 1
    if len(shape) != 2 or s.width not in shape:
        return False
    if role == "gate" and s.experts and sorted(shape) == sorted((s.experts, s.width)):
        return False  # a router of that name
    into = shape[1] == s.width
    # A numbered module is told by its sense alone; a named one may be stored the other way round.
    return group.parts[-1] in words()["inside"].get(role, ()) or into is (role in INTO) or shape[0] == shape[1]
