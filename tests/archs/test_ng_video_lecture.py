"""The lecture's gpt.py: its own checkpoints are refused with a reason, those without a bias of the head converted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdl.convert.prepare import Options, prepare
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout

GIVEN = {"attention_scale": "head_size"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A bare state dict of a model whose head has no bias."""
    return gpts.saved(tmp_path / "model.pt", gpts.lecture())


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    prepared = layout(checkpoint, tmp_path / "out", GIVEN)

    assert (prepared.arch.name, prepared.dims["heads"]) == ("ng_video_lecture", 2)
    assert (prepared.config["activation_function"], prepared.config["tie_word_embeddings"]) == ("relu", False)
    make.same(make.saved(tmp_path / "out"), gpts.gpt2_of_lecture(gpts.lecture()))
    make.same(back(tmp_path / "out"), {k: t for k, t in gpts.lecture().items() if not k.endswith("tril")})


def test_it_computes_what_the_formulas_say(checkpoint: Path) -> None:
    wanted = gpts.forward(gpts.gpt2_of_lecture(gpts.lecture()), act="relu")

    assert nmse(eager(checkpoint, GIVEN), wanted) < 1e-24
    assert nmse(eager(checkpoint, {**GIVEN, "activation": "gelu"}), wanted) > 1e-4


def test_a_head_with_a_bias_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    path = gpts.saved(tmp_path / "model.pt", gpts.lecture(head_bias=True))
    with pytest.raises(MdlError, match=r"the head has a bias.*bias=False.*TransformersForCausalLM") as caught:
        prepare(path, Options(given=GIVEN))
    assert caught.value.kind is Kind.INPUT


def test_the_scale_is_asked_for_and_the_old_one_refused_with_the_factor(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=r"attention_scale is neither.*988848a.*--set attention_scale=VALUE"):
        prepare(checkpoint)
    with pytest.raises(MdlError, match=r"multiply every query\.weight by n_head\*\*-0\.5"):
        prepare(checkpoint, Options(given={"attention_scale": "n_embd"}))

    folded = {k: t * gpts.HEADS**-0.5 if ".query." in k else t for k, t in gpts.lecture().items()}
    path = gpts.saved(tmp_path / "folded.pt", folded)
    assert nmse(eager(path, GIVEN), eager(checkpoint, GIVEN)) > 1e-3


def test_heads_that_do_not_fill_the_width(tmp_path: Path) -> None:
    state = {k: t[:31] if ".heads." in k and k.endswith("weight") else t for k, t in gpts.lecture().items()}
    with pytest.raises(MdlError, match="2 heads of 31 channels do not make up the width 64"):
        prepare(gpts.saved(tmp_path / "model.pt", state), Options(given=GIVEN))


@pytest.mark.engine
def test_vllm_computes_it(checkpoint: Path, tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint, tmp_path / "out", GIVEN)
    is_green(tmp_path / "out", engine)
