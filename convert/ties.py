"""Whether the output head is the embedding: read from the tensors wherever they can tell."""

from __future__ import annotations

from ..archs.base import Arch, Dim, Dims, Inventory
from ..archs.targets import from_spec
from ..errors import input_error
from ..mappings.expand import Expanded
from ..mappings.ops import OpError
from ..mappings.tensors import TensorInfo
from .plan import Source, by_rank, joined_shape
from .same_bytes import same_bytes

_USUAL = "lm_head.weight"
"""What classes that have no file in archs/targets call their head; building them to ask takes seconds."""


def tied_of(expanded: Expanded, inventory: Inventory, said: Dim | None, arch: Arch, dims: Dims) -> Dim:
    """Whether the output head is the embedding: by absence, by shared memory, or by comparing every bit. Who says that
    it is must be right."""
    if said is not None and not said.value:
        return said
    found = _compare_ties(expanded, inventory) if expanded.ties else _untied(expanded, inventory, arch, dims)
    if said is not None and not found.value:
        do = "set it to false: both will be written"
        raise input_error(f"{said.because}, but {found.because}", inventory.path, do)
    return said or found


def _untied(expanded: Expanded, inventory: Inventory, arch: Arch, dims: Dims) -> Dim:
    """A mapping that ties nothing: the tensors tell, too, where one of them becomes what the target class would tie."""
    nothing = Dim(False, "default", "the family ties nothing")
    config = {**arch.hf_config(dims.having("tied", nothing)), "tie_word_embeddings": True}
    target = from_spec({**config, "architectures": [arch.tensors]} if isinstance(arch.tensors, str) else config)
    heads = target.ties if target else {_USUAL: ""}
    for rule in expanded.rules:
        made = [name for name in rule.targets if name in heads]
        if made and rule.sources and all(name in inventory for name in rule.sources):
            return Dim(False, "shapes", f"there is {' and '.join(rule.sources)}, which becomes {made[0]}")
    return nothing


def _compare_ties(expanded: Expanded, inventory: Inventory) -> Dim:
    present = [tie for tie in expanded.ties if tie.source in inventory]
    first = (present or expanded.ties)[0]
    if not present:
        return Dim(True, "shapes", f"there is no {first.source}: the head is {first.twin}")
    because = "share one storage"
    for tie in present:
        if tie.twin not in inventory:
            return Dim(False, "shapes", f"there is {tie.source}, but no {tie.twin}")
        if _one_storage(inventory.tensors[tie.source], inventory.tensors[tie.twin]):
            continue
        if not _equal(expanded, inventory, tie.source, tie.twin):
            return Dim(False, "values", f"{tie.source} and {tie.twin} differ")
        because = "are equal, bit for bit"
    return Dim(True, "values", f"{first.source} and {first.twin} {because}")


def _one_storage(a: tuple[TensorInfo, ...], b: tuple[TensorInfo, ...]) -> bool:
    """Whether two tensors are one piece of memory, rank by rank: tied in the checkpoint itself."""
    keys = [[(i.storage, i.offset, i.shape, i.stride, i.dtype) for i in infos] for infos in (a, b)]
    return keys[0] == keys[1]


def _equal(expanded: Expanded, inventory: Inventory, a: str, b: str) -> bool:
    """Compare two tensors of different storages, rank files joined; stops at the first difference."""
    infos = inventory.tensors[a], inventory.tensors[b]
    joins = [expanded.joins.get(name) if inventory.ranks > 1 else None for name in (a, b)]
    try:
        shapes = [
            joined_shape(join, [copies[0].shape for copies in by_rank(info)]) if join else info[0].shape
            for join, info in zip(joins, infos, strict=True)
        ]
    except OpError:
        return False  # the plan names what does not fit
    if shapes[0] != shapes[1] or infos[0][0].dtype != infos[1][0].dtype:
        return False
    one, other = (Source(n, i, s, j) for n, i, s, j in zip((a, b), infos, shapes, joins, strict=True))
    if _alike(one, other):
        return all(same_bytes(x, y) for x, y in zip(one.infos, other.infos, strict=True))
    return _same_values(one, other)


def _alike(a: Source, b: Source) -> bool:
    """Whether two tensors lie in their files in the same way, so that they are equal if those bytes are."""
    forms = [(s.join.how, s.join.axis, s.join.sizes) if s.join else ("disjoint", 0, ()) for s in (a, b)]
    stored = [[(info.shape, info.dtype) for info in s.infos] for s in (a, b)]
    dense = all(info.contiguous for s in (a, b) for info in s.infos)
    return forms[0] == forms[1] and forms[0][0] in ("cat", "blocks", "disjoint") and stored[0] == stored[1] and dense


def _same_values(a: Source, b: Source) -> bool:
    """Compare two tensors that are cut up or turned in different ways."""
    from .sources import lazy_source, same_values
    from .stored import Files

    with Files() as files:
        return same_values(lazy_source(files, a), lazy_source(files, b))
