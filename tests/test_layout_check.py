"""The verifier's first tier: what it says about a folder before any model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mdl.convert.config import read_config
from mdl.convert.manifest import read_manifest
from mdl.errors import Kind, MdlError
from mdl.validate.checks import failed_to_run
from mdl.validate.client import Engine, EngineFailure
from mdl.validate.hypothesis import differences
from mdl.validate.layout import layout_problems
from mdl.validate.mutate import estimate, read_tensors, run_mutations, write_copy
from mdl.validate.report import Report
from mdl.validate.verify import Settings, source_of, verify

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


LACKING = {"weights": "model.safetensors", "config": "config.json", "generation": "generation_config.json"}


class NoEngine(Engine):
    """An engine that must not be asked."""

    def __init__(self) -> None:
        """Start nothing."""

    def _ask(self, request: Mapping[str, Any]) -> NoReturn:
        raise AssertionError(f"vLLM was asked to {request['op']}")


@pytest.mark.parametrize("name", LACKING.values(), ids=LACKING)
@pytest.mark.parametrize("check", [verify, run_mutations])
def test_a_layout_that_lacks_a_file_is_an_error_of_the_input(
    check: Callable[..., object], name: str, whole: Path
) -> None:
    """It says nothing about the model, and nothing runs."""
    (whole / name).unlink()
    with pytest.raises(MdlError, match="is missing") as caught:
        check(whole, engine=NoEngine())

    assert caught.value.kind is Kind.INPUT


def test_the_verdict_on_a_whole_layout_that_vllm_refuses_says_so() -> None:
    failure = EngineFailure("load", "ValueError", "no such shape")
    report = Report(
        *["x"] * 6,
        ok=False,
        checks=tuple(failed_to_run(failure, ("prefill",))),
        inputs="",
        seed=0,
        trusted=(),
        notes=(),
        versions={},
        manifest="",
        command="",
        seconds={},
    )

    assert report.verdict == "NOT the same model: vLLM failed to load the layout"


def test_how_many_mistakes_and_how_long_they_take_is_said_first(whole: Path) -> None:
    said: list[str] = []
    with pytest.raises(AssertionError, match="vLLM was asked"):
        run_mutations(whole, engine=NoEngine(), names=["rope-theta", "k-v", "position-shift"], say=said.append)

    assert said[0].startswith("2 mistakes, about 1 min")  # Llama has no position table
    assert estimate(37).startswith("37 mistakes, about 2 to 6 min")
