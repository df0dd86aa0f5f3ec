"""minGPT from the file to the layout and back; its maths; and that it is told from nanoGPT, whose names it shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdl.archs import mingpt
from mdl.convert.prepare import Options, prepare
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout

GIVEN = {"n_head": "2"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """model.pt as chargpt.py saves it: a bare state dict."""
    return gpts.saved(tmp_path / "work" / "model.pt", gpts.mingpt())


def config(folder: Path, **model: object) -> None:
    """config.json as minGPT writes it beside model.pt; what a preset settles is null there."""
    fields = {"model_type": None, "n_layer": None, "n_head": None, "n_embd": None, "vocab_size": None} | model
    (folder / "config.json").write_text(json.dumps({"system": {}, "data": {}, "model": fields, "trainer": {}}))


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    prepared = layout(checkpoint, tmp_path / "out", GIVEN)

    assert prepared.arch.name == "mingpt"
    assert (prepared.config["activation_function"], prepared.config["tie_word_embeddings"]) == ("gelu_new", False)
    make.same(make.saved(tmp_path / "out"), gpts.gpt2_of_mingpt(gpts.mingpt()))
    kept = {name: tensor for name, tensor in gpts.mingpt().items() if not name.endswith(".attn.bias")}
    make.same(back(tmp_path / "out"), kept)


def test_it_computes_what_the_formulas_say(checkpoint: Path) -> None:
    wanted = gpts.forward(gpts.gpt2_of_mingpt(gpts.mingpt()))

    assert nmse(eager(checkpoint, GIVEN), wanted) < 1e-24
    assert nmse(eager(checkpoint, {**GIVEN, "activation": "gelu"}), wanted) > 1e-9
    assert nmse(eager(checkpoint, {"n_head": "4"}), wanted) > 1e-3


def test_heads_are_asked_for(checkpoint: Path) -> None:
    with pytest.raises(MdlError, match=r"heads is neither in the checkpoint.*config\.json beside.*--set n_head=VALUE"):
        prepare(checkpoint)
    with pytest.raises(MdlError, match="3 heads do not divide the width 64"):
        prepare(checkpoint, Options(given={"n_head": "3"}))


def test_config_json_says_how_many(checkpoint: Path) -> None:
    config(checkpoint.parent, n_layer=2, n_head=4, n_embd=64)
    prepared = prepare(checkpoint)

    assert (prepared.dims["heads"], prepared.dims.entries["heads"].source) == (4, "file")


def test_a_preset_says_how_many_if_it_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(checkpoint.parent, model_type="gpt-nano")
    with pytest.raises(MdlError, match="gpt-nano, which has 3 layers of width 48, but there are 2 layers of width 64"):
        prepare(checkpoint)

    monkeypatch.setitem(mingpt.PRESETS, "gpt-nano", (2, 2, 64))
    prepared = prepare(checkpoint)
    assert prepared.dims["heads"] == 2
    assert "model_type gpt-nano: 2 heads" in prepared.dims.entries["heads"].because


def test_sizes_of_another_model_are_told(checkpoint: Path) -> None:
    config(checkpoint.parent, n_layer=3, n_head=2, n_embd=64)
    with pytest.raises(MdlError, match="layers is 2 by the tensors") as caught:
        prepare(checkpoint)
    assert caught.value.kind is Kind.INPUT


@pytest.mark.engine
def test_vllm_computes_it(checkpoint: Path, tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint, tmp_path / "out", GIVEN)
    is_green(tmp_path / "out", engine)
