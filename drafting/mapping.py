"""The draft of a mapping: one rule per group with its evidence beside it, and a TODO wherever there is a choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct, field
from msgspec.structs import replace

from .choose import DECODER, OWN, PARTS, Choice, parts_of
from .names import Group
from .roles import Role
from .together import by_key

SPLIT = {"qkv": "[heads*head_dim, kv_heads*head_dim, kv_heads*head_dim]"}
BY_HEAD = "deinterleave_qkv: {heads: heads, kv_heads: kv_heads}"


class Rule(Struct, frozen=True):
    """One rule: names, operations as YAML, the evidence; ``when`` is its condition, empty for always."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[str, ...]
    because: str
    when: str = ""


class Drafted(Struct):
    """The rules of a draft, and the flags that they ask for."""

    rules: list[Rule] = field(default_factory=list[Rule])
    ties: list[tuple[str, str, str, str]] = field(default_factory=list[tuple[str, str, str, str]])
    drops: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    fills: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    todos: list[str] = field(default_factory=list[str])
    flags: list[str] = field(default_factory=list[str])

    def flag(self, name: str) -> None:
        """Note a flag that the arch file has to settle."""
        if name not in self.flags:
            self.flags.append(name)


def draft_rules(roles: Sequence[Role], choice: Choice, layers: int) -> Drafted:
    """Rules for every group: what is certain as a rule, everything else as a TODO."""
    made = Drafted()
    embed = next((role for role in roles if role.name == "embed" and role.certain), None)
    for role in roles:
        for group in _written_out(role.group, layers):
            one = _Work(role, group, choice, made)
            if role.drop:
                made.drops.append((group.pattern, role.drop, role.because))
            elif choice.name == OWN:
                made.rules.append(Rule((group.pattern,), (group.pattern,), (), role.because))
            elif not role.certain or not one.has_place():
                made.todos.append(one.question())
            elif role.name == "head" and role.kind == "weight" and embed is not None:
                otherwise = str(choice.target_of("head.weight"))
                made.ties.append((group.pattern, embed.group.pattern, otherwise, role.because))
            else:
                one.rule()
    _fill(made, roles, choice)
    return made


def _fill(made: Drafted, roles: Sequence[Role], choice: Choice) -> None:
    """Biases that the class has and the checkpoint lacks are zero: where one field switches several, all of them."""
    have = parts_of(by_key(roles), fused=bool(choice.spec.get("turned")))
    if choice.spec.get("turned"):
        due = [key for key in choice.spec["may"] if key not in have]
    else:
        sets = (("q.bias", "k.bias", "v.bias"), ("gate.bias", "up.bias")) if choice.name == DECODER else ()
        present = [keys for keys in sets if any(key in have for key in keys)]
        due = [k for keys in present for k in keys if k not in have and k.replace("bias", "weight") in have]
    for key in due:
        made.fills.append((str(choice.target_of(key)), f"the checkpoint has no {key}"))


def _written_out(group: Group, layers: int) -> list[Group]:
    """A group that only some layers have: the last ones by a range of their own, others layer by layer."""
    if not group.layers or len(group.layers) == layers:
        return [group]
    numbers = [tail(group, layers)] if tail(group, layers) else [str(i) for i in group.layers]
    return [replace(group, pattern=group.pattern.replace("{i}", number)) for number in numbers]


def tail(group: Group, layers: int) -> str:
    """``{j+2}`` for a group that all layers but the first two have, where j runs over the others; else nothing."""
    first = group.layers[0] if group.layers else 0
    return f"{{j+{first}}}" if first and group.layers == tuple(range(first, layers)) else ""


