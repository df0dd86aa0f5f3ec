"""GPTs of nn.TransformerEncoderLayer, whatever their authors call what is around it; the reference is torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout
from ..torch_gpts import MODELS, gpt2_of, model

GIVEN = {"heads": "2", "norm_first": "true", "activation": "gelu", "embedding_scale": "none"}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """One author's way."""
    return str(request.param)


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Path:
    """Its state dict, in a training script's dict."""
    return gpts.saved(tmp_path / "x.pt", {"model_state_dict": model(name).state_dict(), "epoch": 3})


def test_there_and_back(checkpoint: Path, name: str, tmp_path: Path) -> None:
    prepared = layout(checkpoint, tmp_path / "out", GIVEN)

    state = model(name).state_dict()
    assert (prepared.arch.name, prepared.config["tie_word_embeddings"]) == ("torch_encoder", name == "listed")
    make.same(make.saved(tmp_path / "out"), gpt2_of(state))
    make.same(back(tmp_path / "out")["model_state_dict"], {k: t for k, t in state.items() if k != "mask"})


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_it_computes_what_torch_computes(name: str, activation: str, tmp_path: Path) -> None:
    theirs = model(name, activation=activation).double()
    path = gpts.saved(tmp_path / "x.pt", {k: t.float() for k, t in model(name).state_dict().items()})
    with torch.no_grad():
        wanted = theirs(gpts.IDS[None])[0]

    given = {**GIVEN, "activation": activation}
    assert nmse(eager(path, given), wanted) < 1e-24
    assert nmse(eager(path, {**given, "activation": "gelu_new"}), wanted) > 1e-9
    assert nmse(eager(path, {**given, "heads": "4"}), wanted) > 1e-3


def test_what_leaves_no_trace_is_asked_for(checkpoint: Path) -> None:
    with pytest.raises(MdlError) as caught:
        prepare(checkpoint)
    for asked in GIVEN:
        assert f"--set {asked}=VALUE" in str(caught.value)


def test_what_gpt2_can_not_say_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=r"norm_first=False.*norm_first=True can be converted"):
        prepare(checkpoint, Options(given={**GIVEN, "norm_first": "false"}))
    with pytest.raises(MdlError, match=r"multiplied by C\*\*0\.5.*embedding_scale=none"):
        prepare(checkpoint, Options(given={**GIVEN, "embedding_scale": "sqrt"}))
    state = model("stacked").state_dict()
    biased = gpts.saved(tmp_path / "b.pt", {**state, "lm_head.bias": torch.ones(gpts.VOCAB)})
    with pytest.raises(MdlError, match=r"lm_head\.bias: the head has a bias"):
        prepare(biased, Options(given=GIVEN))
    bare = gpts.saved(tmp_path / "n.pt", {k: t for k, t in state.items() if "transformer.norm" not in k})
    with pytest.raises(MdlError, match="0 norms stand outside the layers"):
        prepare(bare, Options(given=GIVEN))


def test_names_that_shapes_do_not_tell_are_asked_for(tmp_path: Path) -> None:
    """A head that is called in the forward alone leaves two tables, of which either may be the positions."""
    state = {k: t for k, t in model("stacked").state_dict().items() if k != "lm_head.weight"}
    path = gpts.saved(tmp_path / "x.pt", state)
    with pytest.raises(MdlError, match=r"positions is neither.*token_embedding\.weight, position_embedding\.weight"):
        prepare(path, Options(given=GIVEN))

    prepared = prepare(path, Options(given={**GIVEN, "positions": "position_embedding.weight"}))
    assert (prepared.dims["vocab"], prepared.dims["context"]) == (gpts.VOCAB, gpts.CONTEXT)
    assert prepared.dims["tied"] is True
    with pytest.raises(MdlError, match="there is no tensor pos"):
        prepare(path, Options(given={**GIVEN, "positions": "pos"}))


@pytest.mark.parametrize("turned", [False, True])
def test_the_order_of_a_file_tells_nothing(turned: bool, tmp_path: Path) -> None:
    """An embedding and a head of its own are both [V, C]: only a head's name tells, or the user."""
    state = model("stacked").state_dict()
    order = sorted(state, key=lambda name: name != "lm_head.weight") if turned else list(state)
    known = prepare(gpts.saved(tmp_path / "known.pt", {k: state[k] for k in order}), Options(given=GIVEN))
    assert (known.dims["embedding"], known.dims["head"]) == ("token_embedding.weight", "lm_head.weight")

    tutorial = {"token_embedding.weight": "encoder.weight", "lm_head.weight": "decoder.weight"}
    named = gpts.saved(tmp_path / "tutorial.pt", {tutorial.get(k, k): state[k] for k in order})
    assert prepare(named, Options(given=GIVEN)).dims["head"] == "decoder.weight"
    odd = {"token_embedding.weight": "a.weight", "lm_head.weight": "b.weight"}
    path = gpts.saved(tmp_path / "odd.pt", {odd.get(k, k): state[k] for k in order})
    with pytest.raises(MdlError, match=r"embedding is neither.*which of [ab]\.weight, [ab]\.weight is the embed") as e:
        prepare(path, Options(given=GIVEN))
    assert "pass --set embedding=VALUE" in str(e.value)
    prepared = prepare(path, Options(given={**GIVEN, "embedding": "a.weight"}))
    assert (prepared.dims["head"], prepared.dims["vocab"]) == ("b.weight", gpts.VOCAB)
    with pytest.raises(MdlError, match=r"there is no tensor c\.weight"):
        prepare(path, Options(given={**GIVEN, "embedding": "c.weight"}))


def test_a_decoder_is_none(tmp_path: Path) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(gpts.VOCAB, gpts.HIDDEN)
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(gpts.HIDDEN, 2, 128), 2)

    with pytest.raises(MdlError, match="no known architecture"):
        prepare(gpts.saved(tmp_path / "x.pt", Decoder().state_dict()))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["listed"], indirect=True)
def test_vllm_computes_it(checkpoint: Path, tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint, tmp_path / "out", GIVEN)
    is_green(tmp_path / "out", engine)
