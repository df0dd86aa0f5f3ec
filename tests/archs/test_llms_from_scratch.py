"""The GPTModel of LLMs-from-scratch from the file to the layout and back; its maths, against the book's package too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout

GIVEN = {"heads": "2"}


@pytest.fixture(params=[False, True], ids=["plain", "qkv_bias"])
def qkv_bias(request: pytest.FixtureRequest) -> bool:
    """Whether q, k and v have biases, as OpenAI's weights need them."""
    return bool(request.param)


@pytest.fixture
def checkpoint(tmp_path: Path, qkv_bias: bool) -> Path:
    """model_and_optimizer.pth, as chapter 5 saves it."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 4e-4}]}
    document = {"model_state_dict": gpts.llms_from_scratch(qkv_bias=qkv_bias), "optimizer_state_dict": optimizer}
    return gpts.saved(tmp_path / "model_and_optimizer.pth", document)


def test_there_and_back(checkpoint: Path, qkv_bias: bool, tmp_path: Path) -> None:
    prepared = layout(checkpoint, tmp_path / "out", GIVEN)

    assert (prepared.arch.name, prepared.dims["qkv_bias"]) == ("llms_from_scratch", qkv_bias)
    assert (prepared.config["activation_function"], prepared.config["tie_word_embeddings"]) == ("gelu_new", False)
    state = gpts.llms_from_scratch(qkv_bias=qkv_bias)
    make.same(make.saved(tmp_path / "out"), gpts.gpt2_of_book(state))
    make.same(back(tmp_path / "out")["model_state_dict"], {k: t for k, t in state.items() if not k.endswith("mask")})


def test_it_computes_what_the_formulas_say(checkpoint: Path, qkv_bias: bool) -> None:
    wanted = gpts.forward(gpts.gpt2_of_book(gpts.llms_from_scratch(qkv_bias=qkv_bias)))

    assert nmse(eager(checkpoint, GIVEN), wanted) < 1e-24
    assert nmse(eager(checkpoint, {**GIVEN, "activation": "gelu"}), wanted) > 1e-9
    assert nmse(eager(checkpoint, {"heads": "4"}), wanted) > 1e-3


def test_it_computes_what_the_book_computes(checkpoint: Path, qkv_bias: bool) -> None:
    ch04 = pytest.importorskip(
        "llms_from_scratch.ch04", reason="the book's own code is not here: pip install --no-deps llms-from-scratch"
    )
    sizes = {"vocab_size": gpts.VOCAB, "context_length": gpts.CONTEXT, "emb_dim": gpts.HIDDEN, "n_heads": gpts.HEADS}
    model = ch04.GPTModel(sizes | {"n_layers": gpts.LAYERS, "drop_rate": 0.1, "qkv_bias": qkv_bias}).eval().double()
    model.load_state_dict(gpts.llms_from_scratch(qkv_bias=qkv_bias), strict=True)

    with torch.no_grad():
        wanted = model(gpts.IDS[None])[0]
    assert nmse(eager(checkpoint, GIVEN), wanted) < 1e-13  # the book rounds √(2/π) to float32


def test_heads_are_asked_for(checkpoint: Path) -> None:
    with pytest.raises(MdlError, match=r"heads is neither in the checkpoint.*n_heads of the cfg.*--set heads=VALUE"):
        prepare(checkpoint)


def test_a_classifier_is_called_one(tmp_path: Path) -> None:
    head = {"out_head.weight": torch.ones(2, gpts.HIDDEN), "out_head.bias": torch.ones(2)}
    path = gpts.saved(tmp_path / "review_classifier.pth", gpts.llms_from_scratch() | head)
    with pytest.raises(MdlError, match="out_head has 2 rows for a vocabulary of 96: chapter 6's classifier"):
        prepare(path, Options(given=GIVEN))


@pytest.mark.engine
@pytest.mark.parametrize("qkv_bias", [True], indirect=True)
def test_vllm_computes_it(checkpoint: Path, tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint, tmp_path / "out", GIVEN)
    is_green(tmp_path / "out", engine)