class _Work(Struct, frozen=True):
    role: Role
    group: Group
    choice: Choice
    made: Drafted

    def _target(self, name: str) -> str:
        key = ".".join(filter(None, [self.role.where, name, self.role.kind]))
        target = self.choice.target_of(key) or ""
        head, _, rest = self.role.group.pattern.partition("{i}")
        number = self.group.pattern.removeprefix(head).removesuffix(rest) if rest else "{i}"
        return target.replace("{i}", number)

    def _parts(self) -> tuple[str, ...]:
        fused = PARTS.get(self.role.name, ())
        return () if self._target(self.role.name) else fused

    def has_place(self) -> bool:
        """Whether the class has a tensor for it, or for each of its parts."""
        return bool(self._target(self.role.name)) or bool(self._parts() and all(map(self._target, self._parts())))

    def question(self) -> str:
        """What is to be decided, with the alternatives."""
        shown = self.group.shown
        if self.role.certain:
            what = f"{self.role.name} by its {self.role.because}, but {self.choice.spec['class']} has no such tensor"
            return f'{shown}: {what}; take another --target, or drop it: "{self.group.pattern}": REASON'
        places = [f"{doubt} -> {target}" for doubt in self.role.doubts if (target := self._target(doubt))]
        could = f"could be {', '.join(places)}" if places else f"not known ({', '.join(self.role.doubts)})"
        do = f"add {self.group.pattern}: TARGET under rename, or under drop with the reason"
        return f"{shown}: {could}; {do}"

    def rule(self) -> None:
        """The rule, or one for each way in which it may be."""
        turn = self.role.turned is not bool(self.choice.spec.get("turned")) and self._is_matrix()
        before = ("transpose",) if turn and self.role.turned else ()
        after = ("transpose",) if turn and not self.role.turned else ()
        if self.role.name == "qkv":
            self._fused_qkv(before, after)
        elif self._parts():
            self._fused_gate(before)
        elif (
            self.choice.native and "turned" not in self.choice.spec and self.role.name in ("q", "k", "q_norm", "k_norm")
        ):
            self._rotated(before)
        else:
            self._add((self._target(self.role.name),), (*before, *after))

    def _is_matrix(self) -> bool:
        return len(self.group.shape) == 2 and self.role.name not in ("embed", "positions", "head")

    def _add(self, targets: Iterable[str], ops: Iterable[str], when: str = "") -> None:
        self.made.rules.append(Rule((self.group.pattern,), tuple(targets), tuple(ops), self.role.because, when))

    def _rotated(self, before: tuple[str, ...]) -> None:
        """The class rotates halves; who rotates neighbours has other rows."""
        self.made.flag("rotary_pairs")
        heads = {"q": "heads", "k": "kv_heads"}.get(self.role.name, "1")
        targets = (self._target(self.role.name),)
        self._add(targets, (*before, f"permute_rope: {{heads: {heads}}}"), "rotary_pairs")
        self._add(targets, before, "not rotary_pairs")

    def _fused_qkv(self, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        self.made.flag("qkv_by_head")
        whole = self._target("qkv")
        targets = (whole,) if whole else tuple(self._target(part) for part in PARTS["qkv"])
        split = () if whole else (f"split: {{sizes: {SPLIT['qkv']}}}",)
        turns = self.choice.native and not whole
        if turns:
            self.made.flag("rotary_pairs")
        for by_head in (False, True):
            order = (BY_HEAD,) if by_head else ()
            if by_head and self.role.turned and not before and self._is_matrix():
                order = ("transpose", BY_HEAD, "transpose")
            said = "qkv_by_head" if by_head else "not qkv_by_head"
            if not turns:
                self._add(targets, (*before, *order, *split, *after), said)
                continue
            pairs = "parts: [[{permute_rope: {heads: heads}}], [{permute_rope: {heads: kv_heads}}], []]"
            self._add(targets, (*before, *order, *split), f"{said} and not rotary_pairs")
            self._add(targets, (*before, *order, *split, pairs), f"{said} and rotary_pairs")

    def _fused_gate(self, before: tuple[str, ...]) -> None:
        self.made.flag("gate_first")
        gate, up = (self._target(part) for part in PARTS["gate_up"])
        inner = {"expert": "expert_ffn", "shared": "shared_ffn"}.get(self.role.where, "ffn")
        split = f"split: {{sizes: [{inner}, {inner}]}}"
        self._add((gate, up), (*before, split), "gate_first")
        self._add((up, gate), (*before, split), "not gate_first")


def mapping_text(title: str, made: Drafted, ranges: Sequence[tuple[str, str]], notes: Sequence[str]) -> str:
    """The YAML file."""
    lines = [*(f"# {note}" for note in notes), "format: 1", f"title: {title}"]
    if ranges:
        lines.append("ranges: {" + ", ".join(f"{k}: {v}" for k, v in ranges) + "}")
    lines += [f"# TODO: {todo}" for todo in made.todos]
    conditions = list(dict.fromkeys(rule.when for rule in made.rules))
    lines += _section([rule for rule in made.rules if not rule.when], "")
    if made.ties:
        lines.append("tie: # equal bit for bit: one is written; else the head stays its own")
        lines += [f"  {s}: {{to: {_quoted(t)}, otherwise: {_quoted(o)}}} # {why}" for s, t, o, why in made.ties]
    if made.fills:
        lines.append("fill:")
        lines.append("  zeros:")
        lines += [f"    - {_quoted(name)} # {why}" for name, why in made.fills]
    if made.drops:
        lines.append("drop:")
        lines += [f"  {name}: {reason} # {why}" for name, reason, why in made.drops]
    if any(conditions):
        lines.append("when: # the flags are settled in the arch file")
        for condition in filter(None, conditions):
            lines.append(f"  {condition}:")
            lines += _section([rule for rule in made.rules if rule.when == condition], "    ")
    return "\n".join(lines) + "\n"


def _section(rules: Sequence[Rule], indent: str) -> list[str]:
    lines: list[str] = []
    kept = [r for r in rules if not r.ops and r.sources == r.targets]
    plain = [r for r in rules if not r.ops and r.sources != r.targets]
    if kept:
        lines.append(f"{indent}keep:")
        lines += [f"{indent}  - {_quoted(r.sources[0])} # {r.because}" for r in kept]
    if plain:
        lines.append(f"{indent}rename:")
        lines += [f"{indent}  {r.sources[0]}: {r.targets[0]} # {r.because}" for r in plain]
    moved = [r for r in rules if r.ops]
    if moved:
        lines.append(f"{indent}transform:")
    for rule in moved:
        lines.append(f"{indent}  - from: {rule.sources[0]} # {rule.because}")
        names = ", ".join(map(_quoted, rule.targets)) if len(rule.targets) > 1 else "".join(rule.targets)
        lines.append(f"{indent}    to: [{names}]" if len(rule.targets) > 1 else f"{indent}    to: {names}")
        lines.append(f"{indent}    ops:")
        lines += [f"{indent}      - {op}" for op in rule.ops]
    return lines


def _quoted(name: str) -> str:
    """Inside brackets and at the beginning of a value, braces mean something to YAML."""
    return f'"{name}"' if "{" in name else name
