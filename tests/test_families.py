"""Every family has checkpoints in the table of families, and every container brings one there and back."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from mdl.archs.registry import all_archs
from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.validate.client import Engine

from . import checkpoints as make
from .cases import CASES, WHOLE, WRITTEN, comes_back, placed
from .containers import CONTAINERS


@pytest.fixture(scope="module")
def table() -> Any:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("families")
    sys.path.remove(folder)


def test_every_family_has_a_case() -> None:
    gpu_only = {"mamba"}  # its scan is a CUDA kernel in vLLM: its own test says so
    assert {case.family for case in CASES.values()} | gpu_only == set(all_archs())


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name != "DCP, FSDP2 of two"])
def test_there_and_back_in_every_container(container: str, tmp_path: Path) -> None:
    made: dict[str, Path] = {}
    for how in (WRITTEN, container):
        path, options = placed(CASES["nanogpt, biases, tied"], how, tmp_path / how)
        made[how] = tmp_path / how / "out"
        convert(prepare(path, options), made[how], tokenizer="none")
        assert comes_back(path, made[how]) == WHOLE
    make.same(make.saved(made[container]), make.saved(made[WRITTEN]))


def test_a_round_trip_that_loses_a_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = placed(CASES["mingpt, new"], WRITTEN, tmp_path)
    convert(prepare(path, options), tmp_path / "out", tokenizer="none")
    assert comes_back(path, tmp_path / "out") == WHOLE

    document = bytearray(path.read_bytes())
    weights = prepare(path, options).inventory.tensors["lm_head.weight"][0]
    document[weights.offset] ^= 1
    path.write_bytes(document)
    (tmp_path / "back.pt").unlink()
    assert not comes_back(path, tmp_path / "out")


@pytest.mark.engine
def test_a_row_of_the_table(table: Any, tmp_path: Path, engine: Engine) -> None:
    row = table.run("nanogpt, no biases", "safetensors, three files", tmp_path / "a", engine)

    assert row.ok
    assert 0 < row.prefill < 1e-10
    assert "| nanogpt | no biases | safetensors, three files | ✓ | ✓ | ✓ | ✓ |" in table.table([row])
    assert "1 rows of 1 families, 1 without a fault." in table.table([row])


def test_what_failed_is_in_the_table(table: Any, tmp_path: Path) -> None:
    case = CASES["nanogpt, no biases"]
    table.CASES["nanogpt, wrong"] = type(case)("nanogpt", "wrong", case.write, case.held, {"heads": "7"})
    try:
        row = table.run("nanogpt, wrong", WRITTEN, tmp_path / "a", engine=None)
    finally:
        del table.CASES["nanogpt, wrong"]

    assert not row.ok
    assert "- nanogpt, wrong, as written: " in table.table([row])
    assert "0 without a fault" in table.table([row])
