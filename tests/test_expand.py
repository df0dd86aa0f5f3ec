"""From patterns to lists of names: what every rule becomes, and which mappings can't be bound."""

from __future__ import annotations

import pytest

from mdl.mappings import moves
from mdl.mappings.expand import Expanded, Join, Ties, expand, names_target
from mdl.mappings.parse import parse_mapping
from mdl.mappings.parts import Parts
from mdl.mappings.tensors import Target

SIZES = {"layers": 2, "experts": 3, "heads": 4}


def bound(body: str, **flags: bool) -> Expanded:
    text = "format: 1\ntitle: t\nranges: {i: layers, e: experts, last: layers - 1}\n" + body
    return expand(parse_mapping(text, "m.yaml"), SIZES, flags)


def problems(body: str, **flags: bool) -> list[str]:
    return [f"{p.where}: {p.what}" for p in bound(body, **flags).problems]


def pairs(expanded: Expanded) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(rule.sources, rule.targets) for rule in expanded.rules]


def test_a_pattern_is_its_list_of_names() -> None:
    got = bound("keep: [w, 'h.{i}.w', 'h.{layers+3}.w']\nrename: {'a.{i}.{e}': 'b.{e}.{i}'}\n")

    assert not got.problems
    assert pairs(got)[:4] == [((n,), (n,)) for n in ("w", "h.0.w", "h.1.w", "h.5.w")]
    assert pairs(got)[4:] == [((f"a.{i}.{e}",), (f"b.{e}.{i}",)) for e in range(3) for i in range(2)]
    assert [rule.kind for rule in got.rules] == ["keep"] * 4 + ["rename"] * 6
    assert got.rules[1].where == "m.yaml:4:11"


def test_the_target_s_own_names_are_a_list_like_any_other() -> None:
    mapping = parse_mapping('format: 1\ntitle: t\nkeep: ["{target}", x]\ntie: {"{tied}": "{twin}"}\n', "m.yaml")
    target = Target({"a": (2,), "b.c": ()}, {"head": "a"})

    got = expand(mapping, {}, {}, target)

    assert names_target(mapping)
    assert not got.problems
    assert pairs(got) == [((n,), (n,)) for n in ("a", "b.c", "x")]
    assert got.ties == (Ties("head", "a", "", "m.yaml:4:7"),)


def test_the_target_s_names_are_whole_patterns() -> None:
    assert problems('rename: {"{target}": y}') == [
        "m.yaml:4:10: {target}: unknown size 'target'; known: experts, heads, layers"
    ]
    assert not names_target(parse_mapping("format: 1\ntitle: t\nkeep: [w]\n"))


def test_a_word_is_a_part_of_a_name() -> None:
    """What the author of the source chose; it may hold dots, and text that looks like a format."""
    text = "format: 1\ntitle: t\nranges: {i: layers}\n"
    text += "rename: {'{blocks}.{i}.w': 'h.{i}.w'}\ntransform: [{from: '{table}', to: t}]\ndrop: {'{mask}': a mask}\n"
    words = {"blocks": "enc.%d.layers", "table": "pos.pe", "mask": "m"}

    got = expand(parse_mapping(text, "m.yaml"), SIZES, {}, words=words)

    assert not got.problems
    assert pairs(got) == [((f"enc.%d.layers.{i}.w",), (f"h.{i}.w",)) for i in range(2)] + [(("pos.pe",), ("t",))]
    assert list(got.drops) == ["m"]


def test_each_writes_a_rule_several_times() -> None:
    got = bound("transform:\n  - {each: [x, y], from: 'h.{i}.{each}', ops: [transpose]}\n")

    assert pairs(got) == [((n,), (n,)) for n in ("h.0.x", "h.1.x", "h.0.y", "h.1.y")]
    assert {rule.ops for rule in got.rules} == {(moves.Transpose(),)}


def test_sizes_become_integers() -> None:
    got = bound("transform:\n  - {from: q, ops: [{permute_rope: {heads: 2*heads}}, {split: {sizes: [heads, 1]}}]}\n")

    assert got.rules[0].ops == (moves.PermuteRope(8), moves.Split(0, (4, 1)))


def test_parts_have_sizes_and_whole_pipelines() -> None:
    text = "[{split: {sizes: [heads, 1]}}, {parts: [[transpose, {permute_rope: {heads: 2*heads}}], []]}]"
    got = bound(f"transform:\n  - {{from: q, to: [a, b], ops: {text}}}\n")

    assert got.rules[0].ops[1] == Parts(((moves.Transpose(), moves.PermuteRope(8)), ()))


def test_an_unknown_size_inside_parts_is_told() -> None:
    got = bound("transform: [{from: q, ops: [{parts: [[{permute_rope: {heads: n}}]]}]}]\n")

    assert "unknown size 'n'" in got.problems[0].what


def test_stack_takes_a_capture_away_and_unstack_brings_one() -> None:
    got = bound(
        "transform:\n"
        "  - {from: ['h.{i}.{e}.a', 'h.{i}.{e}.b'], to: ['h.{i}.A', 'h.{i}.B'], ops: [{stack: {over: e}}]}\n"
        "  - {from: 'g.{i}', to: 'g.{i}.{e}', ops: [{unstack: {over: e}}]}\n"
    )

    assert not got.problems
    assert got.rules[0].sources == ("h.0.0.a", "h.0.1.a", "h.0.2.a", "h.0.0.b", "h.0.1.b", "h.0.2.b")
    assert got.rules[0].targets == ("h.0.A", "h.0.B")
    assert got.rules[0].ops == (moves.Stack(0, 3),)
    assert got.rules[2].targets == ("g.0.0", "g.0.1", "g.0.2")


