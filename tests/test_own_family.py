"""The family that docs/architectures.md walks through: examples/own_family, taught to mdl from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdl.mappings.parse import parse_mapping
from mdl.mappings.rules import OPERATIONS
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from . import checkpoints as make
from . import servable

ROOT = Path(__file__).parent.parent


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A copy of the example with its checkpoint."""
    folder = tmp_path / "own_family"
    shutil.copytree(ROOT / "examples" / "own_family", folder)
    subprocess.run([sys.executable, "make.py"], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    """What mdl prints there, on both streams."""
    command = [str(Path(sys.executable).with_name("mdl")), *arguments]
    env = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def edit_mapping(family: Path, old: str, new: str) -> None:
    mapping = family / "loom.yaml"
    text = mapping.read_text()
    assert text.count(old) == 1
    mapping.write_text(text.replace(old, new))


def test_it_is_inspected_planned_converted_and_exported(family: Path) -> None:
    ours = ("ckpt.pt", "--arch", "./loom.py")
    assert "blocks.N.mixer.wqkv and blocks.N.ff.gate_up are Loom's names" in run(family, "inspect", *ours)
    assert "split, parts (permute_rope; permute_rope; keep)" in run(family, "plan", *ours)
    assert "parts (permute_rope; permute_rope; keep), concat" in run(family, "plan", *ours, "--reverse")

    run(family, "convert", ours[0], "out", *ours[1:], "--tokenizer", "none")
    run(family, "export", "out", "back.pt")

    before, after = (torch.load(family / name) for name in ("ckpt.pt", "back.pt"))
    make.same(after["weights"], before["weights"])
    assert after["hp"] == before["hp"]
    raw, saved = before["weights"]["blocks.1.mixer.wqkv.weight"], make.saved(family / "out")
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert torch.equal(saved[names[0]][1], raw[2])  # the second row of a head is its second pair's first
    assert torch.equal(saved[names[1]][1], raw[128 + 2])
    assert torch.equal(saved[names[2]], raw[192:])
    steps = json.loads((family / "out" / "mdl.json").read_text())["steps"]
    told = next(step["ops"] for step in steps if step["targets"] == names)
    assert [one["heads"] for part in told[1]["parts"] for one in part] == [4, 2]


def test_one_list_for_all_parts_is_refused_with_its_line(family: Path) -> None:
    old = "parts: [[{permute_rope: {heads: heads}}], [{permute_rope: {heads: kv_heads}}], []]"
    edit_mapping(family, old, "permute_rope: {heads: heads}")

    said = run(family, "plan", "ckpt.pt", "--arch", "./loom.py", code=3)

    assert "permute_rope takes one tensor, got 3: give each its own operations with parts" in said
    assert "loom.yaml:15:5" in said


def test_what_is_missing_or_has_the_wrong_shape_is_told_with_what_to_do(family: Path) -> None:
    edit_mapping(family, "ops: [{split: {sizes: [ffn, ffn]}}]", "ops: [{split: {sizes: [ffn, ffn]}}, transpose]")
    said = run(family, "plan", "ckpt.pt", "--arch", "./loom.py", code=3)
    assert "gate_proj.weight would be [128, 320], the target class has [320, 128]" in said
    assert "add or take away transpose" in said

    (family / "loom.yaml").unlink()
    said = run(family, "plan", "ckpt.pt", "--arch", "./loom.py", code=3)
    assert "there is no such mapping" in said
    assert "write loom.yaml beside loom.py" in said


def test_the_page_shows_the_files_as_they_are() -> None:
    page = (ROOT / "docs" / "mappings.md").read_text()
    rules = yaml.safe_load((ROOT / "examples" / "own_family" / "loom.yaml").read_text())["transform"]
    shown = [block.partition("```")[0] for block in page.split("```yaml\n")[1:]]

    assert any(yaml.safe_load(block).get("transform") == rules for block in shown)


def test_pages_show_what_the_program_prints() -> None:
    """As far as it prints without vLLM."""
    command = [sys.executable, str(ROOT / "docs" / "refresh.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr


def test_every_operation_has_an_example_that_is_read() -> None:
    table = (ROOT / "docs" / "mappings.md").read_text().partition("## Operations")[2].partition("\n\n`axis`")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    text = "format: 1\ntitle: t\ntransform: [{from: a, ops: [" + ", ".join(row[1].strip("`") for row in rows) + "]}]"

    read = [op.op for op in parse_mapping(text).file.section.transform[0].ops]

    assert read == [row[0].strip("| `") for row in rows]
    assert set(read) == set(OPERATIONS)


@pytest.mark.engine
def test_it_is_verified_by_dims_and_by_its_own_code(
    family: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "model", raising=False)  # other tests have models too
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = servable.layout(family / "ckpt.pt", family / "out", arch=str(family / "loom.py"))

    arch = str(family / "loom.py")
    for settings in (Settings(arch=arch), Settings(arch=arch, reference=f"{family / 'model.py'}:build")):
        report: Any = verify(out, settings, engine=engine)
        assert report.ok, report

    for name in ("model", "loom_eager"):
        monkeypatch.delitem(sys.modules, name, raising=False)
