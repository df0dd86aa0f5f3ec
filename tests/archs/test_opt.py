"""OPT and fairseq's language models: whole, in metaseq's parts, with q, k and v fused, with norms behind the blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout
from ..opts import fused, in_parts, opt_of, saved, state

CASES: dict[str, tuple[Callable[[], make.State], dict[str, Any]]] = {
    "pre-norm": (state, {}),
    "350M": (lambda: state(before=False, narrow=True), {"decoder_normalize_before": False}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[make.State, dict[str, Any]]:
    """Weights of a model, and what its options say differently."""
    build, changed = CASES[request.param]
    return build(), changed


def whole(folder: Path, case: tuple[make.State, dict[str, Any]]) -> Path:
    return saved(folder / "restored.pt", case[0], **case[1])


def test_there_and_back(case: tuple[make.State, dict[str, Any]], tmp_path: Path) -> None:
    prepared = layout(whole(tmp_path, case), tmp_path / "out")

    assert (prepared.arch.name, prepared.config["tie_word_embeddings"]) == ("opt", True)
    assert prepared.config["do_layer_norm_before"] is ("decoder.layer_norm.weight" in case[0])
    make.same(make.saved(tmp_path / "out"), opt_of(case[0]))
    without = {k: t for k, t in case[0].items() if k != "decoder.version"}
    make.same(back(tmp_path / "out", "fairseq's layout")["model"], without)


def test_parts_and_fused_rows_become_the_same(case: tuple[make.State, dict[str, Any]], tmp_path: Path) -> None:
    for name, made in (("separate", case[0]), ("fused", fused(case[0]))):
        prepared = layout(in_parts(tmp_path / name, made, **case[1]), tmp_path / f"{name}_out")

        assert prepared.inventory.ranks == 2
        make.same(make.saved(tmp_path / f"{name}_out"), opt_of(case[0]))
        assert nmse(eager(tmp_path / name), eager(whole(tmp_path / f"{name}_whole", case))) < 1e-28


def test_it_computes_what_transformers_computes(case: tuple[make.State, dict[str, Any]], tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    prepared = prepare(whole(tmp_path, case))
    model = OPTForCausalLM(OPTConfig(**{k: v for k, v in prepared.config.items() if k != "dtype"})).eval().double()
    model.load_state_dict({k: t.double() for k, t in opt_of(case[0]).items()}, strict=False)
    with torch.no_grad():
        wanted = model(gpts.IDS[None]).logits[0]

    path = tmp_path / "restored.pt"
    assert nmse(eager(path), wanted) < 1e-24
    assert nmse(eager(path, {"activation": "gelu"}), wanted) > 1e-4
    assert nmse(eager(path, {"decoder_attention_heads": "1"}), wanted) > 1e-3


def test_gelu_is_another_function_in_each_trainer(tmp_path: Path) -> None:
    theirs = prepare(saved(tmp_path / "x.pt", state(), activation_fn="gelu"))
    metaseq = prepare(in_parts(tmp_path / "parts", fused(state()), activation_fn="gelu"))

    assert theirs.config["activation_function"] == "gelu"
    assert metaseq.config["activation_function"] == "gelu_new"
    assert "in metaseq is the tanh form" in metaseq.dims.entries["activation"].because
    with pytest.raises(MdlError, match=r"activation is 'swiglu'"):
        prepare(saved(tmp_path / "y.pt", state(), activation_fn="swiglu"))


def test_what_the_class_does_not_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=r"no_scale_embedding is false.*multiply embed_tokens\.weight"):
        prepare(saved(tmp_path / "x.pt", state(), no_scale_embedding=False))
    silent = saved(tmp_path / "s.pt", state(), without=("no_scale_embedding",))
    with pytest.raises(MdlError, match=r"multiplied by the root of its width \(no_scale_embedding is false\)"):
        prepare(silent)  # fairseq's and metaseq's options have it false where a run did not set it
    assert prepare(silent, Options(given={"no_scale_embedding": "true"})).dims["no_scale_embedding"] is True
    with pytest.raises(MdlError, match=r"args\.alibi is True: slopes"):
        prepare(saved(tmp_path / "x.pt", state(), alibi=True))
    made = {k: t for k, t in state().items() if "embed_positions" not in k}
    with pytest.raises(MdlError, match="positions are sinusoidal"):
        prepare(saved(tmp_path / "x.pt", made | {"decoder.embed_positions._float_tensor": torch.ones(1)}))


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    bare = gpts.saved(tmp_path / "x.pt", {"model": state(before=False)})
    with pytest.raises(MdlError, match=r"decoder_attention_heads of the options") as caught:
        prepare(bare)
    assert "no norm stands behind the last block" in str(caught.value)
    assert "pass --set no_scale_embedding=VALUE" in str(caught.value)
    given = {"heads": "2", "norm_before": "false", "no_scale_embedding": "true"}
    assert prepare(bare, Options(given=given)).config["activation_function"] == "relu"


@pytest.mark.engine
@pytest.mark.parametrize("case", ["350M"], indirect=True)
def test_vllm_computes_it(case: tuple[make.State, dict[str, Any]], tmp_path: Path, engine: Engine) -> None:
    made = fused(case[0])
    layout(in_parts(tmp_path / "parts", made, **case[1]), tmp_path / "out")
    is_green(tmp_path / "out", engine)