def test_when_follows_the_flags() -> None:
    body = "when:\n  bias: {keep: [b]}\n  not bias: {fill: {zeros: ['z.{i}']}}\n"

    assert (pairs(bound(body, bias=True)), dict(bound(body, bias=True).fills)) == ([(("b",), ("b",))], {})
    assert pairs(bound(body, bias=False)) == []
    assert dict(bound(body, bias=False).fills) == {"z.0": "m.yaml:6:29", "z.1": "m.yaml:6:29"}


@pytest.mark.parametrize(("condition", "holds"), [("bias and big", False), ("bias and not big", True), ("big", False)])
def test_when_may_name_several_flags(condition: str, holds: bool) -> None:
    got = bound(f"when: {{{condition}: {{keep: [a]}}}}", bias=True, big=False)
    assert bool(got.rules) is holds


def test_ties_drops_and_joins() -> None:
    got = bound(
        "tie: {a: b, 'c.{i}': {to: d, otherwise: 'e.{i}'}}\n"
        "drop: {'m.{i}': a mask}\n"
        "shards:\n"
        "  cat1: ['w.{i}']\n"
        "  equal: [n]\n"
        "  blocks: [{names: [f], axis: 1, sizes: [heads, 2*heads]}]\n"
    )

    assert [(t.source, t.twin, t.otherwise) for t in got.ties] == [
        ("a", "b", ""),
        ("c.0", "d", "e.0"),
        ("c.1", "d", "e.1"),
    ]
    assert got.drops == {f"m.{i}": ("a mask", "m.yaml:5:8") for i in range(2)}
    assert got.joins["w.1"] == Join("cat", "m.yaml:7:10", 1)
    assert (got.joins["n"].how, got.joins["f"]) == ("equal", Join("blocks", "m.yaml:9:12", 1, (4, 8)))


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("rename: {'a.{i}': b}", "a.{i} and b have not the same captures"),
        ("rename: {'a.{i}': 'b.{e}'}", "a.{i} and b.{e} have not the same captures"),
        (
            "transform: [{from: 'a.{i}.{e}', to: 'b.{i}', ops: []}]",
            "captures do not balance: ['e', 'i'] in from, ['i'] in to",
        ),
        ("transform: [{from: 'a.{i}', to: 'b.{i}', ops: [{stack: {over: e}}]}]", "captures do not balance"),
        ("transform: [{from: a, to: b, ops: [{stack: {over: x}}]}]", "'over' names x, which is not in ranges"),
        ("tie: {'a.{i}': {to: 'b.{i}', otherwise: c}}", "a.{i}, b.{i} and c have not the same captures"),
        ("tie: {a: 'b.{i}'}", "a, b.{i} and no target have not the same captures"),
        ("keep: ['a.{k}']", "a.{k}: unknown size 'k'; known: "),
        ("keep: ['a.{i/2}']", "a.{i/2}: 'i/2' is not a size"),
        ("keep: ['a.{i']", "a.{i: a brace has no partner"),
        ("keep: ['a.{each}']", "a.{each}: unknown size 'each'"),
        ("drop: {'a.i}': why}", "a.i}: a brace has no partner"),
        (
            "transform: [{from: a, ops: [{permute_rope: {heads: n}}]}]",
            "unknown size 'n'; known: experts, heads, layers",
        ),
        ("shards: {blocks: [{names: [a], sizes: [n]}]}", "unknown size 'n'"),
        ("shards: {cat0: [a], cat1: [a]}", "a: two shards rules"),
        ("fill: {zeros: [a, 'a']}", "a is made twice"),
        ("drop: {'a.{i}': x, a.1: y}", "a.1 is claimed twice"),
        (
            "when: {biased: {keep: [a]}}",
            "unknown condition 'biased'; known flags: bias (or 'not FLAG', or several joined by 'and')",
        ),
        ("when: {bias and: {keep: [a]}}", "unknown condition 'bias and'"),
        ("when: {bias or bias: {keep: [a]}}", "unknown condition 'bias or bias'"),
        ("when: {no bias: {keep: [a]}}", "unknown condition 'no bias'"),
        ("when: {'': {keep: [a]}}", "unknown condition ''"),
    ],
)
def test_what_cannot_be_bound(body: str, wanted: str) -> None:
    found = problems(body, bias=True)

    assert len(found) == 1
    assert wanted in found[0]
    assert found[0].startswith("m.yaml:4:")


def test_all_problems_at_once() -> None:
    found = problems("rename: {'a.{i}': b}\nkeep: ['c.{k}', 'd.{k}']\nwhen: {x: {}}\n")

    assert [text.partition(": ")[0] for text in found] == ["m.yaml:5:8", "m.yaml:5:17", "m.yaml:4:10", "m.yaml:6:8"]


def test_a_range_of_unknown_size() -> None:
    mapping = parse_mapping("format: 1\ntitle: t\nranges: {i: depth}\nkeep: ['a.{i}']\n", "m.yaml")
    found = expand(mapping, SIZES, {})

    assert [(p.where, p.what) for p in found.problems] == [
        ("m.yaml:3:10", "unknown size 'depth'; known: experts, heads, layers")
    ]
