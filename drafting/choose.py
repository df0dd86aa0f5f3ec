"""Which class a checkpoint goes into: a native one if all that it holds fits, else the composable decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct

from ..errors import usage_error
from ..mappings.packaged import read_facts
from .roles import Role
from .together import by_key

DECODER, OWN = "decoder", "own"
PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """drafting/targets.yaml."""
    return read_facts(Path(__file__).with_name("targets.yaml"))


def names_of_targets() -> tuple[str, ...]:
    """What ``--target`` may be."""
    return (*facts()["native"], DECODER, OWN)


class Choice(Struct, frozen=True):
    """A target and why; ``spec`` is its part of targets.yaml."""

    name: str
    because: tuple[str, ...]
    spec: Mapping[str, Any]

    @property
    def native(self) -> bool:
        """Whether vLLM has the class itself."""
        return self.name in facts()["native"]

    def target_of(self, key: str) -> str | None:
        """The class's name of a role (``q.weight``), if it has one."""
        role, _, kind = key.rpartition(".")
        name: str | None = self.spec.get("names", {}).get(role)
        if name is None or key in self.spec.get("unfit", ()):
            return None
        return name if role == "selection_bias" else f"{name}.{kind}"


def choose(roles: Sequence[Role], wanted: str | None) -> Choice:
    """The target that was ``wanted``, or the first that fits. Raises MdlError (USAGE) for an unknown name."""
    known = facts()["native"]
    if wanted is not None and wanted not in names_of_targets():
        raise usage_error(f"--target {wanted}: no such target", do=f"one of: {', '.join(names_of_targets())}")
    found = by_key(roles)
    misfits = {name: _misfit(spec, found) for name, spec in known.items()}
    if wanted is not None and wanted in known:
        return Choice(wanted, (misfits[wanted] or "all that was recognised fits", "--target says so"), known[wanted])
    if wanted == OWN:
        return Choice(OWN, ("--target says so",), {"class": ""})
    if wanted == DECODER:
        return Choice(DECODER, ("--target says so",), facts()[DECODER])
    fits = next((name for name in known if not misfits[name]), None)
    open_ = [role.group.pattern for role in roles if not role.certain]
    if fits and not open_:
        spec = known[fits]
        return Choice(fits, (f"every tensor fits {spec['class']}, which computes {spec['computes']}",), spec)
    why = [f"not {name}: {what}" for name, what in misfits.items() if what]
    if open_:
        why = [f"what {', '.join(open_[:3])} is, is not known; no native class has more than its own tensors", *why]
    return Choice(DECODER, ("the composable decoder takes most parts one by one", *why), facts()[DECODER])


def _misfit(spec: Mapping[str, Any], found: Mapping[str, Role]) -> str:
    """What keeps a native class from fitting; empty if nothing does."""
    have = parts_of(found, fused="qkv.weight" in _needs(spec))
    groups: dict[str, list[str]] = spec.get("all_or_none", {})
    may = {*spec.get("may", ()), "head.weight", *(key for keys in groups.values() for key in keys)}
    if missing := [key for key in _needs(spec) if key not in have]:
        return f"it needs {', '.join(missing[:3])}"
    if more := [key for key in have if key not in may and key not in _needs(spec)]:
        return f"it has no place for {', '.join(more[:3])}"
    if half := [field for field, keys in groups.items() if 0 < sum(key in have for key in keys) < len(keys)]:
        return f"{half[0]} switches all of {', '.join(groups[half[0]])}"
    if spec["class"].startswith("Qwen3") and found["q_norm.weight"].group.shape[0] > _head_limit(found):
        return "its norms of q and k are per head"
    return ""


def _head_limit(found: Mapping[str, Role]) -> int:
    """A head of this many channels at most: half the rows of q, so that there are several."""
    shape = found["o.weight"].group.shape if "o.weight" in found else (0,)
    return max(shape) // 2


def _needs(spec: Mapping[str, Any]) -> list[str]:
    flat: list[str] = []
    for entry in spec["needs"]:
        flat += [key for part in entry for key in (part if isinstance(part, list) else [part])]
    return flat


def parts_of(found: Mapping[str, Role], *, fused: bool) -> list[str]:
    """The keys, with fused matrices as what they are made of; ``fused`` keeps q, k, v in one."""
    keys: list[str] = []
    for key in found:
        role, _, kind = key.rpartition(".")
        where, _, name = role.rpartition(".")
        base = f"{where}." if where else ""
        split = PARTS.get(name, ()) if not (fused and name == "qkv") else ()
        keys += [f"{base}{part}.{kind}" for part in split] or [key]
    return keys
