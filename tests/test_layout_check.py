"""The verifier's first tier: what it says about a folder before any model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdl.convert.config import read_config
from mdl.convert.manifest import read_manifest
from mdl.validate.hypothesis import differences
from mdl.validate.layout import layout_problems
from mdl.validate.mutate import read_tensors, write_copy
from mdl.validate.verify import Settings, source_of

from . import servable as make


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A layout with nothing wrong."""
    return make.layout(make.llama2c(tmp_path / "ckpt.pt"), tmp_path / "out")


def copied(whole: Path, out: Path, config: dict[str, Any]) -> list[str]:
    """What is said of a copy with another config.json, whose manifest agrees with it."""
    out.mkdir()
    manifest = read_manifest(whole)
    made = write_copy(whole, out, manifest, read_tensors(whole, manifest), config)
    return [problem.what for problem in layout_problems(out, made, source_of(manifest, Settings()))]


@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 32), ("rope_scaling", {"rope_type": "linear", "factor": 4.0}), ("quantization_config", {})],
)
def test_a_field_that_the_checkpoint_does_not_make_is_a_fault(
    field: str, value: Any, whole: Path, tmp_path: Path
) -> None:
    """vLLM reads it as it reads those that mdl wrote."""
    config, planned = read_config(whole), source_of(read_manifest(whole), Settings()).config
    changed = config | {field: value}

    assert copied(whole, tmp_path / "same", config) == []
    assert copied(whole, tmp_path / "changed", changed) == [f"{field} is {value!r}, the checkpoint makes no such field"]
    assert differences(config, planned) == {}


def test_a_failure_is_explained_by_the_field_too(whole: Path) -> None:
    config, planned = read_config(whole), source_of(read_manifest(whole), Settings()).config

    assert differences(config | {"sliding_window": 32}, planned) == {"sliding_window": (32, None)}
