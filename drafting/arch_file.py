"""The draft of an arch file: how the checkpoint is recognised, its sizes, the questions, and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from . import configs
from .choose import DECODER, OWN, Choice
from .mapping import Drafted
from .names import Names
from .roles import Role
from .settings import Setting, asked, found_in, listed, quoted
from .together import by_key

HEAD = '''"""{title}: how mdl recognises its checkpoints, measures them, and describes them to vLLM.

Drafted by `mdl new` from {checkpoint}. `mdl plan` lists what is left to decide.
"""

from pathlib import Path
from typing import Any

from mdl.archs.base import Arch, Dims, Inventory, Measure{boolean}
{imports}
{open}

def detect(inv: Inventory) -> list[str]:
    """The evidence, in sentences; an empty list for "not this family"."""
    known = {known}
    if all(name in inv for name in known):
        return ["it has " + ", ".join(known)]
    return []


def _size(m: Measure, name: str, axis: int) -> int | None:
    shape = m.inventory.shape(name)
    return shape[axis] if shape else None
'''

HEADS = '''

def _heads(m: Measure, queries: int | None, keys: int | None) -> None:
    """Heads and the channels of one: ``queries`` are the rows of q, ``keys`` those of k."""
    heads = {heads}
    if not isinstance(heads, int) or heads < 1 or not queries or not keys:
        m.unsettled("head_dim")
        m.unsettled("kv_heads")
        return
    size = queries // heads
    if not size or queries % heads or keys % size:
        m.problem(f"{{heads}} heads do not fit {{queries}} rows of q and {{keys}} rows of k", do="set heads")
        return
    m.set("head_dim", shape=(size, f"{{queries}} rows of q / {{heads}} heads"){head_dim})
    m.set("kv_heads", shape=(keys // size, f"{{keys}} rows of k / {{size}} channels"){kv_heads})
'''

DIMS = '''

def dims(m: Measure) -> None:
    """Settle every size and constant. What shapes say can't be overruled; what nothing says is asked for."""
{lines}
'''

FOOT = """

ARCH = Arch(
    name={name},
    title={title},
    source="our own training code",
    target={target},
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager={eager}
    mapping=str(Path(__file__).with_name({mapping})),
{more})
"""


HEAD_SIZES = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
"""Channels of a head that people use."""


class Subject(Struct, frozen=True):
    """What a draft is about: the package's name, the checkpoint, what was found in it, and where the reference is."""

    name: str
    checkpoint: str
    names: Names
    roles: Sequence[Role]
    extras: Mapping[str, Any]
    choice: Choice
    made: Drafted
    reference: str = ""
    weights: str = ""

    @property
    def found(self) -> Mapping[str, Role]:
        """The certain roles, by key."""
        return by_key(self.roles)

    @property
    def title(self) -> str:
        """For people."""
        return self.name.replace("_", " ").capitalize()

    @property
    def own_class(self) -> str:
        """The name of an own vLLM class."""
        return "".join(part.capitalize() for part in self.name.split("_")) + "ForCausalLM"

    @property
    def target(self) -> str:
        """The class that serves it."""
        return self.choice.spec.get("class") or self.own_class


def arch_text(s: Subject) -> str:
    """The Python file."""
    settings = settings_of(s)
    lines = [setting.line() for setting in settings]
    lines.insert(_after_shapes(settings), _heads_call(s))
    more = [f"    reference={quoted(s.reference)},\n"] if s.reference else []
    if s.choice.name == OWN:
        more += [f'    served="{s.name}.model:{s.own_class}",\n', "    tensors=tensors,\n"]
    composed = s.choice.name == DECODER
    return "".join(
        [
            HEAD.format(
                title=s.title,
                checkpoint=s.checkpoint,
                boolean=", boolean" if any(one.kind == "boolean" for one in settings) else "",
                imports="from mdl.archs.decoder.reading import config_of\n" if composed else "",
                open=_beyond(s),
                known=listed(_telling(s)),
            ),
            _heads_function(s),
            DIMS.format(lines="\n".join(f"    {line}" for line in lines)),
            configs.config_text(s, {one.name for one in settings}),
            configs.tensors_text(s) if s.choice.name == OWN else "",
            FOOT.format(
                name=quoted(s.name),
                title=quoted(s.title),
                target=quoted(s.target),
                eager=_eager(s),
                mapping=quoted(f"{s.name}.yaml"),
                more="".join(more),
            ),
        ]
    )


def _eager(s: Subject) -> str:
    written = quoted(f"{s.name}.eager:build")
    todo = f"  # TODO: {written} once eager.py is written, or reference=FILE.py:FUNCTION"
    return '"",' + ("" if s.reference else todo)


def _beyond(s: Subject) -> str:
    """The question that every draft has: what no tensor shows."""
    if s.choice.native:
        what = f"{s.target} computes {s.choice.spec['computes']}, and nothing else"
        return f"# TODO: {what}. Does the original? If so take this line away, else try --target decoder.\n"
    if s.choice.name == OWN:
        return ""
    what = "multipliers, softcaps, a window, another scale of attention, rotation of a part of each head"
    return f"# TODO: what no tensor shows, such as {what}: add it to hf_config, or take this line away.\n"


def _telling(s: Subject) -> list[str]:
    """Three names that are unlikely to be another family's: the first layer's, and the embedding."""
    first = [r.group.names[0] for r in s.roles if r.group.layers and r.group.names and r.certain and not r.drop]
    outer = [r.group.names[0] for r in s.roles if r.name == "embed" and r.group.names]
    return list(dict.fromkeys([*outer[:1], *first[:1], *first[-1:]])) or list(s.roles[0].group.names[:1])


def settings_of(s: Subject) -> list[Setting]:
    """Everything that the arch file settles, shapes first."""
    found = s.found
    have: list[Setting] = [_layers(s)]
    have += _tables(s, found)
    have += _inner(s, found)
    names = [*s.made.flags, *configs.questions(s, found)]
    questions = [asked(key, s.extras, as_name=as_name) for key, as_name in _renamed(names)]
    routed = [n for n in (1, 2, 4, 6, 8) if n <= s.names.experts]
    return [*have, *(replace(one, values=tuple(routed)) if one.name == "top_k" else one for one in questions)]


def _renamed(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, name.removesuffix("_gpt2").removesuffix("_among")) for name in names]


def _after_shapes(settings: Sequence[Setting]) -> int:
    return sum(1 for one in settings if one.shape)


def _first(pattern: str, layers: Sequence[int] = ()) -> str:
    return pattern.replace("{i}", str((*layers, 0)[0])).replace("{e}", "0")


def _layers(s: Subject) -> Setting:
    whole = next((r.group for r in s.roles if len(r.group.layers) == s.names.layers and r.group.layers), None)
    pattern = _first(whole.pattern.replace("{i}", "{}")) if whole else f"{s.names.stem}.{{}}"
    return Setting("layers", shape=f'm.inventory.count("{pattern}")', because=f"layers that have {pattern}")


def _shape(role: Role, axis: int, name: str, what: str) -> Setting:
    tensor = _first(role.group.pattern, role.group.layers)
    return Setting(name, shape=f'_size(m, "{tensor}", {axis})', because=f"{what} of {tensor}")


def _tables(s: Subject, found: Mapping[str, Role]) -> list[Setting]:
    have: list[Setting] = []
    if "embed.weight" in found:
        have += [
            _shape(found["embed.weight"], 1, "hidden", "columns"),
            _shape(found["embed.weight"], 0, "vocab", "rows"),
        ]
    if "positions.weight" in found:
        have.append(_shape(found["positions.weight"], 0, "context", "rows"))
    return have


def _inner(s: Subject, found: Mapping[str, Role]) -> list[Setting]:
    """Inner widths of MLPs and the number of experts."""
    have: list[Setting] = []
    for where, name in (("", "ffn"), ("expert.", "expert_ffn"), ("shared.", "shared_ffn")):
        if role := found.get(f"{where}down.weight"):
            axis = 0 if role.turned else 1
            have.append(_shape(role, axis, name, "rows" if role.turned else "columns"))
    if role := found.get("router.weight"):
        have.append(_shape(role, 1 if role.turned else 0, "experts", "columns" if role.turned else "rows"))
    return have


def _rows(found: Mapping[str, Role]) -> tuple[str, str]:
    """Python for the rows of q and of k."""

    def size(key: str, axis: int) -> str:
        role = found[key]
        turned = 1 - axis if role.turned else axis
        return f'_size(m, "{_first(role.group.pattern, role.group.layers)}", {turned})'

    queries = size("o.weight", 1) if "o.weight" in found else size("q.weight", 0) if "q.weight" in found else "None"
    if "k.weight" in found:
        return queries, size("k.weight", 0)
    if "qkv.weight" in found:
        return queries, f"(({size('qkv.weight', 0)} or 0) - ({queries} or 0)) // 2"
    return queries, "None"


def _heads_call(s: Subject) -> str:
    queries, keys = _rows(s.found)
    return f"_heads(m, queries={queries}, keys={keys})"


def _heads_function(s: Subject) -> str:
    files = {name: asked_files(name, s.extras) for name in ("head_dim", "kv_heads")}
    return HEADS.format(heads=heads_of(s).line(), **files)


def heads_of(s: Subject) -> Setting:
    """The number of heads: from a norm of one head, or from a file; else it is asked for, with those numbers that leave
    each head a usual number of channels."""
    found = s.found
    heads = _heads_setting(s)
    norm = found.get("q_norm.weight")
    limit = max(found["o.weight"].group.shape) // 2 if "o.weight" in found else 0
    if norm is not None and norm.group.shape[0] <= limit:  # a norm per head has a head's channels
        tensor = _first(norm.group.pattern, norm.group.layers)
        value = f'queries // (_size(m, "{tensor}", 0) or 1) if queries else None'
        return Setting("heads", shape=value, because=f"rows of q / {tensor}", files=heads.files)
    return heads


def _heads_setting(s: Subject) -> Setting:
    """The number of heads, with those that leave each a usual number of channels."""
    found = s.found
    out = found.get("o.weight")
    rows = out.group.shape[0 if out.turned else 1] if out else 0
    usual = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n in HEAD_SIZES]
    return replace(asked("heads", s.extras), values=tuple(usual))


def asked_files(name: str, extras: Mapping[str, Any]) -> str:
    """``, file=(…)`` where keys beside the weights say it, to be held against the shapes."""
    files = tuple(found_in(name, extras))
    return f", file={listed(files)}" if files else ""
