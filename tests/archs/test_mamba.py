"""Mamba 1 from mamba_ssm's folder to the layout and back; its maths against transformers' own class.

vLLM's kernels for it run on GPUs only, so that on a CPU `mdl verify` says what is lacking, and proves nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import prepare
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import verify
from mdl.views import show_plan

from .. import checkpoints as make
from .. import mambas
from ..converted import nmse
from ..gpts_checks import by_transformers, eager, layout


def checkpoint(folder: Path, **given: Any) -> Path:
    """A folder as save_pretrained writes it; d_state and dt_rank are Mamba 1's defaults or said by ssm_cfg."""
    ssm = {"layer": "Mamba1", "dt_rank": mambas.RANK}
    return mambas.saved(folder, mambas.state(1, **given), ssm, tie_embeddings=given.get("tied", True))


@pytest.fixture(params=[(True, False), (False, True)], ids=["released", "biases, own head"])
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    """As released, tied; and with a head of its own and the biases that the released ones lack."""
    tied, biases = request.param
    return {"tied": tied, "biases": biases}


def test_there_and_back(given: dict[str, Any], tmp_path: Path) -> None:
    prepared = layout(checkpoint(tmp_path / "raw", **given), tmp_path / "out")

    sizes = {key: prepared.config[key] for key in ("state_size", "time_step_rank", "expand", "conv_kernel")}
    assert prepared.arch.name == "mamba"
    assert sizes == {"state_size": 16, "time_step_rank": 6, "expand": 2, "conv_kernel": 4}
    assert (prepared.config["tie_word_embeddings"], prepared.config["use_bias"]) == tuple(given.values())
    state = mambas.state(1, **given)
    make.same(make.saved(tmp_path / "out"), mambas.target_of(state))
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    make.same(back, state)
    assert list(back) == list(state)


def test_it_computes_what_transformers_computes_of_the_layout(given: dict[str, Any], tmp_path: Path) -> None:
    raw = checkpoint(tmp_path / "raw", **given)
    prepared = layout(raw, tmp_path / "out")

    wanted = by_transformers(tmp_path / "out", prepared, mambas.IDS)
    assert nmse(eager(raw, ids=mambas.IDS), wanted) < 1e-24
    turned = mambas.state(1, **given)
    name = "backbone.layers.0.mixer.in_proj.weight"
    turned[name] = turned[name].roll(mambas.INNER, 0)  # the gate before the channels
    assert nmse(eager(mambas.saved(tmp_path / "turned", turned, {}), ids=mambas.IDS), wanted) > 1e-3


def test_the_plan_says_what_a_cpu_can_prove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(prepare(checkpoint(tmp_path / "raw")), reverse=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "has Mamba 1's selective scan for GPUs only" in said
    assert "on a CPU mdl's eager forward alone stands for it" in said


def test_no_config_is_needed(tmp_path: Path) -> None:
    prepared = prepare(mambas.saved(tmp_path / "raw", mambas.state(1)))

    prepared.plan.refuse()
    assert prepared.dims.entries["context"].source == "default"


@pytest.mark.engine
def test_a_cpu_says_what_it_lacks(tmp_path: Path, engine: Engine) -> None:
    if engine.ping() and torch.cuda.is_available():
        pytest.skip("this machine has what a CPU lacks")
    layout(checkpoint(tmp_path / "raw"), tmp_path / "out")

    with pytest.raises(MdlError, match=r"selective_scan_fwd.*\n?.*selective scan for GPUs only") as caught:
        verify(tmp_path / "out", engine=engine)
    assert caught.value.kind is Kind.MACHINE
    assert not (tmp_path / "out/mdl-report.json").exists()
