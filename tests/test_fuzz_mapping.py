"""Random and damaged YAML against the mapping parser: a mapping, or every error with its place; nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mdl.mappings import expr
from mdl.mappings.rules import OPERATIONS

from .fuzz import seeds
from .fuzz.inputs import fixed, held, mutated

WORDS = [
    "a",
    "layers.{i}.w",
    "{target}",
    "{tied}",
    "{i",
    "{0//0}",
    "{a.b}",
    "",
    "heads",
    "layers - 1",
    "\x00",
    "é",
    "-1",
]
KEYS = [
    "from",
    "to",
    "each",
    "ops",
    "op",
    "axis",
    "sizes",
    "over",
    "otherwise",
    "zeros",
    "cat0",
    "blocks",
    "names",
    "i",
]
TOP = ["format", "title", "keep", "rename", "transform", "fill", "tie", "drop", "shards", "ranges", "when"]
LEAVES = st.sampled_from(WORDS) | st.integers(-1, 4) | st.floats() | st.none() | st.booleans() | st.dates()
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, *OPERATIONS, *WORDS]), inner, max_size=3)
    ),
    max_leaves=12,
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A mapping of which some sections are right and some hold anything."""
    names = st.lists(st.sampled_from(WORDS), max_size=3)
    pairs = st.dictionaries(st.sampled_from(WORDS), st.sampled_from(WORDS), max_size=3)
    operation = st.sampled_from(
        [*OPERATIONS, {"pad": {"to": "hidden"}}, {"slice": {"stop": 1}}, {"stack": {"over": "i"}}]
    )
    rule = st.fixed_dictionaries({"from": st.sampled_from(WORDS), "ops": st.lists(operation, max_size=2)})
    right: dict[str, st.SearchStrategy[Any]] = {
        "keep": names,
        "rename": pairs,
        "transform": st.lists(rule, max_size=2),
        "fill": st.fixed_dictionaries({"zeros": names}),
        "tie": pairs,
        "drop": pairs,
        "shards": st.dictionaries(st.sampled_from(["cat0", "equal", "mean"]), names, max_size=2),
        "ranges": st.just({"i": "layers"}),
    }
    document: dict[Any, Any] = {"format": 1, "title": "t", "ranges": {"i": "layers"}}
    for key in draw(st.lists(st.sampled_from(list(right)), max_size=4)):
        document[key] = draw(right[key])
    for key in draw(st.lists(st.sampled_from(TOP), max_size=1)):
        document[key] = draw(VALUES)
    if draw(st.integers(0, 3)) == 0:
        document["when"] = {draw(st.sampled_from(["tied", "not tied", "", "x y"])): draw(VALUES)}
    return yaml.safe_dump(document, allow_unicode=True, default_flow_style=draw(st.booleans())).encode()


def test_random_mappings(tmp_path: Path) -> None:
    accepted: list[bool] = []

    @fixed(300)
    @given(data=documents())
    def run(data: bytes) -> None:
        accepted.append(held("mapping", data, tmp_path) is None)

    run()
    assert 30 < accepted.count(True) < len(accepted)


@fixed(150)
@given(data=st.deferred(lambda: mutated(seeds.seeds()["mapping"])))
def test_mutated_mappings(data: bytes, tmp_path: Path) -> None:
    held("mapping", data, tmp_path)


@fixed(100)
@given(data=st.binary(max_size=60) | st.text("[]{}:,-&*!|>%'\"#?\n ab", max_size=60).map(str.encode))
def test_what_yaml_is_made_of(data: bytes, tmp_path: Path) -> None:
    held("mapping", data, tmp_path)


@fixed(300)
@given(text=st.text("ab01+-*/( ).\x00_%", max_size=30))
def test_a_size_has_a_value_or_an_error(text: str) -> None:
    with contextlib.suppress(expr.ExprError):
        assert isinstance(expr.evaluate(text, {"a": 2, "b": 3}), int)


# --- what the fuzzers found ---

FOUND = {
    "lists in lists": "keep: " + "[" * 3000,
    "tables in tables": "\n".join(" " * k + "a:" for k in range(1500)),
    "a size that adds for ever": "format: 1\ntitle: t\nranges: {i: '" + "1+" * 20_000 + "1'}\n",
    "a size of signs": "format: 1\ntitle: t\nranges: {i: '" + "-" * 100_000 + "1'}\n",
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND)
def test_what_once_broke_a_promise(text: str, tmp_path: Path) -> None:
    assert held("mapping", text.encode(), tmp_path) is not None


def test_a_name_with_a_nul_becomes_a_problem(tmp_path: Path) -> None:
    """In a name, a size is read only when the mapping is bound to a checkpoint."""
    assert held("mapping", b'format: 1\ntitle: t\nkeep: ["{\\0}"]\n', tmp_path) is None
