"""What each tensor is, once those beside it are known: names that come twice, matrices that are one, orientations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from .names import BIAS, Names
from .roles import INTO, MATRICES, Role, Sizes, buffer_of, role_of, sizes_of


def roles_of(names: Names) -> list[Role]:
    """A role for every group, in the checkpoint's order."""
    sizes = sizes_of(names)
    found = [buffer_of(group) or role_of(group, sizes) for group in names.groups]
    return _beside(_oriented(_plain_mlp(_doubled(found)), sizes))


def _doubled(roles: list[Role]) -> list[Role]:
    """Two groups of one role are none: which is which has to be said."""
    count = Counter((role.key, role.group.layers) for role in roles if role.name)
    return [
        replace(role, name="", doubts=(role.name, "something else")) if count[role.key, role.group.layers] > 1 else role
        for role in roles
    ]


def _plain_mlp(roles: list[Role]) -> list[Role]:
    """``w1`` and ``w2`` without ``w3`` are the two of an MLP without a gate; ``up`` with twice the columns of ``down``
    is gate and up in one; ``w3`` beside ``w12`` is the way back."""
    have = {role.key for role in roles}
    found: list[Role] = []
    for role in roles:
        base = f"{role.where}." if role.where else ""
        if role.name == "gate" and f"{base}up.weight" not in have:
            role = replace(role, name="up", because=f"{role.because}; there is no third matrix, so no gate")
        if role.name == "up" and f"{base}gate_up.weight" in have and f"{base}down.weight" not in have:
            role = replace(role, name="down", because=f"{role.because}; gate and up are one matrix, so the way back")
        elif role.name in ("up", "gate_up") and f"{base}gate.weight" not in have:
            role = _fused(role, next((r for r in roles if r.key == f"{base}down.weight"), None))
        found.append(role)
    return found


def _fused(role: Role, down: Role | None) -> Role:
    if role.kind == BIAS or down is None:
        return role
    inner = max(down.group.shape) if len(set(down.group.shape)) > 1 else down.group.shape[0]
    if 2 * inner in role.group.shape and inner not in role.group.shape:
        return replace(role, name="gate_up", because=f"{role.because}; twice the {inner} of down: gate and up in one")
    return role


def _oriented(roles: list[Role], sizes: Sizes) -> list[Role]:
    """Whether matrices are stored as nn.Linear has them or turned, by those that are not square; who contradicts the
    others is in doubt."""
    senses = {role.key: _sense(role, sizes.width) for role in roles}
    told = Counter(sense for sense in senses.values() if sense is not None)
    turned = told[True] > told[False]
    found: list[Role] = []
    for role in roles:
        if role.name in MATRICES and role.kind != BIAS and role.certain:
            sense = senses[role.key]
            if sense is not None and sense is not turned:
                role = replace(role, name="", doubts=(f"{role.name}, turned", "another role"))
            elif turned:
                role = replace(role, turned=True, because=f"{role.because}, stored [in, out]")
        found.append(role)
    return found


def _beside(roles: list[Role]) -> list[Role]:
    """A bias in doubt could be no more than the weight beside it could."""
    weights = {(*r.group.parts, r.group.layers): r.doubts for r in roles if r.kind != BIAS and r.doubts}
    found: list[Role] = []
    for role in roles:
        allowed = weights.get((*role.group.parts, role.group.layers), ()) if role.kind == BIAS else ()
        kept = tuple(doubt for doubt in role.doubts if doubt in allowed)
        found.append(replace(role, doubts=kept) if kept else role)
    return found


def _sense(role: Role, width: int) -> bool | None:
    """True for [in, out]; None where it can't be told."""
    shape = role.group.shape
    if role.name not in MATRICES or len(shape) != 2 or shape[0] == shape[1]:
        return None
    return (shape[1] != width) if role.name in INTO else (shape[0] != width)


def by_key(roles: Iterable[Role]) -> Mapping[str, Role]:
    """The certain ones, by key."""
    return {role.key: role for role in roles if role.certain and role.name}
