"""Mapping files: each bad one is refused with all its errors and their positions; the good ones are read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdl.archs.registry import all_archs, mapping_path
from mdl.errors import Kind, MdlError
from mdl.mappings import expr, rules, schema
from mdl.mappings.parse import load_mapping, parse_mapping

BAD = sorted((Path(__file__).parent / "bad_mappings").glob("*.yaml"))


def errors(path: Path) -> list[str]:
    with pytest.raises(MdlError) as caught:
        load_mapping(path)
    assert caught.value.kind is Kind.INPUT
    return [f"{p.where}: {p.what}" for p in caught.value.problems]


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_mapping_is_refused_with_every_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    wanted = path.with_suffix(".txt").read_text(encoding="utf-8").replace("FILE", path.name).splitlines()

    assert errors(path) == wanted


def test_a_mapping_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MdlError) as missing:
        load_mapping(tmp_path / "foo.yaml")
    assert "write foo.yaml beside foo.py" in missing.value.problems[0].do

    (tmp_path / "latin.yaml").write_bytes(b"title: caf\xe9\n")
    assert "cannot read the mapping" in errors(tmp_path / "latin.yaml")[0]


@pytest.mark.parametrize("name", sorted(all_archs()))
def test_the_mappings_of_the_house_are_read(name: str) -> None:
    mapping = load_mapping(mapping_path(all_archs()[name]))

    assert mapping.file.ranges["i"] == "layers"
    sparse = {"sparse_layers", "start", "dense_run", "expert_parts", "value_layers"}
    assert set(mapping.file.ranges.values()) <= {"layers", "dense_layers", "moe_layers", "heads", "experts"} | sparse


def test_positions_are_those_of_the_rules() -> None:
    mapping = parse_mapping("format: 1\ntitle: t\nkeep:\n  - a\n  - b\nrename:\n  c: d\n", "folder/x.yaml")

    assert mapping.where(("keep", 1)) == "folder/x.yaml:5:5"
    assert mapping.where(("rename", "c")) == "folder/x.yaml:7:3"
    assert mapping.where(("rename", "c", "deeper")) == "folder/x.yaml:7:3"  # the nearest node above
    assert mapping.where(("unknown",)) == "folder/x.yaml:1:1"


def test_plain_words_stay_words() -> None:
    """YAML's yes, no, on and null are names of tensors here."""
    mapping = parse_mapping("format: 1\ntitle: t\nkeep: [yes, no, null, on, 1.5e]\n")

    assert mapping.file.section.keep == ("yes", "no", "null", "on", "1.5e")


def test_an_operation_is_a_name_or_a_name_with_arguments() -> None:
    text = "format: 1\ntitle: t\ntransform:\n  - {from: a, ops: [transpose, {transpose: }, {transpose: {}}]}\n"

    assert [op.op for op in parse_mapping(text).file.section.transform[0].ops] == ["transpose"] * 3


@pytest.mark.parametrize(
    ("text", "value"), [("layers", 3), ("2*heads + 1", 9), ("(layers - 1)*heads//2", 4), ("7", 7), (5, 5)]
)
def test_sizes(text: str | int, value: int) -> None:
    assert expr.evaluate(text, {"layers": 3, "heads": 4}) == value


@pytest.mark.parametrize(
    "text", ["", "a.b", "f(1)", "a / 2", "a ** 2", "-a", "a if a else 1", "'a'", "a[0]", "1.5", "True"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(expr.ExprError, match="is not a size"):
        expr.evaluate(text, {"a": 1})


def test_unknown_names_and_division_by_zero() -> None:
    with pytest.raises(expr.ExprError, match="unknown size 'b'; known: a"):
        expr.evaluate("a + b", {"a": 1})
    with pytest.raises(expr.ExprError, match="division by zero"):
        expr.evaluate("a // (a - 1)", {"a": 1})


def test_the_vocabulary_of_the_schema_is_the_vocabulary_of_the_rules() -> None:
    known = {spec.model_fields["op"].annotation.__args__[0] for spec in schema.OpSpec.__subclasses__()}

    assert known == set(rules.OPERATIONS)


def test_a_text_that_passed_once_needs_no_pydantic_again(tmp_path: Path) -> None:
    """And one that changed is checked anew, whatever its name."""
    file = tmp_path / "m.yaml"
    code = f"""
import sys
import os
import subprocess
import sys
from pathlib import Path
from mdl.errors import MdlError
from mdl.mappings.parse import load_mapping
try:
    load_mapping(Path({str(file)!r}))
except MdlError as error:
    print(error)
print("pydantic" in sys.modules)
"""

    def run() -> list[str]:
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    file.write_text("format: 1\ntitle: a\nkeep: [x]\n")
    assert [run(), run()] == [["True"], ["False"]]
    file.write_text("format: 1\ntitle: a\nkeeep: [x]\n")
    assert run()[-1] == "True"
    assert "keeep: unknown key" in run()[0]
