"""Megatron-LM's torch_dist folders whose layers are stacked: every class, the way back, vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.export import export
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts_checks as checks
from .. import megatron


@pytest.mark.parametrize("row", megatron.ROWS)
def test_the_layout_computes_what_the_checkpoint_did_and_comes_back(row: str, tmp_path: Path) -> None:
    source = megatron.dist(tmp_path / "in", row, stacked=True)

    prepared = checks.layout(source, tmp_path / "out")

    assert (prepared.arch.name, prepared.target) == ("megatron_stacked", megatron.TARGETS[row])
    assert prepared.match.because[1] == "each holds all 4 layers, as torch_dist stacks them"
    assert megatron.error(tmp_path / "out", prepared) < 1e-11
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(prepared.inventory.tensors)
    for name, tensor in megatron.state(row, fused=True).items():
        number = name.split(".")[2] if name.startswith("decoder.layers.") else ""
        held = back[name.replace(f".{number}.", ".", 1)][int(number)] if number else back[name]
        assert make.bits(held) == make.bits(tensor), name


def test_both_forms_of_a_folder_become_the_same_layout(tmp_path: Path) -> None:
    for name, stacked in {"one by one": False, "stacked": True}.items():
        checks.layout(megatron.dist(tmp_path / name, "qwen3_pairs", stacked=stacked), tmp_path / f"{name}.out")

    make.same(make.saved(tmp_path / "stacked.out"), make.saved(tmp_path / "one by one.out"))


@pytest.mark.engine
def test_vllm_computes_what_stacked_layers_compute(tmp_path: Path, engine: Engine) -> None:
    checks.layout(megatron.dist(tmp_path / "in", "qwen2_pairs", stacked=True), tmp_path / "out")

    checks.is_green(tmp_path / "out", engine)
