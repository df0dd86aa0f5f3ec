"""minGPT before June 2022 from the file to the layout and back, and its maths."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout

GIVEN = {"heads": "2"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A bare state dict, as trainer.py's save_checkpoint saves it."""
    return gpts.saved(tmp_path / "model.pt", gpts.mingpt_old())


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    prepared = layout(checkpoint, tmp_path / "out", GIVEN)

    assert prepared.arch.name == "mingpt_old"
    assert (prepared.config["activation_function"], prepared.config["tie_word_embeddings"]) == ("gelu", False)
    make.same(make.saved(tmp_path / "out"), gpts.gpt2_of_old(gpts.mingpt_old()))
    make.same(back(tmp_path / "out"), {k: t for k, t in gpts.mingpt_old().items() if not k.endswith("mask")})


def test_a_head_that_equals_the_embedding_is_written_once(tmp_path: Path) -> None:
    state = gpts.mingpt_old()
    state["head.weight"] = state["tok_emb.weight"].clone()
    prepared = layout(gpts.saved(tmp_path / "model.pt", state), tmp_path / "out", GIVEN)

    assert prepared.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in make.saved(tmp_path / "out")
    assert nmse(eager(tmp_path / "model.pt", GIVEN), gpts.forward(make.saved(tmp_path / "out"), act="exact")) < 1e-24


def test_it_computes_what_the_formulas_say(checkpoint: Path) -> None:
    wanted = gpts.forward(gpts.gpt2_of_old(gpts.mingpt_old()), act="exact")

    assert nmse(eager(checkpoint, GIVEN), wanted) < 1e-24
    assert nmse(eager(checkpoint, {**GIVEN, "activation": "gelu_new"}), wanted) > 1e-9
    assert nmse(eager(checkpoint, {"heads": "1"}), wanted) > 1e-3


def test_heads_are_asked_for(checkpoint: Path) -> None:
    with pytest.raises(MdlError, match=r"heads is neither in the checkpoint.*GPTConfig.*--set heads=VALUE"):
        prepare(checkpoint)


def test_what_a_fork_added_is_no_part_of_it(tmp_path: Path) -> None:
    state = gpts.mingpt_old() | {"state_encoder.0.weight": gpts.Draw(0)(4, 4)}
    plan = prepare(gpts.saved(tmp_path / "model.pt", state), Options(given=GIVEN)).plan
    assert any("state_encoder.0.weight" in problem.what for problem in plan.problems)


@pytest.mark.engine
def test_vllm_computes_it(checkpoint: Path, tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint, tmp_path / "out", GIVEN)
    is_green(tmp_path / "out", engine)
