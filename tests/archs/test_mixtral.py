"""Mixtral in Mistral's own layouts: recognise, refuse, convert and back; against mistral-inference and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import verify

from .. import checkpoints as make
from .. import checkpoints_mistral as mistral
from .. import upstream
from ..converted import nmse, with_dims
from .test_mistral_inference import IDS, LIMIT, refusals

GIVEN = {"rope_theta": "1000000", "context": "256"}
STACKED = {**GIVEN, "experts_per_token": "2"}


def eager_logits(prepared: Prepared, tensors: make.State, **changed: Any) -> torch.Tensor:
    """Our forward's logits [T, V], with some of the dims changed."""
    return with_dims(prepared, tensors, IDS, **changed)


def held(folder: Path) -> make.State:
    """The tensors of all files of a release."""
    return {name: t for file in sorted(folder.glob("*.pt*")) for name, t in torch.load(file).items()}


def test_experts_one_by_one(tmp_path: Path) -> None:
    prepared = prepare(mistral.release(tmp_path / "raw", moe=mistral.MOE))

    prepared.plan.refuse()
    assert (prepared.arch.name, prepared.dims["stacked"]) == ("mixtral", False)
    convert(prepared, tmp_path / "out", tokenizer="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    sizes = {key: config[key] for key in ("num_local_experts", "num_experts_per_tok", "head_dim", "sliding_window")}
    assert sizes == {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": None}
    tensors = mistral.state(moe=mistral.MOE)
    make.same(make.saved(tmp_path / "out"), mistral.target_of(tensors))

    export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(tmp_path / "back.pt"), tensors)


@pytest.mark.parametrize("files", [1, 3])
def test_experts_below_one_another(files: int, tmp_path: Path) -> None:
    raw = mistral.stacked(tmp_path / "raw", files=files)
    prepared = prepare(raw, Options(given=STACKED))

    prepared.plan.refuse()
    assert (prepared.arch.name, prepared.dims["stacked"], prepared.inventory.ranks) == ("mixtral", True, files)
    convert(prepared, tmp_path / "out", tokenizer="none")
    make.same(make.saved(tmp_path / "out"), mistral.target_of(mistral.state(moe=mistral.MOE)))

    back = export(tmp_path / "out", tmp_path / ("back.pt" if files == 1 else "back"))
    assert not [lost for lost in back.lost if "layers" in lost.what]
    written = torch.load(tmp_path / "back.pt") if files == 1 else held(tmp_path / "back")
    make.same(written, held(raw))


def test_both_layouts_compute_the_same(tmp_path: Path) -> None:
    raw = mistral.stacked(tmp_path / "raw")
    stacked = eager_logits(prepare(raw, Options(given=STACKED)), held(raw))
    single = mistral.release(tmp_path / "single", moe=mistral.MOE, rope_theta=1e6)

    assert nmse(stacked, eager_logits(prepare(single), held(single))) < LIMIT


def test_what_is_not_written_down_is_asked_for(tmp_path: Path) -> None:
    said = refusals(mistral.stacked(tmp_path / "raw"))

    for key in ("num_experts_per_tok", "rope_theta", "max_seq_len"):
        assert f"--set {key}=" in said or f"--set moe.{key}=" in said


@pytest.mark.parametrize("stored", [4096, "4096"])
def test_a_window_is_refused_since_vllm_has_none(stored: object, tmp_path: Path) -> None:
    raw = mistral.stacked(tmp_path / "raw", sliding_window=stored)

    assert "sees all positions" in refusals(raw, **STACKED)
    prepared = prepare(raw, Options(given={**STACKED, "sliding_window": "none"}))
    prepared.plan.refuse()
    assert prepared.dims.entries["sliding_window"].source == "user"


def test_a_stack_that_does_not_hold_the_experts(tmp_path: Path) -> None:
    raw = mistral.stacked(tmp_path / "raw", files=1)
    tensors = held(raw)
    tensors["layers.0.block_sparse_moe.w1"] = tensors["layers.0.block_sparse_moe.w1"][:-1]
    torch.save(tensors, raw / "consolidated.00.pt")

    with pytest.raises(MdlError, match="w1 with 319 rows does not hold 4 experts"):
        prepare(raw, Options(given=STACKED))


def test_our_forward_is_that_of_mistral_inference(tmp_path: Path) -> None:
    theirs = upstream.mistral(tmp_path / "raw", {**mistral.SIZES, "moe": mistral.MOE})
    prepared = prepare(tmp_path / "raw", Options(given=GIVEN))
    tensors = held(tmp_path / "raw")

    ours = eager_logits(prepared, tensors)

    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in mistral.state(moe=mistral.MOE).items()}
    assert nmse(ours, theirs.prefill(IDS)) < LIMIT
    assert nmse(ours, theirs.decode(IDS)) < LIMIT
    for sabotage in ({"rope_theta": 10000.0}, {"experts_per_token": 1}, {"experts_per_token": 3}):
        assert nmse(eager_logits(prepared, tensors, **sabotage), theirs.prefill(IDS)) > 1e-8


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    raw = mistral.stacked(tmp_path / "raw")
    options = Options(given=STACKED)
    convert(prepare(raw, options), tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, report
    assert report.versions["model class"].endswith("MixtralForCausalLM")
